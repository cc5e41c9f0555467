"""The sentences of a report: a change is claimed only where the interval excludes zero."""

import numpy as np
import pytest

from diffusion_dpo.report import MetricScores, Report, Role, words
from diffusion_dpo.report.statistics import METHODS, summarise


def report(*metrics: MetricScores) -> Report:
    num_prompts, seeds = metrics[0].before.shape
    return Report(
        prompt_set="held-out prompts",
        num_prompts=num_prompts,
        seeds_per_prompt=seeds,
        metrics=tuple(summarise(metric) for metric in metrics),
        methods=METHODS,
        made_with={},
    )


def shifted(shift: float, *, name: str = "clip", role: Role = "held_out", higher: bool = True) -> MetricScores:
    rng = np.random.default_rng(0)
    before = rng.normal(0.7, 0.1, size=(64, 1))
    return MetricScores(name, role, higher, before, before + shift + rng.normal(0, 0.1, size=(64, 1)))


def sentence(metric: MetricScores) -> str:
    made = report(metric)
    return words.sentence(made, made.metrics[0])


def test_a_clear_rise() -> None:
    text = sentence(shifted(0.08))
    assert text.startswith("On 64 held-out prompts, clip rose from 0.7")
    assert "95\u00a0% interval +0.0" in text and "zero" not in text


def test_an_interval_with_zero_is_called_that() -> None:
    assert "did not change measurably" in sentence(shifted(0.0))
    assert "which includes zero" in sentence(shifted(0.0))


def test_a_fall_of_a_metric_where_lower_is_better() -> None:
    made = report(shifted(-0.08, higher=False))
    assert words.verdict(made.metrics[0]) == "better"
    assert "fell" in words.sentence(made, made.metrics[0])
    assert "lower is better" in words.sentence(made, made.metrics[0])


def test_ties_one_prompt_and_nothing_scored() -> None:
    same = np.full((5, 2), 0.5)
    assert "same before and after, 0.500 (all 10 pairs tie)" in sentence(
        MetricScores("m", "held_out", True, same, same)
    )
    one = sentence(MetricScores("m", "held_out", True, np.zeros((1, 1)), np.ones((1, 1))))
    assert one.startswith("On 1 held-out prompt, m went from") and "no interval" in one
    none = sentence(MetricScores("m", "held_out", True, same, np.full((5, 2), np.nan)))
    assert "no pair could be scored" in none


def test_the_headline_is_held_out() -> None:
    made = report(shifted(0.1, role="trained_on"), shifted(0.1, name="scene"))
    assert words.headline(made).name == "scene"


def test_a_judge_that_was_pleased_alone_is_a_caution() -> None:
    fooled = report(shifted(0.1, role="trained_on"), shifted(-0.1, name="scene"))
    assert any("please the judge" in caution for caution in words.cautions(fooled))
    fine = report(shifted(0.1, role="trained_on"), shifted(0.1, name="scene"))
    assert words.cautions(fine) == []


@pytest.mark.parametrize(
    "value,places,text",
    [
        (0.0799, 2, "+0.08"),
        (-0.0799, 2, "\u22120.08"),
        (-0.001, 2, "0.00"),
        (1234.5, 0, "+1,234"),
        (2e-9, None, "+2.00e-09"),
    ],
)
def test_numbers(value: float, places: int | None, text: str) -> None:
    assert words.number(value, places, signed=True) == text


@pytest.mark.parametrize(
    "share,text", [(0.0, "0 %"), (0.001, "< 1 %"), (0.62, "62 %"), (0.999, "> 99 %"), (1.0, "100 %")]
)
def test_percentages_keep_none_and_all(share: float, text: str) -> None:
    assert words.percent(share).replace(words.NBSP, " ") == text


def test_decimals_follow_the_interval() -> None:
    assert words.decimals((0.05, 0.11), (0.7, 0.8)) == 2
    assert words.decimals((-0.008, 0.008), (0.5,)) == 3
    assert words.decimals((100.0, 300.0), (5000.0,)) == 0
    assert words.decimals((1e-9, 3e-9), (0.0,)) is None


def test_unprintable_text_becomes_printable() -> None:
    assert words.clean("a\x00b\ud800c\nd") == "a\ufffdb\ufffdc\nd"
