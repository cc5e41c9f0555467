"""report.md: the headline, its table and the signs, made to be put into a model card. All text is escaped."""

import re
from collections.abc import Sequence
from pathlib import Path

from diffusion_dpo.report import MetricResult, Report, words

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~>$-])")
_CHARACTERS = 300
_ROLES = {"held_out": "held out", "human": "people", "related": "related", "trained_on": "trained on"}
_CAPTIONS = {
    "metrics.png": "Every metric: the mean difference to the baseline with its 95 % interval, in standard deviations",
    "histogram.png": "The difference of each prompt",
    "categories.png": "By category of prompts",
    "models.png": "Win rates of all models",
}


def render_markdown(report: Report, plots: Sequence[Path]) -> str:
    """Return report.md, which shows the plots by their names in `plots/`."""
    head = words.headline(report)
    lines = [f"## {escape(words.claim(report, head))}", "", f"{escape(_detail(head))}.", ""]
    for model in report.models:
        if len(report.models) > 1:
            lines += [f"### {escape(model.name)}", "", f"{escape(model.description)}", ""]
        lines += [headline_table(report, model.name), ""]
        corrected = words.corrected(report.of(model.name))
        lines += [escape(corrected), ""] if corrected else []
        cautions = words.cautions(report, model.name)
        lines += [*(f"- **{escape(it)}**" for it in cautions), ""] if cautions else []
        calm = [sign for sign in report.signs if sign.model == model.name and not sign.warns]
        lines += [*(f"- {escape(words.capital(report, it.sentence))}." for it in calm), ""] if calm else []
    for plot in plots:
        lines += [f"![{_CAPTIONS[plot.name]}]({plot.parent.name}/{plot.name})", ""]
    power = words.power(report)
    lines += [escape(power), ""] if power else []
    lines += ["### How the numbers were computed", ""]
    lines += [f"- **{escape(name)}**: {escape(text)}" for name, text in report.methods.items()]
    return "\n".join(lines) + "\n"


def headline_table(report: Report, model: str) -> str:
    """Return the main metrics of one model as a table of Markdown, all metrics where none is a main one."""
    results = sorted(report.of(model), key=words.rank)
    main = [result for result in results if not result.auxiliary] or results
    head = [
        "Metric",
        "Role",
        escape(report.baseline.name),
        escape(model),
        "Difference, 95 % interval",
        "Win rate, 95 % interval",
        "Prompts",
        "p, Holm",
    ]
    return "\n".join([_row(head), "| --- | --- |" + " ---: |" * (len(head) - 2), *map(_result_row, main)])


def _detail(result: MetricResult) -> str:
    return f"{words.detail(result)}; win rate {words.percent(result.win_rate)} ({words.win_interval(result)})"


def escape(text: str) -> str:
    """Return text on one line that Markdown and the HTML in it show as it is, shortened where it is very long."""
    flat = words.shorten(text, _CHARACTERS).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"^(\d+)\.", r"\1\\.", _SPECIAL.sub(r"\\\1", flat)).replace("://", ":\u200b//")


def _result_row(result: MetricResult) -> str:
    places = words.places_of(result)
    direction = "" if result.higher_is_better else " (lower is better)"
    holm = result.p_holm if result.p_holm is not None else result.p_value
    return _row(
        [
            escape(result.name + direction),
            _ROLES[result.role],
            words.number(result.mean_baseline, places),
            words.number(result.mean, places),
            f"{words.number(result.mean_difference, places, signed=True)} ({words.interval(result)})",
            f"{words.percent(result.win_rate)} ({words.win_interval(result)})",
            f"{result.num_prompts:,}",
            words.p_text(holm).replace("<", "&lt;"),
        ]
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
