"""The plots of a comparison as PNG files, for a model card or a paper: a fixed style, and no date inside."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_dpo.files import atomic_path
from diffusion_dpo.report import MetricResult, MetricScores, Report, charts, words
from diffusion_dpo.report.statistics import pair_differences, prompt_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("metrics.png", "histogram.png", "categories.png", "models.png")
_BETTER, _WORSE, _SAME, _INK, _SOFT, _LINE = "#14699b", "#bf4e12", "#b3afa5", "#1c1b19", "#6a6760", "#e5e2da"
_SERIES = ("#1c1b19", "#9a6bb5", "#4f9a5f", "#b3872a")
_COLORS = {"better": _BETTER, "worse": _WORSE, "same": _SAME, "unclear": _SOFT}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # names are not formulas
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "xtick.color": _SOFT,
    "ytick.color": _INK,
    "figure.facecolor": "white",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 160,
}
_MAX_ROWS = 24
_WIDTH_IN = 7.0


def write_plots(folder: Path, report: Report, scores: Sequence[MetricScores]) -> list[Path]:
    """Write the plots that apply, remove those of an earlier report that do not, and return the paths.

    metrics.png and histogram.png are of the first model; categories.png is there where prompts have categories, and
    models.png where there are several models.
    """
    import matplotlib

    folder.mkdir(exist_ok=True)
    head = words.headline(report)
    figures: dict[str, Figure] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        results = sorted(report.of(head.model), key=words.rank)
        main = [it for it in results if not it.auxiliary] or results
        figures["metrics.png"] = _forest(main, [it.name for it in main], words.claim(report, head))
        metric = next(it for it in scores if it.name == head.name)
        figures["histogram.png"] = _histogram(prompt_means(pair_differences(metric, head.model)), head)
        by_category = [it for it in report.results if it.category and (it.model, it.name) == (head.model, head.name)]
        if by_category:
            by_category = sorted(by_category, key=lambda it: -(report.categories.get(it.category, 0)))[:_MAX_ROWS]
            labels = [f"{words.shorten(it.category, 28)} ({it.num_prompts})" for it in by_category]
            figures["categories.png"] = _forest(by_category, labels, f"{head.name} by category of prompts")
        if len(report.models) > 1:
            figures["models.png"] = _models(report, [it.name for it in main[: len(_SERIES)]])
        for name in NAMES:
            if name in figures:
                with atomic_path(folder / name) as partial:
                    figures[name].savefig(partial, format="png", metadata={"Software": None})
            else:
                (folder / name).unlink(missing_ok=True)
    return [folder / name for name in NAMES if name in figures]


def _canvas(height_in: float) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _forest(results: Sequence[MetricResult], labels: Sequence[str], title: str) -> "Figure":
    figure, axes = _canvas(1.25 + 0.36 * len(results))
    axes.axvline(0, color=_SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
    for row, result in enumerate(results):
        at = charts.standardised(result)
        if at is None:
            continue
        mean, low, high = at
        color = _COLORS[words.verdict(result)]
        axes.plot([low, high], [row, row], color=color, linewidth=1.6, solid_capstyle="butt")
        axes.plot(mean, row, "o", color=color, markersize=6, markeredgecolor="white")
        text = f"{words.number(result.mean_difference, words.places_of(result), signed=True)}"
        axes.annotate(text, (mean, row), (0, 7), textcoords="offset points", ha="center", color=color, fontsize=8)
    axes.set_yticks(range(len(results)), [words.shorten(label, 40) for label in labels])
    axes.set_ylim(len(results) - 0.4, -0.8)
    limit = max(0.25, *(abs(it) for it in axes.get_xlim()))
    axes.set_xlim(-limit, limit)
    axes.set_xlabel("worse  ←  mean difference to the baseline, in standard deviations, 95 % interval  →  better")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _title(axes, title)
    return figure


def _histogram(per_prompt: np.ndarray, result: MetricResult) -> "Figure":
    figure, axes = _canvas(3.0)
    places = words.places_of(result)
    chart = charts.histogram(per_prompt, result, places)
    for bar in chart.bars:
        axes.bar(bar.x, bar.height, bar.width, align="edge", color=_COLORS[bar.kind])
    axes.axvline(chart.zero, color=_SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
    top = max([1.0, *(bar.height for bar in chart.bars)]) * 1.12
    if chart.whisker:
        axes.plot([chart.whisker.low, chart.whisker.high], [top, top], color=_INK, linewidth=1.6)
        axes.plot(chart.whisker.mean, top, "o", color=_INK, markersize=6, markeredgecolor="white")
    axes.set_xticks([tick.at for tick in chart.ticks], [tick.label for tick in chart.ticks])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference of each prompt to the baseline; the dot is the mean with its 95 % interval")
    _title(axes, f"{result.name}, {words.count(result.num_prompts, 'prompts')}")
    return figure


def _models(report: Report, names: Sequence[str]) -> "Figure":
    figure, axes = _canvas(3.4)
    found = {(it.model, it.name): it for it in report.results if not it.category}
    axes.axhline(0.5, color=_SOFT, linewidth=0.8, linestyle=(0, (2, 3)))
    for number, (name, color) in enumerate(zip(names, _SERIES, strict=False)):
        points: list[tuple[float, float, Any]] = []
        for place, model in enumerate(report.models):
            result = found[model.name, name]
            if result.win_rate is not None:
                aside = (number - (len(names) - 1) / 2) * 0.07
                points.append((place + aside, result.win_rate, result.win_rate_interval))
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=color, linewidth=1.2, label=name)
        for x, _, ends in points:
            if ends:
                axes.plot([x, x], ends, color=color, linewidth=1.4)
    axes.set_xticks(range(len(report.models)), [words.shorten(model.name, 16) for model in report.models])
    if len(report.models) > 6:
        axes.tick_params(axis="x", rotation=40)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.legend(frameon=False, fontsize=8)
    _title(axes, "Win rate against the baseline, 95 % interval")
    return figure


def _title(axes: "Axes", text: str) -> None:
    axes.set_title(words.shorten(text, 80))
