"""What diffusers' public loader makes of a user's LoRA file, beside what the tensors of the file say."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_dpo.exporting.probe import Answers, Probe, changes, does_something, networks_changed, tolerated
from diffusion_dpo.models.pipeline import first_sentence
from diffusion_dpo.models.quiet import quiet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ERRORS = (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError)
"""What diffusers raises, depending on where a file stops fitting; a ConfigError is a ValueError."""
_TOLERANCE = 0.01
"""How much of what the LoRA changes may be off before it is said."""


def as_diffusers_loads(file: Path, pipeline: "DiffusionPipeline", probe: Probe) -> Answers | str:
    """Return what a pipeline answers with a LoRA file on it, loaded by `load_lora_weights`; or why that fails.

    The pipeline is left as it was.
    """
    try:
        with quiet():
            pipeline.load_lora_weights(
                str(file.parent), weight_name=file.name, use_safetensors=True, local_files_only=True
            )
            return probe.ask(pipeline)
    except _ERRORS as error:
        return f"{type(error).__name__}: {first_sentence(error)[:100]}"
    finally:
        pipeline.unload_lora_weights()


def where_it_differs(file: Path, public: Answers | str, base: Answers, expected: Answers) -> str | None:
    """Return in words how far off diffusers is with a LoRA file from what its tensors say; None where it is not."""
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
