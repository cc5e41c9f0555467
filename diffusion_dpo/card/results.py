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

    baseline: str
    """Where the baseline is from, in words."""
    num_prompts: int
    seeds_per_prompt: int
    metrics: tuple[Result, ...]


def read_results(path: Path, run: Path) -> Results:
    """Read report.json, or the folder that holds one: what it says of the model that a run folder made.

    Raises ConfigError when it is no such file, or is of other models. Version 2 lists `results`, by model and
    category, of which those over all categories are taken; version 1 lists `metrics`. Numbers that inform only stay
    out of the card, as does what a version does not have.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        entries = report["results"] if "results" in report else report["metrics"]
        adapters = {
            name: model.get("adapter_path") for name, model in report.get("made_with", {}).get("models", {}).items()
        }
        names = list(dict.fromkeys(entry.get("model") for entry in entries))
        ours = [name for name in names if _is_of(adapters.get(name), run)]
        shown = ours or [name for name in names if not _is_elsewhere(adapters.get(name))]
        metrics = tuple(
            _result(entry)
            for entry in entries
            if [entry.get("model")] == shown and not entry.get("category") and not entry.get("auxiliary")
        )
        baseline = str(report.get("baseline", {}).get("description") or "the base")
        numbers = int(report.get("num_prompts", 0)), int(report.get("seeds_per_prompt", 0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not the report.json of a comparison: {error}") from error
    if names and len(shown) != 1:
        raise ConfigError(
            f"{file} compares {', '.join(map(str, names))}, and does not say which one {run} is; give a comparison in "
            "which it is the only one that is made from it"
        )
    return Results(baseline, *numbers, metrics)


def _is_of(adapter_path: str | None, run: Path) -> bool:
    return adapter_path is not None and Path(adapter_path).resolve().is_relative_to(run.resolve())


def _is_elsewhere(adapter_path: str | None) -> bool:
    """Whether an adapter is there, so that it is not that of a run which was moved."""
    return adapter_path is not None and Path(adapter_path).exists()


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
