"""What draws which candidate: one source for all of them, or the variants of a mixture in turn."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
from diffusion_dpo.data.prompts import Prompt
from diffusion_dpo.files import shown
from diffusion_dpo.settings import GenerateConfig, ImageModel, Sampling, Variant


@dataclass(frozen=True)
class Source:
    """One way to draw, complete."""

    name: str
    model: ImageModel
    sampling: Sampling
    scheduler: str | None
    strength: float | None

    def origin(self, sampler: str, index: int) -> str:
        """Return the JSON object that says how an image came about; `sampler` is the class that was used."""
        facts = {
            "variant": self.name or None,
            "model": describe(self.model),
            "sampler": sampler,
            "guidance_scale": self.sampling.guidance_scale,
            "num_inference_steps": self.sampling.num_inference_steps,
            "strength": self.strength,
            "position": index,
        }
        return json.dumps({key: value for key, value in facts.items() if value is not None})


def sources_of(config: GenerateConfig) -> list[Source]:
    """Return what draws, in turn; raises ConfigError for two variants of one name, or less than one step."""
    sources = [_resolve(config, variant, number) for number, variant in enumerate(config.mixture)]
    sources = sources or [Source("", config.model, config.sampling, None, config.strength)]
    if config.num_images_per_prompt < len(sources):
        raise ConfigError(
            f"num_images_per_prompt={config.num_images_per_prompt} is less than the {len(sources)} variants of "
            "mixture, so that some would draw nothing"
        )
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise ConfigError(f"mixture: two variants have the name {source.name!r}")
        steps = source.sampling.num_inference_steps
        if source.strength is not None and int(steps * source.strength) < 1:
            raise ConfigError(
                f"strength {source.strength:g} of {steps} steps is less than one; give at least "
                f"{math.ceil(1000 / steps) / 1000:g}"
            )
    return sources


def refuse_lacking_references(sources: Sequence[Source], prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError when image-to-image is asked for, and a prompt has no reference."""
    lacking = [prompt for prompt in prompts if not prompt.references]
    if lacking and any(source.strength is not None for source in sources):
        raise ConfigError(
            f"strength starts from reference images, and {len(lacking)} of {len(prompts)} prompts have none, first "
            f"{lacking[0].text[:80]!r}; give prompts_path a .jsonl with `references`, or set strength to null"
        )


def announce(sources: Sequence[Source], num_images_per_prompt: int) -> None:
    """Say what a mixture draws with, and what mixing models does to the pairs."""
    if len(sources) == 1:
        return
    for source in sources:
        parts = [describe(source.model), source.scheduler, f"guidance {source.sampling.guidance_scale:g}"]
        parts += [f"{source.sampling.num_inference_steps} steps"]
        parts += [f"strength {source.strength:g}"] if source.strength is not None else []
        say(f"  {source.name}: {', '.join(filter(None, parts))}")
    if extra := num_images_per_prompt % len(sources):
        drawn = "first draws" if extra == 1 else f"first {extra} draw"
        say(f"{num_images_per_prompt} images over {len(sources)} variants: the {drawn} one more")
    if len({source.model for source in sources}) > 1:
        warn(
            "pairs of different models teach the difference between the models, unless each wins often; `inspect` "
            "on the pairs measures it"
        )


def describe(model: ImageModel) -> str:
    """Return a model's name, and its adapter's with its strength; of an absolute path the last name.

    It becomes the origin of images, which their pairs keep, and which others read when those are exported.
    """
    name = shown(Path(model.pretrained))
    if model.adapter_path is None:
        return name
    scale = "" if model.adapter_scale == 1 else f" x {model.adapter_scale:g}"
    return f"{name} + {model.adapter_path.name}{scale}"


def _resolve(config: GenerateConfig, variant: Variant, number: int) -> Source:
    own = variant.model_dump(include={"num_inference_steps", "guidance_scale", "negative_prompt"}, exclude_none=True)
    return Source(
        name=variant.name or str(number),
        model=variant.model or config.model,
        sampling=config.sampling.model_copy(update=own),
        scheduler=variant.scheduler,
        strength=config.strength if variant.strength is None else variant.strength,
    )
