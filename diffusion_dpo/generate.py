"""`generate`: prompts -> candidates. A shard is a work unit, whole or absent; a rerun makes those that are missing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import command
from diffusion_dpo.console import progress, say
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.prompts import Prompt, read_prompts, refuse_foreign_defaults
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import claim, finish
from diffusion_dpo.sampling import DrawRequest, draw, image_seed, load_pipeline, weights_hash
from diffusion_dpo.settings import GenerateConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class _Candidate:
    prompt: Prompt
    index: int
    seed: int


def run(config: GenerateConfig) -> Path:
    """Draw the candidates that are not there yet; return their folder."""
    refuse_foreign_defaults(config.prompts_path, config.model.pretrained)
    prompts = read_prompts(config.prompts_path, limit=config.num_prompts)
    todo = [
        _Candidate(prompt, index, image_seed(config.seed, prompt.id, index))
        for prompt in prompts
        for index in range(config.num_images_per_prompt)
    ]
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    precision = str(dtype).removeprefix("torch.")
    identity = _identity(config, prompts) | {"weights": weights_hash(config.model), "precision": precision}
    shards = [todo[start : start + config.shard_size] for start in range(0, len(todo), config.shard_size)]
    with claim(config.output_dir, "generate", identity):
        paths = [config.output_dir / f"images-{number:05d}.parquet" for number in range(len(shards))]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        done = len(todo) - sum(len(shards[number]) for number in missing)
        if missing:
            say(
                f"generate: {len(prompts)} prompts x {config.num_images_per_prompt} images with "
                f"{config.model.pretrained} on {device.type} in {precision}"
                + (f"; {done} of {len(todo)} are there already" if done else "")
            )
            pipeline = load_pipeline(config.model, device=device, dtype=dtype)
            with progress("generate", len(todo), "images", done=done) as advance:
                for number in missing:
                    write_shard(paths[number], _rows(pipeline, shards[number], config, identity, advance), CANDIDATES)
        else:
            say(f"generate: all {len(todo)} candidates are there already")
        finish(config.output_dir, "generate", identity, num_prompts=len(prompts), num_images=len(todo))
    say(f"candidates: {config.output_dir}\nnext: {command('score', {'path': config.output_dir})}")
    return config.output_dir


def _rows(
    pipeline: "DiffusionPipeline",
    shard: list[_Candidate],
    config: GenerateConfig,
    identity: dict[str, Any],
    advance: Any,
) -> list[dict[str, Any]]:
    rows = []
    size = config.sampling.batch_size
    for start in range(0, len(shard), size):
        batch = shard[start : start + size]
        images = draw(pipeline, [DrawRequest(item.prompt.text, item.seed) for item in batch], config.sampling)
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
                    "origin": "",
                    "settings_hash": _hash(repr(sorted(identity.items()))),
                }
            )
        advance(len(batch))
    return rows


def _identity(config: GenerateConfig, prompts: list[Prompt]) -> dict[str, Any]:
    """Everything that decides the images; where they are computed and in what portions is left out."""
    decisive = config.model_dump(
        mode="json", include={"num_images_per_prompt", "model", "sampling", "seed", "shard_size"}
    )
    del decisive["sampling"]["batch_size"]
    return decisive | {
        "prompts": _hash(repr([(p.id, p.text, [_hash(r.hex()) for r in p.references]) for p in prompts]))
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
