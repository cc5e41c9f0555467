"""A LoRA, layer by layer, under the names of diffusers and of kohya.

A layer computes W x + s B A x; s is alpha / r, times the strength that was asked for. Both formats keep A, B and
alpha, which is written as s r: patterns of ranks and alphas, rank-stabilised LoRAs and strengths come out exactly.

In kohya's names all layers of a part get one alpha. Where theirs differ, the most frequent one is written, and the
rest of s goes into B: diffusers (0.42.1) finds the alpha of an attention layer under another name than the layer,
drops it, and takes the most frequent one instead.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.exporting.facts import read_facts

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

PARTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraWeights:
    """What was added to one layer."""

    down: "Tensor"
    """A, of shape (r, in) or (r, in, k, k)."""
    up: "Tensor"
    """B, of shape (out, r) or (out, r, 1, 1)."""
    alpha: float
    """s r: the alpha that, with this rank, gives the strength."""
    magnitude: "Tensor | None"
    """DoRA's magnitude (arXiv 2402.09353), one number per output."""
    bias: "Tensor | None"
    """A bias of B."""

    @property
    def rank(self) -> int:
        """R of the layer."""
        return len(self.down)


Layers = Mapping[str, Mapping[str, LoraWeights]]
"""The layers of a LoRA, by part of the pipeline and by path within it."""


def read_layers(pipeline: "DiffusionPipeline", name: str) -> dict[str, dict[str, LoraWeights]]:
    """Return the layers of the LoRA `name` that lies on a pipeline, at the strength that is set."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for part in PARTS:
        model = pipeline.components.get(part)
        modules = [] if model is None else model.named_modules()
        layers = {
            path: _read(module, name)
            for path, module in modules
            if isinstance(module, LoraLayer) and name in module.lora_A
        }
        if layers:
            found[part] = layers
    return found


def _read(module: Any, name: str) -> LoraWeights:
    down, up = module.lora_A[name].weight.detach(), module.lora_B[name]
    has_magnitude = name in module.lora_magnitude_vector
    return LoraWeights(
        down=down,
        up=up.weight.detach(),
        alpha=float(module.scaling[name] * len(down)),
        magnitude=module.lora_magnitude_vector[name].weight.detach() if has_magnitude else None,
        bias=None if up.bias is None else up.bias.detach(),
    )


def require_complete(file: Path, layers: Layers) -> None:
    """Raise ConfigError unless every layer of a LoRA file found one of the model, with finite weights."""
    num_found = sum(len(of_part) for of_part in layers.values())
    num_there = len(read_facts(file).ranks)
    if num_found < num_there:
        raise ConfigError(
            f"{num_there - num_found} of the {num_there} layers of {file} find none in the model; was it trained on "
            "another one?"
        )
    for part, of_part in layers.items():
        for path, layer in of_part.items():
            if not (layer.down.isfinite().all() and layer.up.isfinite().all()):
                raise ConfigError(f"{file} holds NaN or infinite weights, for {part}.{path}; it is broken")


def as_diffusers(layers: Layers, dtype: "torch.dtype") -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """Return the weights as diffusers names them, and peft's settings of every part, as `lora_adapter_metadata` is."""
    weights: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, of_part in layers.items():
        for path, layer in of_part.items():
            key = f"{part}.{path if part == 'unet' else text_path(path)}"
            weights |= {f"{key}.lora_A.weight": layer.down, f"{key}.lora_B.weight": layer.up}
            if layer.magnitude is not None:
                weights[f"{key}.lora_magnitude_vector"] = layer.magnitude
            if layer.bias is not None:
                weights[f"{key}.lora_B.bias"] = layer.bias
        settings |= {f"{part}.{key}": value for key, value in _peft_settings(part, of_part).items()}
    return _pack(weights, dtype), settings


def _peft_settings(part: str, layers: Mapping[str, LoraWeights]) -> dict[str, Any]:
    from peft import LoraConfig

    begin = "^" if part == "unet" else ""  # older versions of transformers put text_model. before a path
    rank, _ = Counter(layer.rank for layer in layers.values()).most_common(1)[0]
    alpha = common_alpha(layers)
    settings = LoraConfig(
        r=rank,
        lora_alpha=whole(alpha),
        rank_pattern={f"{begin}{path}": layer.rank for path, layer in layers.items() if layer.rank != rank},
        alpha_pattern={f"{begin}{path}": whole(layer.alpha) for path, layer in layers.items() if layer.alpha != alpha},
        target_modules=sorted(layers),
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        lora_bias=any(layer.bias is not None for layer in layers.values()),
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def as_kohya(layers: Layers, dtype: "torch.dtype", *, two_encoders: bool) -> dict[str, "Tensor"]:
    """Return the weights as kohya names them: `lora_unet_<path>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    Raises ConfigError for what these names have no place for.
    """
    import torch

    weights: dict[str, Tensor] = {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if two_encoders else "lora_te"}
    for part, of_part in layers.items():
        alpha = common_alpha(of_part)
        for path, layer in of_part.items():
            if layer.magnitude is not None or layer.bias is not None:
                what = "a DoRA" if layer.magnitude is not None else "a LoRA with biases"
                raise ConfigError(
                    f"this is {what} ({part}.{path}), which programs that read kohya's names do not compute as peft "
                    "does; format=diffusers keeps it as it is, and a DoRA can be merged (format=merged, single_file)"
                )
            whole_path = path if part == "unet" else text_path(path)
            key = f"{prefixes.get(part, 'lora_te2')}_{whole_path.replace('.', '_')}"
            weights |= {
                f"{key}.lora_down.weight": layer.down,
                f"{key}.lora_up.weight": layer.up * (layer.alpha / alpha),
            }
            weights[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return _pack(weights, dtype)


def common_alpha(layers: Mapping[str, LoraWeights]) -> float:
    """Return the most frequent alpha that is not 0: that of all layers of a part in kohya's names."""
    alphas = Counter(layer.alpha for layer in layers.values() if layer.alpha)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def text_path(path: str) -> str:
    """Return a path in a text encoder as transformers wrote it before version 5.6, and as all other programs do."""
    return path if path.startswith(("text_model.", "text_projection")) else f"text_model.{path}"


def whole(number: float) -> float | int:
    """Return a number as an int where it is one."""
    return int(number) if number == int(number) else number


def _pack(weights: Mapping[str, "Tensor"], dtype: "torch.dtype") -> dict[str, "Tensor"]:
    """Return what a file holds: on the CPU, contiguous, in its number format; an alpha keeps all of its digits."""
    return {
        key: value.to("cpu", value.dtype if key.endswith(".alpha") else dtype).contiguous()
        for key, value in weights.items()
    }
