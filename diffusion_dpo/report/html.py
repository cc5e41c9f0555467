"""report.html and the numbers behind it: the page of a before/after comparison."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_dpo.files import atomic_path, write_json
from diffusion_dpo.report import Gallery, MetricResult, MetricScores, Report, charts, words
from diffusion_dpo.report.gallery import SMALL_PX, Wall, choose_pairs, embed
from diffusion_dpo.report.page import asset, fill
from diffusion_dpo.report.statistics import pair_differences, prompt_means


def write_report(folder: Path, report: Report, scores: Sequence[MetricScores], gallery: Gallery) -> Path:
    """Write report.json, prompts.jsonl and report.html into a folder; return the path of the page.

    `scores` are what `report.metrics` summarise, in the same order. prompts.jsonl has one prompt a line, with every
    metric's mean before and after and their difference over its seeds; null where nothing could be scored.
    """
    assert [metric.name for metric in scores] == [result.name for result in report.metrics]
    write_json(folder / "report.json", report.model_dump(mode="json"))
    texts = {"prompts.jsonl": "".join(_prompt_lines(scores, gallery)), "report.html": render(report, scores, gallery)}
    for name, text in texts.items():
        with atomic_path(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / "report.html"


def render(report: Report, scores: Sequence[MetricScores], gallery: Gallery) -> str:
    """Return the page. It depends on its arguments alone, so the same comparison gives the same bytes."""
    pairs = choose_pairs(scores, (len(gallery.prompts), report.seeds_per_prompt))
    images = gallery.read(pairs)
    wall = embed([(pair, images[pair]) for pair in pairs])
    zipped = list(zip(scores, report.metrics, strict=True))
    return fill(
        "report.html.j2",
        style=asset("report.css"),
        script=asset("report.js"),
        report=report,
        headline=words.headline(report),
        others=[result for result in report.metrics if result is not words.headline(report) and not result.auxiliary],
        rows=sorted(
            zip(report.metrics, charts.forest(report.metrics), strict=True), key=lambda row: words.rank(row[0])
        ),
        panels=[_panel(metric, result) for metric, result in sorted(zipped, key=lambda pair: words.rank(pair[1]))],
        cards=[_card(number, shown.pair, gallery) | {"images": shown} for number, shown in enumerate(wall.shown)],
        wall=wall,
        pixelated=max(wall.width_px, wall.height_px) <= SMALL_PX,
        num_pairs=len(gallery.prompts) * report.seeds_per_prompt,
        data=_data(scores, report.metrics, wall),
        facts=list(_flatten(report.made_with)),
        charts=charts,
    )


def _prompt_lines(scores: Sequence[MetricScores], gallery: Gallery) -> Iterator[str]:
    means = {metric.name: _paired_means(metric) for metric in scores}
    for i, (prompt, seeds) in enumerate(zip(gallery.prompts, gallery.seeds, strict=True)):
        metrics = {
            name: {"before": _finite(before[i]), "after": _finite(after[i]), "difference": _finite(difference[i])}
            for name, (before, after, difference) in means.items()
        }
        yield json.dumps({"prompt": prompt, "seeds": list(seeds), "metrics": metrics}) + "\n"


def _paired_means(metric: MetricScores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each prompt's mean before, after, and of the difference, over the pairs of which both images are scored."""
    differences = pair_differences(metric)
    known = np.isfinite(differences)
    before, after = (prompt_means(np.where(known, values, np.nan)) for values in (metric.before, metric.after))
    return before, after, prompt_means(differences)


def _panel(metric: MetricScores, result: MetricResult) -> dict[str, Any]:
    places = words.places_of(result)
    before, after, differences = _paired_means(metric)
    return {
        "result": result,
        "histogram": charts.histogram(differences, result, places),
        "scatter": charts.scatter(before, after, result, places),
    }


def _card(number: int, pair: tuple[int, int], gallery: Gallery) -> dict[str, Any]:
    prompt, seed = pair
    return {"number": number, "prompt": words.clean(gallery.prompts[prompt]), "seed": gallery.seeds[prompt][seed]}


def _data(scores: Sequence[MetricScores], results: Sequence[MetricResult], wall: Wall) -> dict[str, Any]:
    """What the page's script sorts by: each metric's direction and decimals, and its [before, after] of each card."""
    return {
        "metrics": [
            {
                "name": result.name,
                "higherIsBetter": result.higher_is_better,
                "places": words.places_of(result),
                "values": [
                    [_finite(values[shown.pair]) for values in (metric.before, metric.after)] for shown in wall.shown
                ],
            }
            for metric, result in zip(scores, results, strict=True)
        ]
    }


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _flatten(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested facts as (dotted name, text)."""
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield words.clean(f"{prefix}{name}"), words.clean(text)
