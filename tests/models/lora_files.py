"""LoRA files as the programs of the field write them, each with the arithmetic that its tensors say."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


def targets(model: nn.Module, *ends: str) -> dict[str, nn.Module]:
    """The layers of a model whose paths end so, in its order."""
    kinds = (nn.Linear, nn.Conv2d)
    return {
        path: module for path, module in model.named_modules() if isinstance(module, kinds) and path.endswith(ends)
    }


def factors(module: nn.Module, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer, random."""
    generator = torch.Generator().manual_seed(seed)
    shape = module.weight.shape
    ones = (1,) * (len(shape) - 2)
    down = torch.randn(rank, *shape[1:], generator=generator) * 0.3
    return down, torch.randn(shape[0], rank, *ones, generator=generator) * 0.3


def product(up: Tensor, down: Tensor, scale: float) -> Tensor:
    """The arithmetic of a LoRA: s B A, in the shape of the layer's weight."""
    return (scale * (up.flatten(1).double() @ down.flatten(1).double())).view(len(up), *down.shape[1:]).float()


def kohya(prefix: str, path: str) -> str:
    return prefix + path.replace(".", "_")


def processor(path: str) -> str:
    """Diffusers' name of 2023: the layer within the attention's processor."""
    block, _, layer = path.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{layer}_lora"


SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "kohya": (lambda path: kohya("lora_unet_", path), ".lora_down.weight", ".lora_up.weight"),
    "lycoris": (lambda path: kohya("lycoris_", path), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (lambda path: f"unet.{path}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers of 2024": (lambda path: f"unet.{path}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers of 2023": (lambda path: f"unet.{processor(path)}", ".down.weight", ".up.weight"),
    "diffusers of 2023, bare": (processor, ".down.weight", ".up.weight"),
    "peft": (lambda path: f"base_model.model.{path}", ".lora_A.weight", ".lora_B.weight"),
    "peft with an adapter's name": (
        lambda path: f"base_model.model.{path}",
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
    "bare": (lambda path: path, ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI": (lambda path: f"diffusion_model.{path}", ".lora_A.weight", ".lora_B.weight"),
    "OneTrainer": (lambda path: f"unet.{path}", ".lora_down.weight", ".lora_up.weight"),
}
"""The name of a layer, and the endings of A and B, by program."""


def plain(
    model: nn.Module, ends: tuple[str, ...], spelling: str = "kohya", *, rank: int = 2
) -> tuple[Weights, Weights]:
    """A plain LoRA without alphas in a spelling, and what it adds to each layer."""
    name, down_end, up_end = SPELLINGS[spelling]
    weights: Weights = {}
    deltas: Weights = {}
    for seed, (path, module) in enumerate(targets(model, *ends).items()):
        down, up = factors(module, rank, seed)
        weights |= {f"{name(path)}{down_end}": down, f"{name(path)}{up_end}": up}
        deltas[path] = product(up, down, 1.0)
    return weights, deltas


def with_alphas(
    model: nn.Module,
    ends: tuple[str, ...],
    alpha: Callable[[int], float | None],
    rank: Callable[[int], int] = lambda _: 2,
) -> tuple[Weights, Weights]:
    """A LoRA in kohya's names whose k-th layer has an alpha (None: says none) and a rank, and what it adds."""
    weights: Weights = {}
    deltas: Weights = {}
    for k, (path, module) in enumerate(targets(model, *ends).items()):
        (down, up), key, value = factors(module, rank(k), k), kohya("lora_unet_", path), alpha(k)
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if value is not None:
            weights[f"{key}.alpha"] = torch.tensor(float(value))
        deltas[path] = product(up, down, 1.0 if value is None else value / rank(k))
    return weights, deltas


def tucker(model: nn.Module, ends: tuple[str, ...]) -> tuple[Weights, Weights]:
    """Convolutions in LyCORIS' Tucker form, alpha 3 at rank 2 on the input's side, and what they add."""
    weights: Weights = {}
    deltas: Weights = {}
    for seed, (path, module) in enumerate(targets(model, *ends).items()):
        generator, key = torch.Generator().manual_seed(seed), kohya("lora_unet_", path)
        out, into, *kernel = module.weight.shape
        down, mid = torch.randn(2, into, 1, 1, generator=generator), torch.randn(3, 2, *kernel, generator=generator)
        up = torch.randn(out, 3, 1, 1, generator=generator)
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_mid.weight": mid, f"{key}.lora_up.weight": up}
        weights[f"{key}.alpha"] = torch.tensor(3.0)
        core = torch.einsum("oi,ijhw->ojhw", up[:, :, 0, 0].double(), mid.double())
        deltas[path] = (3 / 2 * torch.einsum("ojhw,jn->onhw", core, down[:, :, 0, 0].double())).float()
    return weights, deltas


def save(folder: Path, weights: Mapping[str, Tensor], name: str = "x.safetensors", **metadata: Any) -> Path:
    """Write a file; metadata that is no text becomes JSON."""
    header = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / name, metadata=header or None)
    return folder / name
