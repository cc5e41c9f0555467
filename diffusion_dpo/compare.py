"""`compare`: two models on the same prompts, seeds and noise -> images, scores, report.json and report.html.

Images are drawn in shards of a fixed make-up, one model in memory at a time, so a rerun draws only what is missing and
draws it in the same batches. Equal images have equal scores: a model compared with itself ties everywhere.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from diffusion_dpo.card import write_environment
from diffusion_dpo.config import ConfigError, dump
from diffusion_dpo.console import progress, say, show, warn
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.prompts import Prompt, prompt_hash, read_prompts, refuse_foreign_defaults
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.files import atomic_path, claim, finish, read_manifest
from diffusion_dpo.pocket.world import is_held_out, parse_caption
from diffusion_dpo.report import Gallery, MetricScores, Pair, Report, words
from diffusion_dpo.report.html import write_report
from diffusion_dpo.report.statistics import METHODS, summarise
from diffusion_dpo.sampling import DrawRequest, draw, image_seed, load_pipeline, weights_hash
from diffusion_dpo.scorers import Scorer
from diffusion_dpo.scorers.judge import check_metrics
from diffusion_dpo.scoring import Scoring
from diffusion_dpo.settings import CompareConfig, ImageModel

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

SIDES = ("before", "after")
_MIN_SHARD_SIZE = 64
_JUDGED_AT_ONCE = 64


@dataclass(frozen=True)
class _Slot:
    """An image to be drawn by both models."""

    prompt: Prompt
    index: int
    seed: int


def run(config: CompareConfig) -> Path:
    """Draw and judge what is missing, then write the report; return the path of report.html."""
    check_metrics(config.scorers)
    refuse_foreign_defaults(config.prompts_path, config.before.pretrained, config.after.pretrained)
    prompts = read_prompts(config.prompts_path, limit=config.num_prompts, held_out=True)
    _refuse_unusable(config.scorers, prompts)
    trained_on = _trained_on(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    slots = [
        _Slot(prompt, index, image_seed(config.seed, prompt.id, index))
        for prompt in prompts
        for index in range(config.seeds_per_prompt)
    ]
    folder, identity = config.output_dir, _identity(config, prompts, dtype)
    say(
        f"compare: {len(prompts)} prompts x {config.seeds_per_prompt} seeds, {_describe(config.before)} against "
        f"{_describe(config.after)}, on {device.type} in {identity['precision']}"
    )
    if config.before == config.after:
        say("both models are the same, so every pair should tie")
    with claim(folder, "compare", identity):
        with atomic_path(folder / "config.yaml") as partial:
            partial.write_text(dump(config), encoding="utf-8")
        write_environment(folder / "environment.json")
        for side, model in zip(SIDES, (config.before, config.after), strict=True):
            _draw_missing(folder / side, model, slots, config, identity, device, dtype)
        scores = _judge_all(config, slots, trained_on)
        report = Report(
            prompt_set="held-out prompts" if all(map(_is_held_out, prompts)) else "prompts",
            num_prompts=len(prompts),
            num_prompts_trained_on=_num_trained_on(config.after, prompts),
            seeds_per_prompt=config.seeds_per_prompt,
            metrics=tuple(summarise(metric) for metric in scores),
            methods=METHODS,
            made_with=_made_with(config, device, identity),
        )
        page = write_report(folder, report, scores, _gallery(config, slots))
        finish(folder, "compare", identity, num_prompts=len(prompts), num_pairs=len(slots))
    _tell(report)
    say(f"numbers: {folder / 'report.json'}\nreport: {page}\nnext: open {page} in a browser")
    return page


def trained_on_metrics(adapter_path: Path) -> tuple[str, ...]:
    """Return the metrics that labelled an adapter's training pairs, as its run folder says; () where none does."""
    return tuple(_training_facts(adapter_path).get("labelled_by", ()))


# --- what is compared ------------------------------------------------------------------------------------------------


def _refuse_unusable(scorers: Sequence[Scorer], prompts: Sequence[Prompt]) -> None:
    """Say before anything is drawn what would stop the judges afterwards."""
    lacking = sum(not prompt.references for prompt in prompts)
    for scorer in scorers:
        if "rivals" in scorer.needs:
            raise ConfigError(
                f"the scorer {scorer.type} compares the images of a prompt with each other, which says nothing of two "
                "models; leave it out"
            )
        if lacking and "reference" in scorer.needs:
            raise ConfigError(
                f"the scorer {scorer.type} compares with reference images, and {lacking} of {len(prompts)} prompts "
                "have none; give prompts_path a .jsonl with `references`, or leave this scorer out"
            )


def _trained_on(config: CompareConfig) -> frozenset[str]:
    """Return the metrics that are not held out: those that labelled the pairs, and the others of their scorers."""
    families = [{metric.name for metric in scorer.metrics} for scorer in config.scorers]
    known = sorted(set().union(*families))
    labelled_by = config.trained_on
    if labelled_by is not None:
        for name in labelled_by:
            if name not in known:
                raise ConfigError(
                    f"trained_on names {name!r}, which no scorer here gives; they give {', '.join(known)}"
                )
    elif config.after.adapter_path is not None:
        labelled_by = trained_on_metrics(config.after.adapter_path)
        if not labelled_by:
            warn("nothing says which metrics labelled the training pairs, so all are called held out; set trained_on")
    return frozenset().union(*(family for family in families if family & set(labelled_by or ())))


def _training_facts(adapter_path: Path) -> dict[str, Any]:
    """Return the manifest of the run folder that an adapter lies in, {} where there is none."""
    start = adapter_path.parent if adapter_path.is_file() else adapter_path
    for folder in (start, start.parent):
        manifest = read_manifest(folder)
        if manifest.get("made_by") == "train":
            return manifest
    return {}


def _num_trained_on(model: ImageModel, prompts: Sequence[Prompt]) -> int:
    """Count the prompts that the model's adapter was trained on, as far as its run folder says."""
    if model.adapter_path is None:
        return 0
    seen = set(_training_facts(model.adapter_path).get("prompt_hashes", ()))
    return sum(prompt_hash(prompt.text) in seen for prompt in prompts)


def _is_held_out(prompt: Prompt) -> bool:
    """Whether a prompt is known to be held out: it is a caption of the pocket world's held-out tenth."""
    scene = parse_caption(prompt.text)
    return scene is not None and is_held_out(scene)


def _identity(config: CompareConfig, prompts: Sequence[Prompt], dtype: "torch.dtype") -> dict[str, Any]:
    """Everything that decides the images, the content of local weights included."""
    decisive = config.model_dump(mode="json", include={"before", "after", "seeds_per_prompt", "sampling", "seed"})
    for side, model in zip(SIDES, (config.before, config.after), strict=True):
        decisive[side]["weights"] = weights_hash(model)
    contents = [(p.id, p.text, [hashlib.sha256(data).hexdigest() for data in p.references]) for p in prompts]
    return decisive | {"prompts": _hash(contents), "precision": str(dtype).removeprefix("torch.")}


def _describe(model: ImageModel) -> str:
    return model.pretrained + (f" with {model.adapter_path}" if model.adapter_path else "")


# --- images ----------------------------------------------------------------------------------------------------------


def _shard_size(config: CompareConfig) -> int:
    """Images in a file: whole batches, so that a shard drawn again is drawn in the same batches."""
    return config.sampling.batch_size * -(-_MIN_SHARD_SIZE // config.sampling.batch_size)


def _images_path(folder: Path, number: int) -> Path:
    return folder / f"images-{number:05d}.parquet"


def _draw_missing(
    folder: Path,
    model: ImageModel,
    slots: Sequence[_Slot],
    config: CompareConfig,
    identity: dict[str, Any],
    device: "torch.device",
    dtype: "torch.dtype",
) -> None:
    """Draw one model's missing shards; the model leaves memory on return."""
    folder.mkdir(exist_ok=True)
    size = _shard_size(config)
    shards = {n: slots[start : start + size] for n, start in enumerate(range(0, len(slots), size))}
    missing = {n: shard for n, shard in shards.items() if not _images_path(folder, n).exists()}
    if not missing:
        say(f"{folder.name}: all {len(slots)} images are there already")
        return
    pipeline = load_pipeline(model, device=device, dtype=dtype)
    done = len(slots) - sum(len(shard) for shard in missing.values())
    with progress(folder.name, len(slots), "images", done=done) as advance:
        for number, shard in missing.items():
            rows = []
            for row in _draw_rows(pipeline, shard, config, _hash(identity)):
                rows.append(row)
                advance()
            write_shard(_images_path(folder, number), rows, CANDIDATES)


def _draw_rows(
    pipeline: "DiffusionPipeline", shard: Sequence[_Slot], config: CompareConfig, settings_hash: str
) -> Iterator[dict[str, Any]]:
    size = config.sampling.batch_size
    for start in range(0, len(shard), size):
        batch = shard[start : start + size]
        images = draw(pipeline, [DrawRequest(slot.prompt.text, slot.seed) for slot in batch], config.sampling)
        for slot, image in zip(batch, images, strict=True):
            yield {
                "uid": pixel_hash(image),
                "prompt_id": slot.prompt.id,
                "prompt": slot.prompt.text,
                "index": slot.index,
                "seed": slot.seed,
                "image": image_struct(encode_png(image)),
                "references": [image_struct(data) for data in slot.prompt.references],
                "origin": "",
                "settings_hash": settings_hash,
            }


def _gallery(config: CompareConfig, slots: Sequence[_Slot]) -> Gallery:
    """Give the report access to the images, of which it reads only those that it shows."""
    seeds, size = config.seeds_per_prompt, _shard_size(config)

    def read(pairs: Sequence[Pair]) -> dict[Pair, tuple[bytes, bytes]]:
        wanted = {pair.prompt * seeds + pair.seed: pair for pair in pairs}
        found: dict[str, dict[Pair, bytes]] = {side: {} for side in SIDES}
        for side in SIDES:
            for number in sorted({position // size for position in wanted}):
                (unit,) = find_units(_images_path(config.output_dir / side, number))
                for position, candidate in enumerate(unit.read(), start=number * size):
                    if position in wanted:
                        found[side][wanted[position]] = candidate.data
        return {pair: (found["before"][pair], found["after"][pair]) for pair in pairs}

    return Gallery(
        prompts=[slot.prompt.text for slot in slots[::seeds]],
        seeds=[[slot.seed for slot in slots[start : start + seeds]] for start in range(0, len(slots), seeds)],
        read=read,
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def _judge_all(config: CompareConfig, slots: Sequence[_Slot], trained_on: frozenset[str]) -> list[MetricScores]:
    """Judge what was not judged yet, by every scorer; return all values, one array a side of (num_prompts, seeds)."""
    keys = {side: _keys(config.output_dir / side, slots) for side in SIDES}
    shape = (-1, config.seeds_per_prompt)
    scores = []
    for scorer in config.scorers:
        scoring = Scoring(scorer, config.output_dir, config.output_dir, config.device, _JUDGED_AT_ONCE)
        scoring.run(find_units(config.output_dir))
        verdicts = scoring.known
        for metric in scorer.metrics:
            before, after = (
                np.array([verdicts[key][metric.name].value for key in keys[side]]).reshape(shape) for side in SIDES
            )
            scores.append(
                MetricScores(
                    name=metric.name,
                    role="trained_on" if metric.name in trained_on else "held_out",
                    higher_is_better=metric.higher_is_better,
                    before=before,
                    after=after,
                    auxiliary=metric.auxiliary,
                )
            )
    return scores


def _keys(folder: Path, slots: Sequence[_Slot]) -> list[str]:
    """Return the key of each slot's image, having checked that the images are the slots'."""
    candidates = [candidate for unit in find_units(folder) for candidate in unit.read(images=False)]
    drawn = [(candidate.prompt_id, candidate.seed) for candidate in candidates]
    assert drawn == [(slot.prompt.id, slot.seed) for slot in slots], f"{folder} holds other images than were drawn"
    return [candidate.key for candidate in candidates]


# --- the result ------------------------------------------------------------------------------------------------------


def _made_with(config: CompareConfig, device: "torch.device", identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": shlex.join(["diffusion-dpo", "compare", str(config.output_dir / "config.yaml")]),
        **{name: identity[name] for name in (*SIDES, "sampling", "seed", "precision")},
        "device": device.type,
        "scorers": {scorer.metrics[0].name: scorer.fingerprint() for scorer in config.scorers},
        "versions": json.loads((config.output_dir / "environment.json").read_text(encoding="utf-8")),
    }


def _tell(report: Report) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("metric", no_wrap=True)
    for heading in ("before", "after", "difference, 95 % interval", "win rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in sorted(report.metrics, key=words.rank):
        places = words.places_of(result)
        table.add_row(
            result.name + " *" * (result.role == "trained_on"),
            words.number(result.mean_before, places),
            words.number(result.mean_after, places),
            f"{words.number(result.mean_difference, places, signed=True)}, {words.interval(result)}",
            words.percent(result.win_rate),
        )
    show(table)
    if any(result.role == "trained_on" for result in report.metrics):
        say("* labelled the training pairs, or is given by the scorer that did; the others are held out")
    say(words.sentence(report, words.headline(report)))
    for caution in words.cautions(report):
        warn(caution)


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
