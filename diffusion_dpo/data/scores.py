"""Scores on disk: shards of raw values, found by the key of what was judged, and the facts of every metric.

`scores-<scorer>.json` says which way each metric points and how the values were made; only rows with its fingerprint
count, so values of two versions of a judge are never compared with each other.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.shards import located_rows, read_columns


@dataclass(frozen=True)
class MetricFacts:
    """What is known of a metric without its scorer. `main` is true for the first metric of each scorer."""

    name: str
    higher_is_better: bool
    main: bool
    auxiliary: bool
    scorer: str
    licence: str
    fingerprint: str


@dataclass(frozen=True)
class Verdict:
    """One value, NaN where the image could not be scored, and then the reason."""

    value: float
    reason: str


def facts_path(folder: Path, scorer: str) -> Path:
    """Return the file with the facts of a scorer's metrics."""
    return folder / f"scores-{scorer}.json"


def shard_path(folder: Path, scorer: str, unit: str) -> Path:
    """Return the file with a scorer's values for one unit of images."""
    return folder / f"scores-{scorer}-{unit}.parquet"


def read_facts(folder: Path) -> dict[str, MetricFacts]:
    """Return the facts of every metric in a folder, by name; raises ConfigError for a file that cannot be read."""
    found = {}
    for path in sorted(folder.glob("scores-*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            for i, metric in enumerate(data["metrics"]):
                found[metric["name"]] = MetricFacts(
                    name=metric["name"],
                    higher_is_better=metric["higher_is_better"],
                    main=i == 0,
                    auxiliary=metric["auxiliary"],
                    scorer=data["scorer"],
                    licence=data["licence"],
                    fingerprint=data["fingerprint"],
                )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(f"cannot read {path}: {error}; run score again") from error
    return found


def read_verdicts(path: Path, fingerprint: str) -> dict[str, dict[str, Verdict]]:
    """Return the values of one shard that a fingerprint made: {key: {metric: verdict}}."""
    found: dict[str, dict[str, Verdict]] = {}
    for _, row in located_rows(path, ["key", "metric", "value", "reason", "fingerprint"]):
        if row["fingerprint"] == fingerprint:
            value = math.nan if row["value"] is None else row["value"]
            found.setdefault(row["key"], {})[row["metric"]] = Verdict(value, row["reason"] or "")
    return found


def read_all_verdicts(folder: Path, facts: dict[str, MetricFacts]) -> dict[str, dict[str, Verdict]]:
    """Return the current values of all metrics of a folder: {key: {metric: verdict}}."""
    found: dict[str, dict[str, Verdict]] = {}
    for scorer, fingerprint in sorted({(fact.scorer, fact.fingerprint) for fact in facts.values()}):
        for path in shards_of(folder, scorer):
            for key, verdicts in read_verdicts(path, fingerprint).items():
                found.setdefault(key, {}).update(verdicts)
    return found


def read_values(folder: Path, facts: Mapping[str, MetricFacts]) -> dict[str, dict[str, float]]:
    """Return the current values of some metrics, {metric: {key: value}}: columns at a time, for very many images.

    NaN where an image could not be scored; raises ConfigError for a shard that cannot be read.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in facts}
    for scorer, fingerprint in sorted({(fact.scorer, fact.fingerprint) for fact in facts.values()}):
        for path in shards_of(folder, scorer):
            columns = read_columns(path, ["key", "metric", "value", "fingerprint"])
            for key, metric, value, made_by in zip(*columns, strict=True):
                if made_by == fingerprint and metric in found:
                    found[metric][key] = math.nan if value is None else value
    return found


def shards_of(folder: Path, scorer: str) -> list[Path]:
    """Return the shards of one scorer, sorted by name."""
    return sorted(folder.glob(f"scores-{scorer}-*.parquet"))
