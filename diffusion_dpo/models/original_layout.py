"""Where each weight of a pipeline lies in a single-file checkpoint of the original Stable Diffusion.

One table serves both directions: `export format=single_file` writes by it, and a checkpoint is read by it. The layers
are numbered by walking the model, not by a list of blocks, so that any depth and width comes out.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.original_names import unet_names

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import Tensor

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_ATTENTION_WEIGHT = re.compile(r"\.attn_1\.(?:q|k|v|proj_out)\.weight$")
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."


class Place(NamedTuple):
    """Where a weight lies in a checkpoint."""

    name: str
    third: int | None = None
    """Which third of the rows: open_clip joins the projections of query, key and value."""
    transposed: bool = False
    as_convolution: bool = False
    """A linear layer of the VAE's attention is a convolution of 1 x 1 there."""


def places(parts: Mapping[str, Any]) -> dict[str, dict[str, Place]]:
    """Return the places of all weights: of `unet`, `vae` and the text encoders, by their names in each part.

    Raises ConfigError for a weight that the original layout has no name for.
    """
    found = {
        "unet": _by_path(parts["unet"], unet_names(parts["unet"]), UNET),
        "vae": {
            key: place._replace(as_convolution=bool(_ATTENTION_WEIGHT.search(place.name)))
            for key, place in _by_path(parts["vae"], _vae_names(parts["vae"]), VAE).items()
        },
    }
    if "text_encoder_2" in parts:
        found["text_encoder"] = _clip(parts["text_encoder"], XL_CLIP)
        found["text_encoder_2"] = _open_clip(parts["text_encoder_2"], XL_OPEN_CLIP)
    elif parts["text_encoder"].config.hidden_act == "quick_gelu":  # OpenAI's CLIP, of Stable Diffusion 1
        found["text_encoder"] = _clip(parts["text_encoder"], CLIP)
    else:
        found["text_encoder"] = _open_clip(parts["text_encoder"], OPEN_CLIP)
    return found


def as_original(parts: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """Return all weights of a pipeline's parts under the original names."""
    import torch

    weights: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for part, of_part in places(parts).items():
        values = parts[part].state_dict()
        for key, place in of_part.items():
            value = values[key].T if place.transposed else values[key]
            if place.third is not None:
                thirds.setdefault(place.name, {})[place.third] = value
            else:
                weights[place.name] = value[:, :, None, None] if place.as_convolution and value.ndim == 2 else value
    return weights | {name: torch.cat([of[0], of[1], of[2]]) for name, of in thirds.items()}


def shape_there(place: Place, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a weight has in a checkpoint, without dimensions of 1 at its end."""
    there = shape[::-1] if place.transposed else shape
    if place.third is not None:
        there = (3 * there[0], *there[1:])
    return without_ones(there) if place.as_convolution else there


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without dimensions of 1 at its end."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def from_original(place: Place, value: "Tensor", shape: tuple[int, ...]) -> "Tensor":
    """Return a weight of a given shape from what lies at its place."""
    if place.third is not None:
        value = value.chunk(3)[place.third]
    return value.T if place.transposed else value.reshape(shape)


# --- the names of each part ------------------------------------------------------------------------------------------


def _by_path(model: Any, names: Mapping[str, str], prefix: str) -> dict[str, Place]:
    found = {}
    for key in model.state_dict():
        path = key.rpartition(".")[0]
        while path not in names and path:  # the layers within a transformer keep their names
            path = path.rpartition(".")[0]
        if not path:
            raise ConfigError(
                f"the {type(model).__name__} has {key}, which the original layout has no name for; use format=merged"
            )
        found[key] = Place(f"{prefix}{names[path]}{key[len(path) :]}")
    return found


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
        names |= {
            f"{side}.mid_block.attentions.0.{ours}": f"{side}.mid.attn_1.{original}"
            for ours, original in _VAE_ATTENTION.items()
        }
    return names


def _vae_resnet(ours: str, original: str) -> dict[str, str]:
    same = {f"{ours}.{name}": f"{original}.{name}" for name in ("norm1", "conv1", "norm2", "conv2")}
    return same | {f"{ours}.conv_shortcut": f"{original}.nin_shortcut"}


def _text_keys(encoder: Any) -> list[str]:
    return [key for key in encoder.state_dict() if not key.endswith("position_ids")]


def _clip(encoder: Any, prefix: str) -> dict[str, Place]:
    """The names of transformers before version 5.6, which the original took CLIP from."""
    return {key: Place(f"{prefix}text_model.{key.removeprefix('text_model.')}") for key in _text_keys(encoder)}


def _open_clip(encoder: Any, prefix: str) -> dict[str, Place]:
    """The names of open_clip."""
    found = {}
    for key in _text_keys(encoder):
        ours = key.removeprefix("text_model.")
        if ours in _OPEN_CLIP_ENDS:
            found[key] = Place(prefix + _OPEN_CLIP_ENDS[ours])
        elif ours == "text_projection.weight":
            found[key] = Place(f"{prefix}text_projection", transposed=True)
        else:
            number, _, rest = ours.removeprefix("encoder.layers.").partition(".")
            layer, _, kind = rest.rpartition(".")
            block = f"{prefix}transformer.resblocks.{number}."
            if layer in _OPEN_CLIP:
                found[key] = Place(f"{block}{_OPEN_CLIP[layer]}.{kind}")
            else:
                third = "qkv".index(layer.removeprefix("self_attn.")[0])
                found[key] = Place(f"{block}attn.in_proj_{kind}", third=third)
    return found
