"""report.html and the numbers behind it: the page of a comparison, the same for a model card, and its plots."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_dpo.files import atomic_path, write_json
from diffusion_dpo.report import (
    BASELINE,
    Gallery,
    MetricResult,
    MetricScores,
    ModelFacts,
    Pair,
    Report,
    Sign,
    charts,
    words,
)
from diffusion_dpo.report import gallery as pictures
from diffusion_dpo.report.gallery import SMALL_PX, Selection
from diffusion_dpo.report.markdown import headline_table, render_markdown
from diffusion_dpo.report.page import LONG_PROMPT, asset, fill, flatten
from diffusion_dpo.report.plots import write_plots
from diffusion_dpo.report.statistics import pair_differences, prompt_means

_GROUPS = {"held_out": "Held out", "human": "People", "related": "Related", "trained_on": "Trained on"}
_MAX_CATEGORIES = 24
_MAX_LINES = 4
"""Of a curve."""


def write_report(
    folder: Path, report: Report, scores: Sequence[MetricScores], gallery: Gallery, *, embed: bool
) -> Path:
    """Write report.json, prompts.jsonl, report.md, plots/ and report.html into a folder; return the path of the page.

    `scores` are what `report.results` summarise. prompts.jsonl has one prompt a line, with every metric's mean over
    its seeds by model and the difference to the baseline; null where nothing could be scored. With `embed` the page
    holds a selection of the images, else all are in report_assets/ beside it.
    """
    write_json(folder / "report.json", report.model_dump(mode="json"))
    plots = write_plots(folder / "plots", report, scores)
    if embed:
        pictures.clear_assets(folder, keep=set())
        selection = _embedded(report, scores, gallery)
    else:
        shape = (len(gallery.prompts), report.seeds_per_prompt)
        selection = pictures.write_assets(folder, pictures.choose_pairs(scores, shape), gallery)
    texts = {
        "prompts.jsonl": "".join(_prompt_lines(scores, gallery)),
        "report.md": render_markdown(report, plots),
        "report.html": render(report, scores, gallery, selection),
    }
    for name, text in texts.items():
        with atomic_path(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / "report.html"


def render(
    report: Report, scores: Sequence[MetricScores], gallery: Gallery, selection: Selection | None = None
) -> str:
    """Return the page, with its images inside unless they are elsewhere. The same comparison gives the same bytes."""
    selection = selection or _embedded(report, scores, gallery)
    embedded = selection.shown[0].sources[0].startswith("data:")
    return fill(
        "report.html.j2",
        style=asset("report.css"),
        script=asset("report.js"),
        images="data:" if embedded else "'self'",
        report=report,
        blocks=[_block(report, number, scores) for number in range(len(report.models))],
        overview=_overview(report) if len(report.models) > 1 else None,
        metrics=[metric.name for metric in scores],
        categories=_categories(report),
        cards=_cards(report, scores, selection, gallery),
        selection=selection,
        embedded=embedded,
        pixelated=max(selection.width_px, selection.height_px) <= SMALL_PX,
        num_pairs=len(gallery.prompts) * report.seeds_per_prompt,
        data=_data(report, scores, gallery, selection, embedded=embedded),
        facts=list(flatten(report.made_with)),
        charts=charts,
        long=LONG_PROMPT,
    )


def _embedded(report: Report, scores: Sequence[MetricScores], gallery: Gallery) -> Selection:
    limit = min(pictures.MAX_PAIRS, pictures.MAX_IMAGES // (1 + len(report.models)))
    pairs = pictures.choose_pairs(scores, (len(gallery.prompts), report.seeds_per_prompt), limit=max(24, limit))
    images = gallery.read(pairs)
    return pictures.embed([(pair, images[pair]) for pair in pairs])


# --- the numbers of every prompt -------------------------------------------------------------------------------------


def _prompt_lines(scores: Sequence[MetricScores], gallery: Gallery) -> Iterator[str]:
    means: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for metric in scores:
        baseline = prompt_means(metric.values[BASELINE])
        means[metric.name] = {BASELINE: (baseline, np.full_like(baseline, np.nan))}
        for model in metric.values:
            if model != BASELINE:
                means[metric.name][model] = prompt_means(metric.values[model]), paired_means(metric, model)[2]
    rows = zip(gallery.prompts, gallery.categories, gallery.seeds, strict=True)
    for i, (prompt, category, seeds) in enumerate(rows):
        metrics = {
            name: {
                model: {"mean": _finite(mean[i])}
                | ({} if model == BASELINE else {"difference": _finite(difference[i])})
                for model, (mean, difference) in by_model.items()
            }
            for name, by_model in means.items()
        }
        row = {"prompt": prompt, "category": category, "seeds": list(seeds), "metrics": metrics}
        yield json.dumps(row) + "\n"


def paired_means(metric: MetricScores, model: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each prompt's mean of the baseline, the model and the difference, over pairs that are scored on both."""
    differences = pair_differences(metric, model)
    known = np.isfinite(differences)
    baseline, other = (prompt_means(np.where(known, metric.values[name], np.nan)) for name in (BASELINE, model))
    return baseline, other, prompt_means(differences)


# --- the parts of the page -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table of metrics."""

    result: MetricResult
    whisker: charts.Whisker | None
    places: int | None
    """The decimals of its numbers, the same in a whole column."""


@dataclass(frozen=True)
class Block:
    """What the page says of one model."""

    number: int
    facts: ModelFacts
    headline: MetricResult
    others: list[MetricResult]
    cautions: list[str]
    groups: list[tuple[str, list[Row]]]
    corrected: str
    columns: list[MetricResult]
    """The metrics that are taken apart by category."""
    by_category: list[tuple[str, int, list[Row]]]
    panels: list[dict[str, Any]]
    signs: list[Sign]


def _block(report: Report, number: int, scores: Sequence[MetricScores]) -> Block:
    facts = report.models[number]
    results = report.of(facts.name)
    headline = words.headline(report, facts.name)
    signs = [sign for sign in report.signs if sign.model == facts.name]
    told = {sign.name for sign in signs}
    shown = sorted((it for it in results if not (it.auxiliary and it.name in told)), key=words.rank)
    places = [words.places_of(result) for result in shown]
    rows = [Row(*row) for row in zip(shown, charts.forest(shown), places, strict=True)]
    groups = [
        (title, [row for row in rows if not row.result.auxiliary and row.result.role == role])
        for role, title in _GROUPS.items()
    ]
    groups.append(("For information", [row for row in rows if row.result.auxiliary]))
    by_name = {metric.name: metric for metric in scores}
    return Block(
        number=number,
        facts=facts,
        headline=headline,
        others=[it for it in shown if it is not headline and not it.auxiliary],
        cautions=words.cautions(report, facts.name),
        groups=[(title, some) for title, some in groups if some],
        corrected=words.corrected(results),
        columns=_columns(shown),
        by_category=_by_category(report, facts.name, [it.name for it in _columns(shown)]),
        panels=[_panel(by_name[result.name], result) for result in shown],
        signs=[sign for sign in signs if not sign.warns],
    )


def _columns(results: Sequence[MetricResult]) -> list[MetricResult]:
    return [it for it in results if not it.auxiliary] or list(results)


def _categories(report: Report) -> list[str]:
    """The categories that have results, the largest first, those that are too many left out."""
    known = {result.category for result in report.results}
    named = [name for name in report.categories if name in known]
    return sorted(named, key=lambda name: -report.categories[name])[:_MAX_CATEGORIES]


def _by_category(report: Report, model: str, metrics: Sequence[str]) -> list[tuple[str, int, list[Row]]]:
    categories = _categories(report)
    found = {(it.name, it.category): it for it in report.results if it.model == model}
    columns = []
    for name in metrics:
        results = [found[name, category] for category in categories]
        columns.append(_column(results, words.places_of(found[name, ""])))
    return [
        (category, report.categories[category], [column[i] for column in columns])
        for i, category in enumerate(categories)
    ]


def _overview(report: Report) -> dict[str, Any]:
    """All models by the main metrics: a table with a forest plot in every cell, and the curves of their win rates."""
    names = [it.name for it in _columns(sorted(report.of(report.models[0].name), key=words.rank))]
    found = {(it.model, it.name): it for it in report.results if not it.category}
    by_metric = [[found[model.name, name] for model in report.models] for name in names]
    columns = [_column(results, words.places_of(results[0])) for results in by_metric]
    return {
        "columns": [results[0] for results in by_metric],
        "rows": [(model, [column[i] for column in columns]) for i, model in enumerate(report.models)],
        "curve": charts.curve([model.name for model in report.models], by_metric[:_MAX_LINES]),
    }


def _column(results: Sequence[MetricResult], places: int | None) -> list[Row]:
    """Results of one metric on one axis, with the same decimals."""
    return [
        Row(it, mark, places) for it, mark in zip(results, charts.forest(results, charts.CELL_WIDTH_PX), strict=True)
    ]


def _panel(metric: MetricScores, result: MetricResult) -> dict[str, Any]:
    places = words.places_of(result)
    baseline, model, differences = paired_means(metric, result.model)
    return {
        "result": result,
        "histogram": charts.histogram(differences, result, places),
        "scatter": charts.scatter(baseline, model, result),
    }


# --- the images ------------------------------------------------------------------------------------------------------


def _cards(
    report: Report, scores: Sequence[MetricScores], selection: Selection, gallery: Gallery
) -> list[dict[str, Any]]:
    """What the cards say before the page's script sorts them: the headline's metric of the first model."""
    head = words.headline(report)
    values = next(metric.values for metric in scores if metric.name == head.name)
    places = words.places_of(head)

    def say(pair: Pair) -> str:
        before, after = (_finite(values[name][pair]) for name in (BASELINE, head.model))
        return f"{head.name} {words.number(before, places)} \u2192 {words.number(after, places)}"

    return [
        {
            "number": number,
            "prompt": words.clean(gallery.prompts[shown.pair.prompt]),
            "seed": gallery.seeds[shown.pair.prompt][shown.pair.seed],
            "scores": say(shown.pair),
            "sources": shown.sources,
        }
        for number, shown in enumerate(selection.shown)
    ]


def _data(
    report: Report, scores: Sequence[MetricScores], gallery: Gallery, selection: Selection, *, embedded: bool
) -> dict[str, Any]:
    """What the page's script works with. Seeds are texts: they have 63 bits, and a number of JavaScript has 53."""
    prompts = sorted({shown.pair.prompt for shown in selection.shown})
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    models = [model.name for model in report.models]
    places = {result.name: words.places_of(result) for result in report.of(models[0])}
    spread = [pictures.disagreement(scores, model) for model in models]
    return {
        "models": [BASELINE, *models],
        "prompts": [
            {
                "number": prompt + 1,
                "text": words.clean(gallery.prompts[prompt]),
                "category": words.clean(gallery.categories[prompt]),
            }
            for prompt in prompts
        ],
        "cards": [
            [row_of[prompt], str(gallery.seeds[prompt][seed]), seed]
            for prompt, seed in (it.pair for it in selection.shown)
        ],
        "sources": None if embedded else [it.sources for it in selection.shown],
        "disagreement": [[_short(values[it.pair]) for it in selection.shown] for values in spread],
        "metrics": [
            {
                "name": metric.name,
                "higherIsBetter": metric.higher_is_better,
                "places": places[metric.name],
                "values": [
                    [_short(metric.values[model][it.pair]) for model in (BASELINE, *models)] for it in selection.shown
                ],
            }
            for metric in scores
        ],
        "markdown": [headline_table(report, model) for model in models],
        "long": LONG_PROMPT,
        "size": [selection.width_px, selection.height_px],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
