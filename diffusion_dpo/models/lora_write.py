"""A LoRA as diffusers names it, written so that every reader computes the same, with alpha = rank."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.models.lora_file import Layers, LoraLayer
from diffusion_dpo.models.safetensors_file import write_safetensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LORA_FILE = "pytorch_lora_weights.safetensors"


def write_lora(file: Path, layers: Layers, dtype: "torch.dtype", header: Mapping[str, str] | None = None) -> None:
    """Write a LoRA for `load_lora_weights`; equal weights give equal bytes.

    The strength s goes into B: diffusers 0.31 and 0.32 do not read the header, the only place where such a file says
    alpha, and take the rank for it.
    """
    weights: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, of_part in layers.items():
        for path, layer in of_part.items():
            key = f"{part}.{path if part == 'unet' else text_path(path)}"
            weights |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up * layer.scale}
            if layer.magnitude is not None:
                weights[f"{key}.lora_magnitude_vector"] = layer.magnitude
            if layer.bias is not None:
                weights[f"{key}.lora_B.bias"] = layer.bias * layer.scale
        settings |= {f"{part}.{key}": value for key, value in _peft_settings(part, of_part).items()}
    said = {"lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    write_safetensors(file, packed(weights, dtype), {"format": "pt", **(header or {}), **said})


def _peft_settings(part: str, layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return the settings that tell peft the shape of a LoRA; those that are its defaults are left out.

    Older versions of peft refuse a setting that they do not know.
    """
    begin = "^" if part == "unet" else ""  # older versions of transformers put text_model. before a path
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    others = {f"{begin}{path}": layer.rank for path, layer in layers.items() if layer.rank != rank}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(layers),
    }
    if any(layer.magnitude is not None for layer in layers.values()):
        settings["use_dora"] = True
    if any(layer.bias is not None for layer in layers.values()):
        settings["lora_bias"] = True
    return settings


def text_path(path: str) -> str:
    """Return a path in a text encoder as transformers wrote it before version 5.6, and as all other programs do."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def packed(weights: "Mapping[str, Tensor]", dtype: "torch.dtype") -> "dict[str, Tensor]":
    """Return what a file holds: on the CPU, contiguous, in its number format; an alpha keeps all of its digits."""
    return {
        key: value.detach().to("cpu", value.dtype if key.endswith(".alpha") else dtype).contiguous()
        for key, value in weights.items()
    }
