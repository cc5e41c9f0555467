"""Our own pairs: what `pair` and `label` write, what `train` reads unless told otherwise."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.columns import spelled_rows
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.layout import find_settings
from diffusion_dpo.data.rows import each_of, make_pair, number
from diffusion_dpo.data.splits import FileData
from diffusion_dpo.files import read_manifest

_REQUIRED = ("prompt", "chosen", "rejected")
_OPTIONAL = (
    "mask",
    "has_mask",
    "chosen_uid",
    "rejected_uid",
    "chosen_scores",
    "rejected_scores",
    "chosen_origin",
    "rejected_origin",
    "margin",
    "margin_norm",
    "label_prob",
    "strategy",
    "source",
)


class PairsData(FileData):
    """Parquet with `prompt`, `chosen` and `rejected`, as `diffusion-dpo pair` writes it; perhaps with a `mask`."""

    path: Path = Path("runs/pairs")
    """A folder of pairs, or one Parquet file."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource; with columns that name models or scores of the two images, `hub` reads more of them."""
        ours = found.has(*_REQUIRED) and not found.is_text
        more = ("chosen_origin" not in found.columns and find_settings(found.columns)) or {}
        return {} if ours and not {"model_columns", "score_columns"} & more.keys() else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every row; ids are taken from the content, so that an edited file cannot carry stale ones."""
        for file in self.files():
            for where, row in spelled_rows(file, _REQUIRED, _OPTIONAL):
                for place, chosen, rejected in each_of(where, row["chosen"], row["rejected"]):
                    yield _read_row(place, row | {"chosen": chosen, "rejected": rejected})

    def rows_in(self, file: Path) -> int:
        """See FileData; of lists of images, the number of the longer side's images."""
        from diffusion_dpo.data import shards

        return shards.num_rows(file, _REQUIRED[1:])

    def labelled_by(self) -> tuple[str, ...]:
        """Return what `pair` wrote into the manifests beside the files; a manifest of another make says nothing."""
        return labelled_by(self.path)


def labelled_by(path: Path) -> tuple[str, ...]:
    """Return the metrics that labelled, by the manifests beside the Parquet files of a path."""
    from diffusion_dpo.data import shards

    folders = [path] if path.is_dir() else []
    folders += [file.parent for file in shards.parquet_files(path)]
    return tuple(dict.fromkeys(name for folder in dict.fromkeys(folders) for name in _labelled_by(folder)))


def _labelled_by(folder: Path) -> list[str]:
    try:
        names = read_manifest(folder).get("labelled_by")
    except ConfigError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def pair_row(pair: PreferencePair, *, seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Return a pair as a row of `shards.PAIRS`; `seeds` are those of chosen and rejected, if we drew them."""
    from diffusion_dpo.data.shards import image_struct

    return {
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "chosen": image_struct(pair.chosen),
        "rejected": image_struct(pair.rejected),
        "chosen_uid": pair.chosen_uid,
        "rejected_uid": pair.rejected_uid,
        "chosen_scores": json.dumps(pair.chosen_scores, sort_keys=True, allow_nan=False),
        "rejected_scores": json.dumps(pair.rejected_scores, sort_keys=True, allow_nan=False),
        "chosen_origin": json.dumps(pair.chosen_origin, sort_keys=True),
        "rejected_origin": json.dumps(pair.rejected_origin, sort_keys=True),
        "margin": pair.margin,
        "margin_norm": pair.margin_norm,
        "label_prob": pair.label_prob,
        "strategy": pair.strategy,
        "seeds": list(seeds),
        "source": pair.source,
    }


def _read_row(where: str, row: dict[str, Any]) -> PreferencePair | Dropped:
    label_prob = row.get("label_prob")
    if label_prob is None:
        label_prob = 1.0
    if not isinstance(label_prob, int | float) or not 0.5 <= label_prob <= 1:
        return Dropped(where, "label_prob is not between 0.5 and 1")
    margins = [row.get(name) for name in ("margin", "margin_norm")]
    if any(it not in (None, "null") and number(it) is None for it in margins):
        return Dropped(where, "the margin is not a number")
    margin, margin_norm = map(number, margins)
    try:
        chosen_scores, rejected_scores = (_scores(row.get(f"{side}_scores")) for side in ("chosen", "rejected"))
    except ValueError:
        return Dropped(where, "the scores are not a JSON object of numbers")
    try:
        chosen_origin, rejected_origin = (_object(row.get(f"{side}_origin")) for side in ("chosen", "rejected"))
    except ValueError:
        return Dropped(where, "the origins are not a JSON object")
    pair = make_pair(
        where,
        row["prompt"],
        row["chosen"],
        row["rejected"],
        mask=None if row.get("has_mask") is False else row.get("mask"),
        source=str(row.get("source") or ""),
        label_prob=float(label_prob),
    )
    if isinstance(pair, Dropped):
        return pair
    return replace(
        pair,
        chosen_uid=str(row.get("chosen_uid") or ""),
        rejected_uid=str(row.get("rejected_uid") or ""),
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        chosen_origin=chosen_origin,
        rejected_origin=rejected_origin,
        margin=margin,
        margin_norm=margin_norm,
        strategy=str(row.get("strategy") or ""),
    )


def _scores(text: Any) -> dict[str, float]:
    """Read the scores of one image, null for NaN; raises ValueError."""
    scores = {name: math.nan if value is None else value for name, value in _object(text).items()}
    if not all(isinstance(value, int | float) for value in scores.values()):
        raise ValueError(text)
    return scores


def _object(text: Any) -> dict[str, Any]:
    """Read a JSON object; raises ValueError."""
    found = json.loads(text) if isinstance(text, str) and text else text or {}
    if not isinstance(found, dict):
        raise ValueError(text)
    return found
