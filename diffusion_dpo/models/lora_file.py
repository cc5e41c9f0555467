"""The one reader of LoRA files: what a file is, and A, B and the strength of each layer exactly as its tensors say.

A LoRA (arXiv 2106.09685) adds s B A to the weight of a layer, of rank r and with s = alpha / r. Files say alpha in a
tensor of each layer (kohya), in their header (diffusers), in a file beside them (peft), or not at all: then it is r.
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.models.lora_names import (
    Role,
    find,
    is_bundled,
    naming_of,
    other_family,
    other_kind,
    part_of,
    role_of,
    spellings,
)
from diffusion_dpo.models.safetensors_file import FileFacts, other_model, read_facts, shown

if TYPE_CHECKING:
    from torch import Tensor, nn

PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""What peft's `save_pretrained` writes: the weights, and the settings beside them, alpha among them."""
PARTS = ("unet", "text_encoder", "text_encoder_2")
_MERGE = (
    "merge it into its base with the program that made it, or with ComfyUI, and give the merged model as pretrained"
)


@dataclass(frozen=True)
class LoraLayer:
    """What is added to one layer, float32."""

    down: "Tensor"
    """A, of shape (r, in) or (r, in, k, k)."""
    up: "Tensor"
    """B, of shape (out, r) or (out, r, 1, 1)."""
    alpha: float
    """s r: the alpha that, with this rank, gives the strength."""
    magnitude: "Tensor | None" = None
    """DoRA's magnitude (arXiv 2402.09353), one number per output."""
    bias: "Tensor | None" = None
    """A bias of B, which s multiplies, too."""

    @property
    def rank(self) -> int:
        """R of the layer."""
        return len(self.down)

    @property
    def scale(self) -> float:
        """S, by which B A is multiplied."""
        return self.alpha / self.rank

    def delta(self) -> "Tensor":
        """Return s B A, of shape (out, in) or (out, in, k, k)."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scale * product.view(len(self.up), *self.down.shape[1:])


Layers = Mapping[str, Mapping[str, LoraLayer]]
"""The layers of a LoRA, by part of the pipeline and by path within it."""


@dataclass(frozen=True)
class LoraFacts:
    """What the names and shapes in a LoRA file say, before any weight is read."""

    file: Path
    facts: FileFacts
    tensors: Mapping[str, Mapping[Role, str]]
    """The name of each tensor, by layer as the file spells it and by what it is."""
    embeddings: tuple[str, ...] = ()
    """The names of embeddings that were bundled with it, which are left out."""

    @property
    def naming(self) -> str:
        """Whose names the layers have."""
        return naming_of(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer, by the layer's name in the file."""
        return {layer: self.facts.shapes[roles["down"]][0] for layer, roles in self.tensors.items()}

    @property
    def family(self) -> str:
        """The family that the width of the text embeddings tells, in words."""
        return self.facts.family or "an unknown family"

    @property
    def parts(self) -> dict[str, str]:
        """The part of the pipeline that each layer is for, by its name in the file; the UNet where it does not say."""
        found = {}
        for layer in self.tensors:
            part, path = part_of(layer)
            found[layer] = part or ("text_encoder" if path.startswith(("text_model", "encoder")) else "unet")
        return found

    @property
    def without_alpha(self) -> list[str]:
        """The layers whose alpha nothing says; it is taken to be the rank, as all programs do."""
        if "lora_adapter_metadata" in self.facts.metadata or settings_beside(self.file) is not None:
            return []
        return [layer for layer, roles in self.tensors.items() if "alpha" not in roles]

    @property
    def is_plain(self) -> bool:
        """Whether all of it are products B A, without DoRA's magnitudes and without biases."""
        return not any(roles.keys() & {"magnitude", "bias"} for roles in self.tensors.values())


def settings_beside(file: Path) -> Path | None:
    """Return the file of peft's settings that belongs to a LoRA file, if it has one."""
    beside = file.parent / PEFT_SETTINGS
    return beside if file.name == PEFT_FILE and beside.is_file() else None


def recognise(file: Path) -> LoraFacts:
    """Return what a LoRA file holds; reads its header alone.

    Raises ConfigError, saying what it is and what helps, when it is no LoRA of B A on a UNet or a CLIP, or not whole.
    """
    facts = read_facts(file)
    names = [key for key in facts.shapes if not is_bundled(key)]
    if family := other_family(names):
        raise ConfigError(
            f"{file} is a LoRA for {family}, not for a UNet of Stable Diffusion, which is what is tuned here"
        )
    tensors: dict[str, dict[Role, str]] = {}
    unknown = []
    for key in names:
        found = role_of(key)
        if found is None:
            unknown.append(key)
            continue
        layer, role = found
        if role in tensors.setdefault(layer, {}):
            raise ConfigError(f"{file} holds two {role} weights for {shown(layer)}; it is broken")
        tensors[layer][role] = key
    _refuse_other_kinds(file, facts, unknown, num_plain=sum("down" in roles for roles in tensors.values()))
    for layer, roles in tensors.items():
        if not {"down", "up"} <= roles.keys():
            raise ConfigError(
                f"{file} has {', '.join(sorted(roles))} for {shown(layer)}, without the rest of it; the file is broken"
            )
        if any(len(facts.shapes[roles[role]]) not in (2, 4) for role in ("down", "up")):
            raise ConfigError(f"{file} has weights of another shape than a layer's for {shown(layer)}; it is broken")
    embeddings = {key.split(".")[1] for key in facts.shapes if is_bundled(key)}
    return LoraFacts(file, facts, tensors, tuple(sorted(embeddings)))


def _refuse_other_kinds(file: Path, facts: FileFacts, unknown: list[str], *, num_plain: int) -> None:
    if facts.is_checkpoint:
        raise ConfigError(f"{file} is a whole checkpoint, not a LoRA; give it as pretrained, without an adapter_path")
    if {"conv_in.weight", "conv_out.weight"} <= facts.shapes.keys():
        raise ConfigError(f"{file} holds the weights of a whole UNet; give its folder, which has a config.json, too")
    for kind in dict.fromkeys(filter(None, map(other_kind, unknown))):
        beside = f" beside {num_plain} plain layers" if num_plain and "DoRA" not in kind else ""
        raise ConfigError(f"{file} holds {kind}{beside}, which diffusers and diffusion-dpo do not compute; {_MERGE}")
    if unknown and num_plain:
        raise ConfigError(
            f"{file} holds {shown(unknown[0])} beside {num_plain} layers of a LoRA, which is not known here"
        )
    if unknown and (what := other_model(unknown)):
        raise ConfigError(f"{file} is {what}; a LoRA or a whole UNet is needed as adapter_path")
    if unknown:
        raise ConfigError(f"{file} is no LoRA and no checkpoint: it holds {shown(unknown[0])}")
    if not facts.shapes:
        raise ConfigError(f"{file} is no LoRA and no checkpoint: it holds no tensors")
    if all(map(is_bundled, facts.shapes)):
        raise ConfigError(f"{file} holds embeddings and no layers of a LoRA")


@dataclass(frozen=True)
class Lora:
    """A LoRA file, read."""

    facts: LoraFacts
    layers: Mapping[str, LoraLayer]
    """By the layer's name in the file."""


def read_lora(file: Path) -> Lora:
    """Read a LoRA file; raises ConfigError when it is none, is broken, or is of a kind that is not computed here."""
    from safetensors import SafetensorError, safe_open

    facts = recognise(file)
    if facts.embeddings:
        warn(f"{file} bundles the embedding {', '.join(map(shown, facts.embeddings))}, which is left out")
    strengths = _Strengths.of(facts)
    try:
        with safe_open(file, framework="pt") as opened:
            layers = {
                layer: _layer(file, layer, {role: opened.get_tensor(key) for role, key in roles.items()}, strengths)
                for layer, roles in facts.tensors.items()
            }
    except (OSError, SafetensorError, re.error) as error:
        raise ConfigError(f"cannot read the LoRA {file}: {error}") from error
    return Lora(facts, layers)


def _layer(file: Path, name: str, tensors: "dict[Role, Tensor]", strengths: "_Strengths") -> LoraLayer:
    import torch

    for role, tensor in tensors.items():
        if not tensor.is_floating_point():
            if role != "alpha":
                raise ConfigError(
                    f"{file} has quantised weights ({tensor.dtype}) for {shown(name)}; get it unquantised"
                )
        elif not tensor.float().isfinite().all():
            raise ConfigError(f"{file} holds NaN or infinite weights, for {shown(name)}; it is broken")
    down, up = tensors["down"].float(), tensors["up"].float()
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        raise ConfigError(f"{file} has an alpha of more than one number for {shown(name)}; it is broken")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else strengths.of_layer(name, len(down))
    if "mid" in tensors:  # Tucker: the core goes into A, which leaves a convolution and a 1 x 1 one
        if up.shape[1] != len(tensors["mid"]) or tensors["mid"].shape[1] != len(down):
            raise ConfigError(f"{file} has weights for {shown(name)} whose ranks differ; it is broken")
        down = torch.einsum("ijkl,jm->imkl", tensors["mid"].float(), down.flatten(1))
        alpha *= up.shape[1] / len(tensors["down"])
    elif up.shape[1] != len(down):
        raise ConfigError(f"{file} has ranks of {len(down)} and {up.shape[1]} for {shown(name)}; it is broken")
    magnitude = tensors["magnitude"].float().flatten() if "magnitude" in tensors else None
    return LoraLayer(down, up, alpha, magnitude, tensors["bias"].float() if "bias" in tensors else None)


@dataclass(frozen=True)
class _Strengths:
    """The alphas that peft's settings say, in the header of a file or in the file beside it."""

    settings: Mapping[str, Mapping[str, Any]]
    """By part of the pipeline; "" for all of them."""

    @classmethod
    def of(cls, facts: LoraFacts) -> "_Strengths":
        beside = settings_beside(facts.file)
        text, where = facts.facts.metadata.get("lora_adapter_metadata"), str(facts.file)
        try:
            if beside is not None:
                text, where = None, str(beside)
                return cls({"": _require_lora(beside, json.loads(beside.read_text(encoding="utf-8")))})
            by_part: dict[str, dict[str, Any]] = {}
            for key, value in json.loads(text or "{}").items():
                part, _, name = key.partition(".")
                by_part.setdefault(part, {})[name] = value
            return cls(by_part)
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"the LoRA settings of {where} cannot be read: {error}") from error

    def of_layer(self, layer: str, rank: int) -> float:
        """Return the alpha of a layer; by default its rank."""
        part, path = part_of(layer)
        settings = self.settings.get("") or self.settings.get(part or "unet") or {}
        alpha = _pattern(settings.get("alpha_pattern") or {}, path, settings.get("lora_alpha", rank))
        return float(alpha) * (rank**0.5 if settings.get("use_rslora") else 1.0)


def _require_lora(file: Path, settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds no settings of peft")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(
            f"{file.parent} holds a {shown(str(kind))} of peft, not a LoRA, and is not read here: {_MERGE}"
        )
    return settings


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """Return the value that peft takes for a layer: that of the first pattern which its path ends with.

    The patterns are those of a file, hundreds for hundreds of layers, so peft's own `get_pattern_key`, which has each
    compiled again for each layer, would take a minute.
    """
    return next((value for pattern, value in patterns.items() if _ending(pattern).match(path)), default)


@functools.cache
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def place(lora: Lora, models: "Mapping[str, nn.Module]") -> dict[str, dict[str, LoraLayer]]:
    """Return a LoRA's layers by the parts of a pipeline that they are for, and by path within each.

    Raises ConfigError where a layer finds none in the model, or one of another shape.
    """
    spelled = {part: spellings(part, models[part]) for part in PARTS if part in models}
    placed: dict[str, dict[str, LoraLayer]] = {}
    lost = []
    for name, layer in lora.layers.items():
        said, path = part_of(name)
        found = [(part, find(spelled[part], path)) for part in ([said] if said else PARTS) if part in spelled]
        part, where = next((it for it in found if it[1] is not None), ("", None))
        if where is None:
            lost.append(name)
            continue
        if where in placed.setdefault(part, {}):
            raise ConfigError(f"{lora.facts.file} has two layers for {part}.{where}; it is broken")
        placed[part][where] = _shaped(lora, name, layer, models[part].get_submodule(where))
    if lost:
        raise ConfigError(
            f"the LoRA {lora.facts.file} does not fit this model: {len(lost)} of its {len(lora.layers)} layers find "
            f"none in it, e.g. {shown(lost[0])}; was it trained on another family?"
        )
    for part, layers in placed.items():
        if 0 < sum(layer.magnitude is not None for layer in layers.values()) < len(layers):
            raise ConfigError(
                f"{lora.facts.file} is a DoRA on some layers of the {part} and a LoRA on others; {_MERGE}"
            )
    return {part: placed[part] for part in PARTS if part in placed}


def _shaped(lora: Lora, name: str, layer: LoraLayer, module: Any) -> LoraLayer:
    """Return a layer's weights in the dimensions of the module; a 1 x 1 convolution is a linear layer."""
    weight = module.weight
    kernel = tuple(weight.shape[2:])
    down, up = layer.down, layer.up
    fits = down.flatten(1).shape[1] == weight[0].numel() and up.flatten(1).shape == (len(weight), layer.rank)
    if not fits or (down.ndim == 4 and tuple(down.shape[2:]) != (kernel or (1, 1))):
        made_for = lora.facts.facts.family
        raise ConfigError(
            f"the LoRA {lora.facts.file} does not fit this model: {shown(name)} is {tuple(up.shape)} x "
            f"{tuple(down.shape)}, for a weight of {tuple(weight.shape)}; was it trained on another family"
            f"{f', {made_for}' if made_for else ''}?"
        )
    ones = (1,) * len(kernel)
    return LoraLayer(
        down.reshape(layer.rank, *weight.shape[1:]),
        up.reshape(len(weight), layer.rank, *ones),
        layer.alpha,
        None
        if layer.magnitude is None
        else layer.magnitude.reshape(1, len(weight), *ones)
        if kernel
        else layer.magnitude,
        layer.bias,
    )
