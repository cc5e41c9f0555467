"""The numbers of a comparison, read from its report.json for a model card."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError

Interval = tuple[float, float]


@dataclass(frozen=True)
class Result:
    """One metric over all prompts: the tuned model against its baseline."""

    name: str
    role: str
    mean_difference: float | None
    mean_difference_interval: Interval | None
    win_rate: float | None
    win_rate_interval: Interval | None
    p_holm: float | None


@dataclass(frozen=True)
class Results:
    """What a card says of a comparison."""

    num_prompts: int
    seeds_per_prompt: int
    metrics: tuple[Result, ...]


def read_results(path: Path) -> Results:
    """Read report.json, or the folder that holds one; raises ConfigError when it is none.

    Version 2 lists `results`, by model and category, of which the first model's over all categories are taken;
    version 1 lists `metrics`. What a version does not have stays out of the card.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entries = report["results"] if "results" in report else report["metrics"]
        first = next((entry.get("model") for entry in entries), None)
        metrics = tuple(
            _result(entry) for entry in entries if entry.get("model") == first and not entry.get("category")
        )
        return Results(int(report.get("num_prompts", 0)), int(report.get("seeds_per_prompt", 0)), metrics)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not the report.json of a comparison: {error}") from error


def _result(entry: dict[str, Any]) -> Result:
    def number(key: str) -> float | None:
        return None if entry.get(key) is None else float(entry[key])

    def interval(key: str) -> Interval | None:
        value = entry.get(key)
        return None if value is None else (float(value[0]), float(value[1]))

    return Result(
        name=str(entry["name"]),
        role=str(entry.get("role", "")),
        mean_difference=number("mean_difference"),
        mean_difference_interval=interval("mean_difference_interval"),
        win_rate=number("win_rate"),
        win_rate_interval=interval("win_rate_interval"),
        p_holm=number("p_holm"),
    )
