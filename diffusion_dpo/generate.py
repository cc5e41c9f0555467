"""`generate`: prompts -> candidates. A shard is a work unit, whole or absent; a rerun makes those that are missing."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import command
from diffusion_dpo.console import progress, say
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.prompt_words import Told
from diffusion_dpo.data.prompts import Prompt, read_prompts, refuse_foreign_defaults
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import claim, finish
from diffusion_dpo.mixture import Source, announce, describe, refuse_lacking_references, sources_of
from diffusion_dpo.sampling import DrawRequest, draw, identity_of, image_seed, load_pipeline, make_scheduler
from diffusion_dpo.settings import GenerateConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

_LAYOUT = 2
"""Of what a folder of candidates is known by; one of another is not continued."""


@dataclass(frozen=True)
class _Candidate:
    prompt: Prompt
    index: int
    seed: int


@dataclass(frozen=True)
class _Shard:
    """The candidates of one file; all have one source."""

    path: Path
    source: Source
    candidates: list[_Candidate]


def run(config: GenerateConfig) -> Path:
    """Draw the candidates that are not there yet; return their folder."""
    sources = sources_of(config)
    refuse_foreign_defaults(config.prompts_path, *(source.model.pretrained for source in sources))
    prompts = read_prompts(config.prompts_path, limit=config.num_prompts)
    refuse_lacking_references(sources, prompts)
    shards = _plan(config, sources, prompts)
    total = len(prompts) * config.num_images_per_prompt
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    precision = str(dtype).removeprefix("torch.")
    identity = _identity(config, sources, prompts) | {"precision": precision}
    with claim(config.output_dir, "generate", identity):
        missing = [shard for shard in shards if not shard.path.exists()]
        done = total - sum(len(shard.candidates) for shard in missing)
        if missing:
            models = ", ".join(dict.fromkeys(describe(source.model) for source in sources))
            say(
                f"generate: {len(prompts)} prompts x {config.num_images_per_prompt} images with "
                f"{models} on {device.type} in {precision}"
                + (f"; {done} of {total} are there already" if done else "")
            )
            announce(sources, config.num_images_per_prompt)
            told = Told()
            told.of_syntax(prompt.text for prompt in prompts)
            with progress("generate", total, "images", done=done) as advance:
                for source in sources:  # one model in memory at a time
                    portion = [shard for shard in missing if shard.source is source]
                    if not portion:
                        continue
                    pipeline = load_pipeline(source.model, device=device, dtype=dtype)
                    if source.scheduler is not None:
                        pipeline.scheduler = make_scheduler(pipeline, source.scheduler)
                    told.of_cuts(pipeline, (prompt.text for prompt in prompts))
                    for shard in portion:
                        write_shard(shard.path, _rows(pipeline, shard, identity, advance), CANDIDATES)
                    del pipeline
        else:
            say(f"generate: all {total} candidates are there already")
        finish(config.output_dir, "generate", identity, num_prompts=len(prompts), num_images=total)
    say(f"candidates: {config.output_dir}\nnext: {command('score', {'path': config.output_dir})}")
    return config.output_dir


def _plan(config: GenerateConfig, sources: Sequence[Source], prompts: Sequence[Prompt]) -> list[_Shard]:
    """Return all shards; image k of a prompt is of source k mod their number.

    Of a mixture they come in blocks of prompts, so that the images of a prompt lie in files next to each other.
    """
    per_source = -(-config.num_images_per_prompt // len(sources))
    block = len(prompts) if len(sources) == 1 else max(1, config.shard_size // per_source)
    shards: list[_Shard] = []
    for first in range(0, len(prompts), block):
        for turn, source in enumerate(sources):
            todo = [
                _Candidate(prompt, index, image_seed(config.seed, prompt.id, index))
                for prompt in prompts[first : first + block]
                for index in range(turn, config.num_images_per_prompt, len(sources))
            ]
            for start in range(0, len(todo), config.shard_size):
                path = config.output_dir / f"images-{len(shards):05d}.parquet"
                shards.append(_Shard(path, source, todo[start : start + config.shard_size]))
    return shards


def _rows(
    pipeline: "DiffusionPipeline", shard: _Shard, identity: dict[str, Any], advance: Any
) -> list[dict[str, Any]]:
    rows = []
    source, size = shard.source, shard.source.sampling.batch_size
    sampler = type(pipeline.scheduler).__name__
    for start in range(0, len(shard.candidates), size):
        batch = shard.candidates[start : start + size]
        requests = [DrawRequest(item.prompt.text, item.seed, _start(item, source)) for item in batch]
        images = draw(pipeline, requests, source.sampling, source.strength)
        for item, image in zip(batch, images, strict=True):
            rows.append(
                {
                    "uid": pixel_hash(image),
                    "prompt_id": item.prompt.id,
                    "prompt": item.prompt.text,
                    "index": item.index,
                    "seed": item.seed,
                    "image": image_struct(encode_png(image)),
                    "references": [image_struct(data) for data in item.prompt.references],
                    "origin": source.origin(sampler, item.index),
                    "settings_hash": _hash(repr(sorted(identity.items()))),
                }
            )
        advance(len(batch))
    return rows


def _start(candidate: _Candidate, source: Source) -> "Image | None":
    """Return the image that a candidate starts from, if it starts from one."""
    return None if source.strength is None else decode_rgb(candidate.prompt.references[0])


def _identity(config: GenerateConfig, sources: Sequence[Source], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Everything that decides the images; where they are computed and in what portions is left out."""
    decisive = config.model_dump(
        mode="json",
        include={"num_images_per_prompt", "sampling", "seed", "shard_size"}
        | ({"strength"} if config.strength is not None else set())
        | ({"mixture"} if config.mixture else set()),
    )
    del decisive["sampling"]["batch_size"]
    if config.mixture:
        for variant, source in zip(decisive["mixture"], sources, strict=True):
            variant["model"] = identity_of(source.model)
    return decisive | {
        "model": identity_of(config.model),
        "layout": _LAYOUT,
        "prompts": _hash(repr([(p.id, p.text, [_hash(r.hex()) for r in p.references]) for p in prompts])),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
