"""The names that the original Stable Diffusion gives to the layers of a UNet, whatever its depth and width."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_names(unet: "UNet2DConditionModel") -> dict[str, str]:
    """Return the original path of every layer of a UNet; of its transformers, that of the whole."""
    names = dict(_UNET_ENDS)
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            names |= _stage(f"down_blocks.{i}", j, f"input_blocks.{number}", block)
            number += 1
        if block.downsamplers:
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for j in range(len(unet.mid_block.resnets)):
        names |= _resnet(f"mid_block.resnets.{j}", f"middle_block.{2 * j}")
        names[f"mid_block.attentions.{j}"] = f"middle_block.{2 * j + 1}"
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            names |= _stage(f"up_blocks.{i}", j, f"output_blocks.{number}", block)
            number += 1
        if block.upsamplers:
            place = 2 if _has_attention(block) else 1
            names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return names


def _stage(block_name: str, j: int, original: str, block: Any) -> dict[str, str]:
    names = _resnet(f"{block_name}.resnets.{j}", f"{original}.0")
    return names | ({f"{block_name}.attentions.{j}": f"{original}.1"} if _has_attention(block) else {})


def _has_attention(block: Any) -> bool:
    return bool(getattr(block, "has_cross_attention", False))


def _resnet(ours: str, original: str) -> dict[str, str]:
    return {f"{ours}.{here}": f"{original}.{there}" for here, there in _UNET_RESNET.items()}
