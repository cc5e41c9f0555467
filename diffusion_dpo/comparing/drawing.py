"""The images of a comparison, drawn once: a shard is named after all that decides it, so that what is added is drawn.

A model that is new, a seed that is new: the shards of the others are there already. Every shard is drawn in the same
batches, so that a rerun draws the same bits.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.comparing import Compared, Wall
from diffusion_dpo.console import progress, say
from diffusion_dpo.data.comparisons import unit
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.prompt_words import Told
from diffusion_dpo.data.prompts import Prompt
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard
from diffusion_dpo.processes import Processes
from diffusion_dpo.sampling import DrawRequest, draw, identity_of, image_seed, load_pipeline
from diffusion_dpo.settings import CompareConfig

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

_MIN_SHARD_SIZE = 64


@dataclass(frozen=True)
class _Shard:
    """Some prompts of one seed, by one model."""

    path: Path
    prompts: tuple[Prompt, ...]
    index: int
    """Which of a prompt's seeds, from 0."""


def draw_all(
    config: CompareConfig,
    lineup: Sequence[Compared],
    prompts: Sequence[Prompt],
    device: "torch.device",
    dtype: "torch.dtype",
    processes: Processes,
) -> Wall:
    """Draw what is missing, one model in memory at a time; return all images. Several processes share the shards."""
    precision = str(dtype).removeprefix("torch.")
    plan = {compared.name: _plan(config, compared, prompts, precision) for compared in lineup}
    # looked up once, by one process: the others may be drawing already while one still looks
    there = processes.from_main({str(it.path) for shards in plan.values() for it in shards if it.path.exists()})
    told = Told()
    told.of_syntax(prompt.text for prompt in prompts)
    for compared in lineup:
        shards = plan[compared.name]
        missing = [shard for shard in shards if str(shard.path) not in there]
        if not missing:
            say(f"{compared.name}: all {len(prompts) * config.seeds_per_prompt} images are there already")
            continue
        mine = processes.share(missing)
        if not mine:
            continue
        shards[0].path.parent.mkdir(parents=True, exist_ok=True)
        pipeline = load_pipeline(compared.model, device=device, dtype=dtype)
        told.of_cuts(pipeline, (prompt.text for prompt in prompts))
        done = sum(len(shard.prompts) for shard in shards) - sum(len(shard.prompts) for shard in missing)
        total = done + sum(len(shard.prompts) for shard in mine)
        with progress(compared.name, total, "images", done=done) as advance:
            for shard in mine:
                rows = []
                for row in _rows(pipeline, shard, config):
                    rows.append(row)
                    advance()
                write_shard(shard.path, rows, CANDIDATES)
        del pipeline
    processes.wait()
    units = {name: [unit(shard.path) for shard in shards] for name, shards in plan.items()}
    return Wall(tuple(prompts), config.seeds_per_prompt, units)


def _plan(config: CompareConfig, compared: Compared, prompts: Sequence[Prompt], precision: str) -> list[_Shard]:
    """Return a model's shards, seed after seed: whole batches of at least 64 images, but for the last."""
    made_by = identity_of(compared.model) | {"precision": precision}
    decisive = json.dumps([made_by, config.sampling.model_dump(mode="json")], sort_keys=True)
    folder = config.output_dir / "images" / f"{compared.name}-{_hash(decisive)}"
    size = config.sampling.batch_size * -(-_MIN_SHARD_SIZE // config.sampling.batch_size)
    shards = []
    for index in range(config.seeds_per_prompt):
        for number, start in enumerate(range(0, len(prompts), size)):
            part = tuple(prompts[start : start + size])
            content = [[it.id, it.text, *(hashlib.sha256(data).hexdigest() for data in it.references)] for it in part]
            name = f"images-{index:03d}-{number:05d}-{_hash(json.dumps([config.seed, content]))}.parquet"
            shards.append(_Shard(folder / name, part, index))
    return shards


def _rows(pipeline: "DiffusionPipeline", shard: _Shard, config: CompareConfig) -> Iterator[dict[str, Any]]:
    size = config.sampling.batch_size
    for start in range(0, len(shard.prompts), size):
        batch = shard.prompts[start : start + size]
        seeds = [image_seed(config.seed, prompt.id, shard.index) for prompt in batch]
        requests = [DrawRequest(prompt.text, seed) for prompt, seed in zip(batch, seeds, strict=True)]
        images = draw(pipeline, requests, config.sampling)
        for prompt, seed, image in zip(batch, seeds, images, strict=True):
            yield {
                "uid": pixel_hash(image),
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "index": shard.index,
                "seed": seed,
                "image": image_struct(encode_png(image)),
                "references": [image_struct(data) for data in prompt.references],
                "origin": "",
                "settings_hash": shard.path.parent.name.rpartition("-")[2],
            }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
