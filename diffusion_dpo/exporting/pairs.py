"""Preference pairs -> files that other trainers read. The images' pixels, and their bytes where all readers agree on
them, stay as they are.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.collect import collect
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.pickapic import pickapic_row
from diffusion_dpo.data.portable import portable, suffix_of
from diffusion_dpo.data.recognise import settle
from diffusion_dpo.data.shards import PICKAPIC, write_shard
from diffusion_dpo.data.tar_shards import CARD, SIDES, write_tar
from diffusion_dpo.files import atomic_path, claim, finish
from diffusion_dpo.settings import ExportConfig

SINGLE = "images that were judged by themselves"
_LAYOUT = 2
"""Of what is written; a folder of another one is not continued."""

Numbered = tuple[PreferencePair, int]
"""A pair, and how many pairs its prompt has."""


def export_pairs(config: ExportConfig) -> Path:
    """Write the files that are not there yet; return their folder."""
    config = settle(config)
    _refuse_inside(config)
    forms = _Forms()
    found = collect(config.data, max_broken_share=config.max_broken_share, look=forms.look)
    num_pairs = int(found.is_pair.sum())
    if not num_pairs:
        raise ConfigError(f"data.type={config.data.type} holds no pairs, only {SINGLE}; there is nothing to export")
    drops = found.drops | ({SINGLE: len(found) - num_pairs} if num_pairs < len(found) else {})
    files = _file_names(config, num_pairs)
    decisive = {"format", "shard_size"} | ({"soft_labels", "seed"} if config.format == "pickapic" else set())
    identity = config.model_dump(mode="json", include=decisive) | {"pairs": found.fingerprint, "layout": _LAYOUT}
    with claim(config.output_dir, "export", identity) as before:
        if before.get("complete") and all(file.exists() for file in files):
            say(f"export: all {num_pairs} pairs are there already")
        else:
            _write(config, found, files, num_pairs, forms)
            facts = {"num_pairs": num_pairs, "num_files": len(files), "drops": drops}
            finish(config.output_dir, "export", identity, **facts, labelled_by=list(config.data.labelled_by()))
    _say_what_is_lost(config, found, forms)
    dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(drops.items())) or "nothing"
    say(f"{num_pairs} pairs in {len(files)} files; dropped: {dropped}")
    say(f"{config.format}: {config.output_dir}\nnext: {_how_to_read(config, files)}")
    return config.output_dir


def _refuse_inside(config: ExportConfig) -> None:
    """Raise ConfigError where what is written would be read as data the next time."""
    data = config.data.model_dump().get("path")
    if data is not None and config.output_dir.resolve().is_relative_to(Path(data).resolve()):
        raise ConfigError(f"output_dir {config.output_dir} lies inside the data, {data}; choose another one")


def _file_names(config: ExportConfig, num_pairs: int) -> list[Path]:
    """Return the path of every file; those of Parquet are named as `datasets.load_dataset(folder)` looks for them."""
    count = -(-num_pairs // config.shard_size)
    if config.format == "webdataset":
        return [config.output_dir / f"pairs-{number:06d}.tar" for number in range(count)]
    return [config.output_dir / "data" / f"train-{number:05d}-of-{count:05d}.parquet" for number in range(count)]


def _write(config: ExportConfig, found: Collected, files: list[Path], num_pairs: int, forms: "_Forms") -> None:
    files[0].parent.mkdir(exist_ok=True)
    if config.format == "webdataset":
        with atomic_path(config.output_dir / "README.md") as partial:
            partial.write_text(CARD, encoding="utf-8")
    for left in config.output_dir.rglob(".*.partial"):  # of a run that was killed; nobody else is at work here
        left.unlink()
    pairs = _pairs(found)
    with progress("export", num_pairs, "pairs") as advance:
        for file in files:
            shard = list(islice(pairs, config.shard_size))
            if not file.exists():
                _write_file(config, file, shard, forms)
            advance(len(shard))


def _pairs(found: Collected) -> Iterator[Numbered]:
    counts = np.bincount(found.prompt_codes[found.is_pair], minlength=len(found.prompts))
    for pair, is_pair, code in zip(found, found.is_pair, found.prompt_codes, strict=True):
        if is_pair:
            yield pair, int(counts[code])


def _write_file(config: ExportConfig, file: Path, shard: Iterable[Numbered], forms: "_Forms") -> None:
    if config.format == "webdataset":
        write_tar(file, (pair for pair, _ in shard), forms.suffixes())
        return
    rows = [
        pickapic_row(
            replace(pair, chosen=portable(pair.chosen), rejected=portable(pair.rejected)),
            seed=config.seed,
            soft_labels=config.soft_labels,
            num_pairs_of_prompt=count,
        )
        for pair, count in shard
    ]
    write_shard(file, rows, PICKAPIC)


class _Forms:
    """The forms that the images of an export have (`suffix_of`), counted while the data is looked at."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self._lock = Lock()

    def look(self, row: int, pair: PreferencePair, images: tuple[Any, Any]) -> None:
        """Count the images of a pair; called in threads."""
        found = {side: suffix_of(data) for side in SIDES if (data := getattr(pair, side))}
        if {"chosen", "rejected"} <= found.keys():
            with self._lock:
                for side, suffix in found.items():
                    self._counts[side][suffix] += 1

    def suffixes(self) -> dict[str, str]:
        """Return the one format that all images of a side have: theirs, or PNG where they differ; only of sides that
        are there.
        """
        found = {side: counts for side, counts in self._counts.items() if counts}
        return {
            side: next(iter(counts)) if side != "mask" and len(counts) == 1 and "" not in counts else "png"
            for side, counts in found.items()
        }

    def num_rewritten(self, format_: str) -> int:
        """Return how many images are written as PNG instead of the bytes that they were."""
        kept = self.suffixes() if format_ == "webdataset" else {}
        return sum(
            count
            for side, counts in self._counts.items()
            for suffix, count in counts.items()
            if (side != "mask" or side in kept) and (not suffix or kept.get(side, suffix) != suffix)
        )


def _say_what_is_lost(config: ExportConfig, found: Collected, forms: _Forms) -> None:
    rewritten = forms.num_rewritten(config.format)
    if rewritten:
        several = ", or another image of their side is of another format" if config.format == "webdataset" else ""
        say(
            f"{rewritten} images are written as upright PNG with the same pixels, because other programs would show "
            f"them differently (turned by EXIF, AVIF, TIFF, GIF, BMP, transparent){several}"
        )
    if config.format != "pickapic":
        return
    probabilities = [record.label_prob for record in found.records if record.is_pair]
    unsure = sum(0.5 < it < 1 for it in probabilities)
    ties = sum(it == 0.5 for it in probabilities)
    if unsure and not config.soft_labels:
        warn(f"the labels of {unsure} pairs are probabilities, and became 1 and 0; soft_labels=true keeps them")
    if ties:
        warn(f"{ties} pairs are ties, label_0 = label_1 = 0.5, which most trainers leave out")
    if found.has_masks:
        warn("the pairs have masks, which Pick-a-Pic has no column for; format=webdataset keeps them")


def _how_to_read(config: ExportConfig, files: list[Path]) -> str:
    """Return the line of Python that reads the files."""
    if config.format == "pickapic":
        return f'datasets.load_dataset("{config.output_dir}", split="train")'
    names = f"{config.output_dir}/pairs-{{{0:06d}..{len(files) - 1:06d}}}.tar"
    return f'webdataset.WebDataset("{names}"), or datasets.load_dataset("{config.output_dir}", split="train")'
