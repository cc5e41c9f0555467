"""What diffusers' public loader makes of a user's LoRA file, beside what the tensors of the file say.

Where it differs for a reason that is known, it is wrong. Where none is known, one of the two readings is, and which of
them cannot be told.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.exporting.probe import Answers, Probe, changes, does_something, networks_changed, tolerated
from diffusion_dpo.models.lora_file import Layers
from diffusion_dpo.models.lora_layers import parts_of, peft_layers
from diffusion_dpo.models.pipeline import first_sentence
from diffusion_dpo.models.quiet import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ERRORS = (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError)
"""What diffusers raises, depending on where a file stops fitting; a ConfigError is a ValueError."""
_TOLERANCE = 0.01
"""How much of what the LoRA changes may be off before it is said."""


@dataclass(frozen=True)
class PublicReading:
    """A LoRA file as diffusers loads it."""

    answers: Answers | str
    """What the pipeline answers with it, or why it is not loaded."""
    found: frozenset[tuple[str, str]] = frozenset()
    """The part and the path of every layer that got something."""


def as_diffusers_loads(file: Path, pipeline: "DiffusionPipeline", probe: Probe) -> PublicReading:
    """Return what `load_lora_weights` makes of a LoRA file; the pipeline is left as it was."""
    try:
        with quiet():
            pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True
            )
            found = {(part, path) for part, model in parts_of(pipeline).items() for path in peft_layers(model)}
            return PublicReading(probe.ask(pipeline), frozenset(found))
    except _ERRORS as error:
        return PublicReading(f"{type(error).__name__}: {first_sentence(error)[:100]}")
    finally:
        pipeline.unload_lora_weights()


def why_it_may_differ(file: Path, reading: PublicReading, layers: Layers) -> str | None:
    """Return the known reason for which diffusers may compute something else with a file than it says; None: none.

    Read from the tensors of the file itself, whatever was made of them.
    """
    from safetensors import safe_open

    if isinstance(reading.answers, str):
        return "it is not loaded"
    placed = {(part, path) for part, of_part in layers.items() for path in of_part}
    if reading.found != placed:
        return f"{len(placed - reading.found)} of its {len(placed)} layers are not found"
    with safe_open(file, framework="pt") as tensors:
        alphas = [float(tensors.get_tensor(key)) for key in tensors.keys() if key.endswith(".alpha")]  # noqa: SIM118
    if len(set(alphas)) > 1 or 0 < len(alphas) < len(placed):
        return "its layers have several alphas, of which attention layers get one"
    return None


def where_it_differs(file: Path, reading: PublicReading, base: Answers, expected: Answers) -> str | None:
    """Return in words how far off diffusers is with a LoRA file from what its tensors say; None where it is not."""
    public = reading.answers
    if isinstance(public, str):
        return f"diffusers does not load {file} as it is ({public})"
    if not does_something(changes(base, public)) and does_something(changes(base, expected)):
        return f"diffusers finds none of the layers of {file}, and draws as without it"
    effect, off = changes(base, expected), changes(expected, public)
    wrong = {
        part: off[part] / effect[part] if effect[part] else float("inf")
        for part in off
        if part != "image" and not off[part] <= tolerated(part, effect[part], _TOLERANCE)
    }
    if not wrong:
        return None
    part = max(wrong, key=lambda name: wrong[name])
    share = f", {wrong[part]:.0%} of what the LoRA changes" if part in networks_changed(effect) else ""
    return (
        f"diffusers computes something else with {file} than its weights say: the {part.replace('_', ' ')} is off by "
        f"{off[part]:.2g} of its output{share}"
    )
