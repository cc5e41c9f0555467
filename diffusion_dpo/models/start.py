"""The adapter that training starts from: part of the reference, trained on, and contained in the result."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import AdapterKind, find_adapter, replace_unet
from diffusion_dpo.models.lora_file import Layers, LoraLayer, place, read_lora, recognise
from diffusion_dpo.models.lora_layers import parts_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn


@dataclass(frozen=True)
class Start:
    """What training starts from beside the pretrained model; by default nothing."""

    unet: Mapping[str, LoraLayer] = field(default_factory=dict)
    """A LoRA's layers of the UNet, by path."""
    text_encoders: Layers = field(default_factory=dict)
    """What the LoRA has for the text encoders; it encodes the prompts and stays as it is."""
    kind: AdapterKind | None = None
    """Of a whole UNet nothing is held here: it is the pipeline's."""

    @classmethod
    def of(cls, path: Path | None, pipeline: "DiffusionPipeline") -> "Start":
        """Read a LoRA, or put a whole UNet into the pipeline; raises ConfigError where it cannot be had or used."""
        if path is None:
            return cls()
        kind, where = find_adapter(path)
        if kind == "unet":
            replace_unet(pipeline, where)
            return cls(kind="unet")
        return cls.of_lora(where, parts_of(pipeline))

    @classmethod
    def of_lora(cls, file: Path, models: "Mapping[str, nn.Module]") -> "Start":
        """Read a LoRA for the parts of a pipeline; raises ConfigError where it does not fit them."""
        layers = place(read_lora(file), models)
        return cls(layers.pop("unet", {}), layers, "lora")

    def lost(self, *, is_lora: bool) -> str:
        """Say why the pretrained model cannot be asked during training of a LoRA, or not one; "" where it can."""
        if self.kind == "unet":
            return "training starts from a whole UNet, which takes the place of the pretrained one"
        if self.unet and not is_lora:
            return "the LoRA that training starts from is part of the weights that are trained"
        if self.text_encoders:
            return "the LoRA that training starts from encodes the prompts, too"
        return ""

    def facts(self, part: str) -> list[Any]:
        """Return hashes of what acts on a part (text_encoder: on both encoders); nothing where nothing does."""
        layers = {"unet": self.unet} if part == "unet" else self.text_encoders
        return [f"{name}.{path} {_digest(layer)}" for name, of in layers.items() for path, layer in sorted(of.items())]


def refuse_start(path: Path, *, whole_unet: bool) -> None:
    """Raise ConfigError where training cannot start from an adapter; reads its header alone.

    `whole_unet`: all weights of the UNet are trained, not a LoRA.
    """
    kind, where = find_adapter(path)
    if kind == "unet":
        return
    facts = recognise(where)
    merged = "merge it first (export format=merged) and give that folder as model.pretrained"
    if not facts.is_plain:
        raise ConfigError(f"{where} is a DoRA, or has biases, and training starts from plain LoRAs alone; {merged}")
    if whole_unet and set(facts.parts.values()) != {"unet"}:
        raise ConfigError(
            f"{where} has layers for the text encoder, which a whole UNet (model.lora=null) cannot keep; train a "
            f"LoRA, or {merged}"
        )


def _digest(layer: LoraLayer) -> str:
    import hashlib

    digest = hashlib.blake2b(repr(layer.scale).encode(), digest_size=16)
    for tensor in (layer.down, layer.up):
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
