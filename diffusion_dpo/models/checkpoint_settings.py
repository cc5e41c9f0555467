"""The settings of a single-file checkpoint, from its tensors' names and shapes alone.

Widths, depths and conditioning are seen in the shapes. The number of heads, the groups of the norms, the noise
schedule and the kind of prediction are not, and are those of the family. Files that `export` writes say them.
"""

import json
from collections.abc import Mapping
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.original_layout import CLIP, OPEN_CLIP, UNET, VAE, XL_CLIP, XL_OPEN_CLIP

Shapes = Mapping[str, tuple[int, ...]]
SETTINGS = "diffusion_dpo.settings"
"""The entry of a header in which `export` says what the shapes do not."""
GENERATIONS = {"v1": "Stable Diffusion 1.x", "v2": "Stable Diffusion 2.x", "xl": "SDXL"}
_GROUPS = 32
_HEADS_OF_V1 = 8
_HEAD_WIDTH = 64
_LAYERS_OF_VIT_H = 24
"""Of Stable Diffusion 2's text encoder; what the last one computes is not used."""
_SIDES = {"v1": 64, "v2": 96, "xl": 128}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
_DRAWN_BY: dict[str, tuple[str, dict[str, Any]]] = {
    "v1": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "v2": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "xl": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
}
"""The scheduler that each family's pipeline on the hub has."""


def generation_of(shapes: Shapes) -> str | None:
    """Return `v1`, `v2` or `xl` by the text encoders that a checkpoint holds; None where they are no family's."""
    for prefix, kind in ((XL_OPEN_CLIP, "xl"), (OPEN_CLIP, "v2"), (CLIP, "v1")):
        if any(key.startswith(prefix) for key in shapes):
            return None if kind == "xl" and not any(key.startswith(XL_CLIP) for key in shapes) else kind
    return None


def infer(name: str, kind: str, shapes: Shapes, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of every part, as a folder of diffusers has them, and notes on what was assumed.

    Raises ConfigError where the shapes are those of no Stable Diffusion.
    """
    try:
        texts = _texts(kind, shapes)
        unet, vae = _unet(kind, shapes, texts), _vae(kind, shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"{name} looks like a checkpoint of {GENERATIONS[kind]}, but its layers are not laid out as one ({error})"
        ) from error
    for part, settings in (("UNet", unet), ("VAE", vae)):
        if odd := [width for width in settings["block_out_channels"] if width % _GROUPS]:
            raise ConfigError(
                f"the {part} of {name} has layers of width {odd[0]}, as no {GENERATIONS[kind]} has: how its norms and "
                "heads are divided cannot be known; convert it with a script that knows, and give the diffusers folder"
            )
    scheduler_class, own = _DRAWN_BY[kind]
    prediction, is_known = _prediction(kind, shapes, metadata)
    scheduler = {**_BETAS, "steps_offset": 1, **own, "prediction_type": prediction}
    if any(key.endswith("ztsnr") for key in shapes):  # noise to the very end, which Euler can draw from
        scheduler_class = "EulerDiscreteScheduler"
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if kind == "v2" and prediction == "epsilon":
        unet["sample_size"] = _SIDES["v1"]
    note = f"{name}: a single-file checkpoint of {GENERATIONS[kind]}; it predicts {prediction}"
    if not is_known:
        note += ", as its family does by default, since the file does not say; set prediction_type if it does not"
    found = {"unet": unet, "vae": vae, **texts}
    return found | {"scheduler": scheduler, "scheduler_class": scheduler_class, "note": note}


def written(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the settings that `export` wrote into the header, None without them."""
    try:
        found = json.loads(metadata.get(SETTINGS, "null"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _prediction(kind: str, shapes: Shapes, metadata: Mapping[str, str]) -> tuple[str, bool]:
    """Return what a model predicts, and whether the file says so: a tensor `v_pred`, or its metadata."""
    if any(key.endswith("v_pred") for key in shapes):
        return "v_prediction", True
    said = metadata.get("modelspec.prediction_type", "").lower()
    if said in ("v", "v_prediction", "epsilon"):
        return ("epsilon" if said == "epsilon" else "v_prediction"), True
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2"):
        return ("v_prediction" if "768-v" in architecture else "epsilon"), True
    return ("v_prediction" if kind == "v2" else "epsilon"), False


def _unet(kind: str, shapes: Shapes, texts: Mapping[str, Any]) -> dict[str, Any]:
    down = _levels(shapes, "input_blocks", first=1)
    up = _levels(shapes, "output_blocks", first=0)
    channels = [width for width, _ in down]
    depths = [_same(of_level) for _, of_level in down]
    (layers,) = {len(of_level) for _, of_level in down}
    middle = _depth(shapes, "middle_block.1")
    cross = next(shape[1] for key, shape in shapes.items() if key.startswith(UNET) and "attn2.to_k.weight" in key)
    first = next(shape for key, shape in shapes.items() if key.startswith(UNET) and key.endswith("1.proj_in.weight"))
    attends = [bool(depth) for depth in depths]
    settings: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": _SIDES[kind],
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if it else "DownBlock2D" for it in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if it else "UpBlock2D" for it in reversed(attends)],
        "transformer_layers_per_block": [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle],
        "attention_head_dim": _HEADS_OF_V1 if kind == "v1" else [_heads(width) for width in channels],
        "use_linear_projection": len(first) == 2,
        "cross_attention_dim": cross,
    }
    upwards = [_same(of_level) or 1 for _, of_level in up]
    if upwards != [depth or 1 for depth in reversed(depths)]:
        settings["reverse_transformer_layers_per_block"] = upwards
    added = shapes.get(f"{UNET}label_emb.0.0.weight")
    if added is not None:  # of SDXL alone
        pooled = texts["text_encoder_2"]["projection_dim"]
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (added[1] - pooled) // 6,
            "projection_class_embeddings_input_dim": added[1],
        }
    return settings


def _levels(shapes: Shapes, side: str, *, first: int) -> list[tuple[int, list[int]]]:
    """Return width and depths of the transformers of every level of a UNet, in the order of the file."""
    levels: list[tuple[int, list[int]]] = []
    width, depths, number = 0, [], first
    while f"{UNET}{side}.{number}.0.op.weight" in shapes or _out(shapes, f"{side}.{number}.0") is not None:
        out = _out(shapes, f"{side}.{number}.0")
        if out is not None:
            width = out
            depths.append(_depth(shapes, f"{side}.{number}.1"))
        resamples = f"{UNET}{side}.{number}.0.op.weight", *(f"{UNET}{side}.{number}.{i}.conv.weight" for i in (1, 2))
        if any(key in shapes for key in resamples):
            levels.append((width, depths))
            depths = []
        number += 1
    return [*levels, (width, depths)]


def _out(shapes: Shapes, block: str) -> int | None:
    shape = shapes.get(f"{UNET}{block}.out_layers.3.weight")
    return None if shape is None else shape[0]


def _depth(shapes: Shapes, block: str) -> int:
    """Return the number of transformer blocks that a place holds."""
    number = 0
    while f"{UNET}{block}.transformer_blocks.{number}.norm1.weight" in shapes:
        number += 1
    return number


def _same(values: list[int]) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _heads(width: int) -> int:
    if width % _HEAD_WIDTH:
        raise ValueError(f"a width of {width} is no multiple of {_HEAD_WIDTH}, the width of a head")
    return width // _HEAD_WIDTH


def _vae(kind: str, shapes: Shapes) -> dict[str, Any]:
    channels: list[int] = []
    layers = 0
    while (shape := shapes.get(f"{VAE}encoder.down.{len(channels)}.block.0.conv1.weight")) is not None:
        channels.append(shape[0])
    while f"{VAE}encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    latent = shapes[f"{VAE}decoder.conv_in.weight"][1]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes[f"{VAE}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{VAE}decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent,
        "use_quant_conv": f"{VAE}quant_conv.weight" in shapes,
        "use_post_quant_conv": f"{VAE}post_quant_conv.weight" in shapes,
        "scaling_factor": 0.13025 if kind == "xl" else 0.18215,
        "force_upcast": True,
        "sample_size": 512,
    }


def _texts(kind: str, shapes: Shapes) -> dict[str, dict[str, Any]]:
    if kind == "v1":
        return {"text_encoder": _clip(shapes, f"{CLIP}text_model.")}
    if kind == "v2":
        settings = _open_clip(shapes, OPEN_CLIP)
        if settings["num_hidden_layers"] == _LAYERS_OF_VIT_H:
            settings["num_hidden_layers"] -= 1
        return {"text_encoder": settings}
    return {
        "text_encoder": _clip(shapes, f"{XL_CLIP}text_model."),
        "text_encoder_2": _open_clip(shapes, XL_OPEN_CLIP),
    }


def _clip(shapes: Shapes, prefix: str) -> dict[str, Any]:
    layer = prefix + "encoder.layers.{}.mlp.fc1.weight"
    tokens, positions = (shapes[f"{prefix}embeddings.{it}_embedding.weight"] for it in ("token", "position"))
    return _text(shapes, layer, tokens, positions) | {"hidden_act": "quick_gelu"}


def _open_clip(shapes: Shapes, prefix: str) -> dict[str, Any]:
    layer = prefix + "transformer.resblocks.{}.mlp.c_fc.weight"
    settings = _text(shapes, layer, shapes[f"{prefix}token_embedding.weight"], shapes[f"{prefix}positional_embedding"])
    projected = shapes.get(f"{prefix}text_projection", (0, settings["hidden_size"]))[1]
    return settings | {"hidden_act": "gelu", "projection_dim": projected}


def _text(shapes: Shapes, layer: str, tokens: tuple[int, ...], positions: tuple[int, ...]) -> dict[str, Any]:
    number = 0
    while layer.format(number) in shapes:
        number += 1
    return {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "projection_dim": tokens[1],
        "intermediate_size": shapes[layer.format(0)][0],
        "num_hidden_layers": number,
        "num_attention_heads": _heads(tokens[1]),
        "max_position_embeddings": positions[0],
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in the hub's files: transformers then takes the token of the highest number
        "pad_token_id": 1,
    }
