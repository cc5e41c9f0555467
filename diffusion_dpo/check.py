"""`export --check FILE`: what a file is, whether each of its layers finds its place, and what it changes."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
from diffusion_dpo.device import pick_device
from diffusion_dpo.exporting.probe import Probe, changes, does_something
from diffusion_dpo.exporting.public import as_diffusers_loads, where_it_differs
from diffusion_dpo.exporting.single_file import load_single_file
from diffusion_dpo.exporting.source import Base, find_base
from diffusion_dpo.models.adapters import locate_adapter, refuse_other_interface, replace_unet
from diffusion_dpo.models.lora_file import Layers, Lora, place, read_lora
from diffusion_dpo.models.lora_layers import added, parts_of
from diffusion_dpo.models.safetensors_file import FileFacts, read_facts, shown, shown_metadata
from diffusion_dpo.settings import CheckConfig

if TYPE_CHECKING:
    pass


_PARTS = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


def run(config: CheckConfig) -> None:
    """Say what a file is and does; raises ConfigError when it is broken, does not fit, or does nothing."""
    if not config.path.exists():
        raise ConfigError(f"there is no {config.path}")
    base = find_base(config.path, config)
    if (config.path / "model_index.json").exists():
        _check_pipeline(config, base)
        return
    facts = read_facts(config.path) if config.path.is_file() else None
    if facts is not None and facts.is_checkpoint:
        family = facts.family or "an unknown family"
        say(f"{config.path}: a single-file checkpoint of {len(facts.shapes)} tensors, for {family}")
        _say_metadata(facts)
        _check_checkpoint(config, base)
        return
    kind, where = locate_adapter(config.path)
    if kind == "unet":
        say(f"{where}: a whole UNet, in the place of the base's")
    else:
        lora = read_lora(where)
        _describe_lora(lora)
    if base is None:
        say("give pretrained=..., the model that it was made for, to see whether it fits and what it changes")
    elif kind == "unet":
        _check_unet(config, where, base)
    else:
        _check_lora(config, lora, base)


def _describe_lora(lora: Lora) -> None:
    facts = lora.facts
    parts = Counter(facts.parts.values())
    where = ", ".join(f"{parts[part]} of the {name}" for part, name in _PARTS.items() if parts[part])
    kind = "LoRA" if facts.is_plain else "DoRA, or a LoRA with biases,"
    say(
        f"{facts.file}: a {kind} in {facts.naming} naming, for {facts.family}; {len(facts.tensors)} layers: {where}; "
        f"rank {_span(facts.ranks)}"
    )
    _say_metadata(facts.facts)
    _say_alphas(lora)
    if facts.naming != "kohya":
        say("ComfyUI may not know these names; export format=kohya writes a file for it, A1111 and Forge")


def _say_metadata(facts: FileFacts) -> None:
    for line in shown_metadata(facts.metadata) or ["no metadata that programs show (ss_*, modelspec.*)"]:
        say(f"  {line}")


def _check_unet(config: CheckConfig, where: Path, base: Base) -> None:
    pipeline = base.load(pick_device(config.device))
    probe = Probe.of(pipeline)
    before = probe.ask(pipeline)
    replace_unet(pipeline, where)
    _say_changes(where, changes(before, probe.ask(pipeline)), base)


def _check_lora(config: CheckConfig, lora: Lora, base: Base) -> None:
    """Measure what a LoRA file says, its weights added to those of the base, and what diffusers makes of the file."""
    pipeline = base.load(pick_device(config.device))
    layers = place(lora, parts_of(pipeline))
    probe = Probe.of(pipeline)
    before = probe.ask(pipeline)
    with added(parts_of(pipeline), layers):
        after = probe.ask(pipeline)
    _say_targets(layers)
    _say_changes(lora.facts.file, changes(before, after), base)
    public = as_diffusers_loads(lora.facts.file, pipeline, probe)
    if wrong := where_it_differs(lora.facts.file, public, before, after):
        warn(f"{wrong}; export it with format=diffusers or kohya for a file that every program takes alike")


def _say_targets(layers: Layers) -> None:
    targets = sorted({path.removesuffix(".0").rpartition(".")[2] for of_part in layers.values() for path in of_part})
    say(f"every layer finds its place; they are on {', '.join(targets)}")


def _say_alphas(lora: Lora) -> None:
    alphas, without = {name: layer.alpha for name, layer in lora.layers.items()}, lora.facts.without_alpha
    say(f"  alpha {_span(alphas)}")
    if len(without) == len(alphas):
        warn("the file does not say its alpha; programs take the rank, and if it was another, the strength is wrong")
    elif without:
        warn(f"{len(without)} of {len(alphas)} layers have no alpha, e.g. {shown(without[0])}; programs take the rank")
    claimed = lora.facts.facts.metadata.get("ss_network_alpha", "")
    if _is_number(claimed) and any(f"{value:g}" != f"{float(claimed):g}" for value in alphas.values()):
        warn(f"the header says alpha {shown(claimed)}, the weights {_span(alphas)}; programs go by the weights")


def _is_number(text: str) -> bool:
    """Whether a header's text is a number; where layers differ, or nobody said, it is Dynamic or None."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _span(numbers: Mapping[str, float]) -> str:
    """Return the values of layers in words: one number, or the most frequent with the range."""
    counts = Counter(numbers.values())
    often, _ = counts.most_common(1)[0]
    return f"{often:g}" if len(counts) == 1 else f"{often:g} mostly ({min(counts):g} to {max(counts):g})"


def _check_checkpoint(config: CheckConfig, base: Base | None) -> None:
    if base is None:
        say("give pretrained=..., a model of its family, to load it and to see what is different")
        return
    pipeline = base.load(pick_device(config.device))
    probe = Probe.of(pipeline)
    before = probe.ask(pipeline)
    loaded = load_single_file(type(pipeline), config.path, base, pipeline.device)
    _say_changes(config.path, changes(before, probe.ask(loaded)), base)


def _check_pipeline(config: CheckConfig, base: Base | None) -> None:
    whole = Base(str(config.path)).load(pick_device(config.device))
    reference = whole if base is None else base.load(pick_device(config.device))
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
