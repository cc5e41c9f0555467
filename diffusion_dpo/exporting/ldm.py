"""The whole model under the names of the original Stable Diffusion, as single-file checkpoints have them.

The layers are numbered by walking the model, not by a list of blocks, so that any depth and width comes out. What is
written here is the inverse of what diffusers' `from_single_file` reads.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.lora_write import text_path
from diffusion_dpo.models.original_names import unet_names

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline
    from torch import Tensor

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def single_file(pipeline: "DiffusionPipeline") -> dict[str, "Tensor"]:
    """Return all weights of a Stable Diffusion 1.x or 2.x or SDXL pipeline under the original names.

    Raises ConfigError for a model with layers that the original layout has no name for.
    """
    weights = _rename(pipeline.unet, unet_names(pipeline.unet), "model.diffusion_model.")
    weights |= {
        key: value[:, :, None, None] if ".attn_1." in key and value.ndim == 2 else value
        for key, value in _rename(pipeline.vae, _vae_names(pipeline.vae), "first_stage_model.").items()
    }
    second = pipeline.components.get("text_encoder_2")
    if second is not None:
        weights |= _clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        return weights | _open_clip(second, "conditioner.embedders.1.model.")
    if pipeline.text_encoder.config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of Stable Diffusion 1
        return weights | _clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    return weights | _open_clip(pipeline.text_encoder, "cond_stage_model.model.")


def _rename(model: Any, names: dict[str, str], prefix: str) -> dict[str, "Tensor"]:
    renamed = {}
    for key, value in model.state_dict().items():
        path = key.rpartition(".")[0]
        while path not in names and path:  # the layers within a transformer keep their names
            path = path.rpartition(".")[0]
        if not path:
            raise ConfigError(
                f"the {type(model).__name__} has {key}, which the original layout has no name for; use format=merged"
            )
        renamed[f"{prefix}{names[path]}{key[len(path) :]}"] = value
    return renamed


def _vae_names(vae: "AutoencoderKL") -> dict[str, str]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, blocks, theirs, sampler in (
        ("encoder", vae.encoder.down_blocks, "down", "downsample"),
        ("decoder", vae.decoder.up_blocks, "up", "upsample"),
    ):
        names |= {f"{side}.{ours}": f"{side}.{ours}" for ours in ("conv_in", "conv_out")}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for i, block in enumerate(blocks):
            level = i if side == "encoder" else len(blocks) - 1 - i
            for j in range(len(block.resnets)):
                names |= _vae_resnet(f"{side}.{theirs}_blocks.{i}.resnets.{j}", f"{side}.{theirs}.{level}.block.{j}")
            names[f"{side}.{theirs}_blocks.{i}.{sampler}rs.0.conv"] = f"{side}.{theirs}.{level}.{sampler}.conv"
        for j in range(2):
            names |= _vae_resnet(f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}")
        attention = {
            f"{side}.mid_block.attentions.0.{ours}": f"{side}.mid.attn_1.{original}"
            for ours, original in _VAE_ATTENTION.items()
        }
        names |= attention
    return names


def _vae_resnet(ours: str, original: str) -> dict[str, str]:
    same = {f"{ours}.{name}": f"{original}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return same | {f"{ours}.conv_shortcut": f"{original}.nin_shortcut"}


def _text_weights(encoder: Any) -> Iterator[tuple[str, "Tensor"]]:
    for key, value in encoder.state_dict().items():
        if not key.endswith("position_ids"):
            yield text_path(key), value


def _clip(encoder: Any, prefix: str) -> dict[str, "Tensor"]:
    """The names of transformers, which the original took CLIP from."""
    return {prefix + key: value for key, value in _text_weights(encoder)}


def _open_clip(encoder: Any, prefix: str) -> dict[str, "Tensor"]:
    """The names of open_clip, which joins the projections of query, key and value."""
    import torch

    theirs: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for key, value in _text_weights(encoder):
        if key in _OPEN_CLIP_ENDS:
            theirs[prefix + _OPEN_CLIP_ENDS[key]] = value
        elif key == "text_projection.weight":
            theirs[f"{prefix}text_projection"] = value.T
        else:
            number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
            layer, _, kind = rest.rpartition(".")
            block = f"{prefix}transformer.resblocks.{number}."
            if layer in _OPEN_CLIP:
                theirs[f"{block}{_OPEN_CLIP[layer]}.{kind}"] = value
            else:
                joined.setdefault(f"{block}attn.in_proj_{kind}", {})[layer] = value
    for key, by_layer in joined.items():
        theirs[key] = torch.cat([by_layer[f"self_attn.{name}_proj"] for name in "qkv"])
    return theirs
