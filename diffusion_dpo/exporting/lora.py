"""A LoRA under the names of kohya, which keep A, B and alpha; the latter is s r, times the strength that is asked for.

All layers of a part get one alpha. Where theirs differ, the most frequent one is written, and the rest of s goes into
B: diffusers (0.42.1) finds the alpha of an attention layer under another name than the layer, drops it, and takes the
most frequent one instead.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.lora_file import Layers, LoraLayer
from diffusion_dpo.models.lora_write import packed, text_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    return packed(weights, dtype)


def common_alpha(layers: Mapping[str, LoraLayer]) -> float:
    """Return the most frequent alpha that is not 0: that of all layers of a part in kohya's names."""
    alphas = Counter(layer.alpha for layer in layers.values() if layer.alpha)
    return alphas.most_common(1)[0][0] if alphas else 1.0


def whole(number: float) -> float | int:
    """Return a number as an int where it is one."""
    return int(number) if number == int(number) else number
