"""`export --check FILE`: what a file is, whether each of its layers finds its place, and what it changes."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
from diffusion_dpo.device import pick_device
from diffusion_dpo.exporting.adapter import load_single_file
from diffusion_dpo.exporting.facts import FileFacts, read_facts, shown, shown_metadata, span
from diffusion_dpo.exporting.lora import Layers, read_layers, require_complete, text_path
from diffusion_dpo.exporting.probe import Probe, changes, does_something
from diffusion_dpo.exporting.source import Base, find_base
from diffusion_dpo.models.adapters import AdapterKind, add_adapter, find_adapter, refuse_other_interface
from diffusion_dpo.models.pipeline import load_base
from diffusion_dpo.settings import CheckConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ALPHA_TOLERANCE = 1e-3
"""Relative: what a half-precision alpha is rounded by."""


def run(config: CheckConfig) -> None:
    """Say what a file is and does; raises ConfigError when it is broken, does not fit, or does nothing."""
    if not config.path.exists():
        raise ConfigError(f"there is no {config.path}")
    base = find_base(config.path, config.pretrained, config.revision, config.variant)
    if (config.path / "model_index.json").exists():
        _check_pipeline(config, base)
        return
    facts = read_facts(config.path) if config.path.is_file() else None
    if facts is not None and facts.is_checkpoint:
        say(f"{config.path}: a single-file checkpoint of {len(facts.shapes)} tensors, for {facts.family}")
        _say_metadata(facts)
        _check_checkpoint(config, base)
        return
    kind, where = find_adapter(config.path)
    if kind == "lora":
        facts = read_facts(where)
        _describe_lora(where, facts)
    else:
        say(f"{where}: a whole UNet, in the place of the base's")
    if base is None:
        say("give pretrained=..., the model that it was made for, to see whether it fits and what it changes")
        return
    _check_adapter(config, kind, where, facts, base)


def _describe_lora(file: Path, facts: FileFacts) -> None:
    if not facts.is_lora:
        first = next(iter(facts.shapes), None)
        raise ConfigError(f"{file} is no LoRA and no checkpoint: it holds {shown(first) if first else 'no tensors'}")
    ranks = facts.ranks
    parts = Counter(_part(name) for name in ranks)
    where = ", ".join(f"{count} of the {part}" for part, count in sorted(parts.items(), reverse=True))
    say(
        f"{file}: a LoRA in {facts.naming} naming, for {facts.family}; {len(ranks)} layers: {where}; "
        f"rank {span(ranks)}"
    )
    _say_metadata(facts)
    if facts.naming == "transformer":
        raise ConfigError(f"{file} is for a model with a transformer (Flux, Stable Diffusion 3, ...), not for a UNet")
    if facts.naming == "peft":
        raise ConfigError(
            f"{file} has the names that peft gives to a bare model, without unet. in front: diffusers, ComfyUI and "
            "A1111 find none of its layers. Save it with save_lora_weights of its diffusers pipeline"
        )


def _part(name: str) -> str:
    if name.startswith(("lora_te2_", "text_encoder_2.")):
        return "second text encoder"
    return "text encoder" if name.startswith(("lora_te", "text_encoder.")) else "UNet"


def _say_metadata(facts: FileFacts) -> None:
    for line in shown_metadata(facts.metadata) or ["no metadata that programs show (ss_*, modelspec.*)"]:
        say(f"  {line}")


def _load(config: CheckConfig, base: Base) -> "DiffusionPipeline":
    import torch

    device = pick_device(config.device)
    return load_base(base.pretrained, revision=base.revision, variant=base.variant, device=device, dtype=torch.float32)


def _check_adapter(config: CheckConfig, kind: AdapterKind, where: Path, facts: FileFacts | None, base: Base) -> None:
    pipeline = _load(config, base)
    probe = Probe.of(pipeline)
    before = probe.ask(pipeline)
    add_adapter(pipeline, where)
    if kind == "lora":
        assert facts is not None
        layers = read_layers(pipeline, "adapter")
        require_complete(where, layers)
        _say_targets(layers)
        _check_alpha(where, facts, layers)
    _say_changes(where, changes(before, probe.ask(pipeline)), base)


def _say_targets(layers: Layers) -> None:
    targets = sorted({path.removesuffix(".0").rpartition(".")[2] for of_part in layers.values() for path in of_part})
    say(f"every layer finds its place; they are on {', '.join(targets)}")


def _check_alpha(file: Path, facts: FileFacts, layers: Layers) -> None:
    loaded = {f"{part}.{path}": layer.alpha for part, of_part in layers.items() for path, layer in of_part.items()}
    written = _written_alphas(file, layers)
    if not written and "lora_adapter_metadata" not in facts.metadata:
        warn("the file does not say its alpha; programs take the rank, and if it was another, the strength is wrong")
    say(f"alpha {span(written or loaded)}")
    claimed = facts.metadata.get("ss_network_alpha", "")
    if _is_number(claimed) and any(f"{value:g}" != f"{float(claimed):g}" for value in written.values()):
        warn(f"the header says alpha {shown(claimed)}, the weights {span(written)}; programs go by the weights")
    for name, value in written.items():
        if abs(loaded[name] - value) > _ALPHA_TOLERANCE * abs(value):
            warn(
                f"diffusers loads {name} with alpha {loaded[name]:g} instead of {value:g}, as it does where layers "
                "have different ones; ComfyUI and A1111 read each layer's own"
            )
            break


def _is_number(text: str) -> bool:
    """Whether a header's text is a number; where layers differ, or nobody said, it is Dynamic or None."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _written_alphas(file: Path, layers: Layers) -> dict[str, float]:
    """Return the alphas that a file in kohya's naming has for layers whose path it names."""
    from safetensors import safe_open

    prefixes = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_",)}
    alphas = {}
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
        for part, of_part in layers.items():
            for path in of_part:
                name = (path if part == "unet" else text_path(path)).replace(".", "_")
                for prefix in prefixes[part]:
                    if f"{prefix}{name}.alpha" in names:
                        alphas[f"{part}.{path}"] = float(tensors.get_tensor(f"{prefix}{name}.alpha"))
    return alphas


def _check_checkpoint(config: CheckConfig, base: Base | None) -> None:
    if base is None:
        say("give pretrained=..., a model of its family, to load it and to see what is different")
        return
    pipeline = _load(config, base)
    probe = Probe.of(pipeline)
    before = probe.ask(pipeline)
    loaded = load_single_file(type(pipeline), config.path, base).to(pipeline.device)
    _say_changes(config.path, changes(before, probe.ask(loaded)), base)


def _check_pipeline(config: CheckConfig, base: Base | None) -> None:
    whole = _load(config, Base(str(config.path)))
    reference = whole if base is None else _load(config, base)
    if type(whole) is not type(reference):
        raise ConfigError(
            f"{config.path} is a {type(whole).__name__} and {config.pretrained} a {type(reference).__name__}: "
            "they are of different families, and cannot be compared"
        )
    refuse_other_interface(whole.unet, reference.unet, str(config.path))
    probe = Probe.of(reference)
    after = probe.ask(whole)
    say(f"{config.path}: a {type(whole).__name__}, whole; it loads and draws")
    if base is not None:
        _say_changes(config.path, changes(probe.ask(reference), after), base)


def _say_changes(path: Path, moved: dict[str, float], base: Base) -> None:
    if not does_something(moved):
        raise ConfigError(f"{path} does nothing: {base.pretrained} computes the same with it as without")
    for part, change in moved.items():
        if not change:
            say(f"  {part.replace('_', ' ')}: stays as it is")
            continue
        unit = " levels of 255" if part == "image" else " of its output"
        say(f"  {part.replace('_', ' ')}: changes by {change:.3g}{unit}")
    say(f"it fits {base.pretrained}, and it does something")
