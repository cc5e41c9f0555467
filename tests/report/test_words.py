"""The sentences of a report: a change is claimed only where the interval excludes zero."""

import numpy as np
import pytest

from diffusion_dpo.report import BASELINE, MetricScores, ModelFacts, Report, Role, Sign, words
from diffusion_dpo.report.statistics import METHODS, summarise_all


def report(*metrics: MetricScores, **more: object) -> Report:
    num_prompts, seeds = metrics[0].values[BASELINE].shape
    names = list(metrics[0].values)
    facts = [ModelFacts(name=name, description="", weights="") for name in names]
    made = Report(
        prompt_set="held-out prompts",
        num_prompts=num_prompts,
        seeds_per_prompt=seeds,
        baseline=facts[0],
        models=tuple(facts[1:]),
        results=tuple(summarise_all(metrics, [""] * num_prompts)),
        methods=METHODS,
        made_with={},
    )
    return made.model_copy(update=more)


def metric(name: str, role: Role, higher: bool, baseline: np.ndarray, *others: np.ndarray) -> MetricScores:
    names = ("tuned", "other")[: len(others)]
    return MetricScores(name, role, higher, {BASELINE: baseline, **dict(zip(names, others, strict=True))})


def shifted(*shifts: float, name: str = "clip", role: Role = "held_out", higher: bool = True) -> MetricScores:
    rng = np.random.default_rng(0)
    before = rng.normal(0.7, 0.1, size=(64, 1))
    return metric(name, role, higher, before, *(before + it + rng.normal(0, 0.1, size=(64, 1)) for it in shifts))


def sentence(scores: MetricScores) -> str:
    made = report(scores)
    return words.sentence(made, made.results[0])


def test_a_clear_rise() -> None:
    text = sentence(shifted(0.08))
    assert text.startswith("On 64 held-out prompts, clip rose from 0.7")
    assert "95\u00a0% interval +0.0" in text and "zero" not in text


def test_an_interval_with_zero_is_called_that() -> None:
    assert "did not change measurably" in sentence(shifted(0.0))
    assert "which includes zero" in sentence(shifted(0.0))


def test_a_fall_of_a_metric_where_lower_is_better() -> None:
    made = report(shifted(-0.08, higher=False))
    assert words.verdict(made.results[0]) == "better"
    assert "fell" in words.sentence(made, made.results[0])
    assert "lower is better" in words.sentence(made, made.results[0])


def test_ties_one_prompt_and_nothing_scored() -> None:
    same = np.full((5, 2), 0.5)
    assert "the same for both, 0.500 (all 10 pairs tie)" in sentence(metric("m", "held_out", True, same, same))
    one = sentence(metric("m", "held_out", True, np.zeros((1, 1)), np.ones((1, 1))))
    assert one.startswith("On 1 held-out prompt, m went from") and "no interval" in one
    none = sentence(metric("m", "held_out", True, same, np.full((5, 2), np.nan)))
    assert "no pair could be scored" in none


def test_the_headline_is_held_out() -> None:
    roles = [("labels", "trained_on"), ("kin", "related"), ("scene", "held_out")]
    made = report(*(shifted(0.1, name=name, role=role) for name, role in roles))
    assert words.headline(made).name == "scene"
    assert [it.name for it in sorted(made.results, key=words.rank)] == ["scene", "kin", "labels"]


def test_of_several_models_each_sentence_says_whose_it_is() -> None:
    made = report(shifted(0.1, 0.0))
    assert words.sentence(made, words.headline(made)).startswith("On 64 held-out prompts with tuned, clip rose")
    assert words.claim(made, words.headline(made, "other")).startswith(
        "On 64 held-out prompts with other, clip did not"
    )


def sign(model: str, *, warns: bool) -> Sign:
    text = "the images are brighter"
    return Sign(model=model, name="brightness", baseline=0, value=1, warns=warns, sentence=text)


def test_signs_that_warn_are_cautions_of_their_model() -> None:
    made = report(shifted(0.1, 0.1), signs=(sign("tuned", warns=True), sign("other", warns=False)))
    assert words.cautions(made) == ["tuned: the images are brighter."]
    assert words.cautions(made, "tuned") == ["The images are brighter."]
    assert words.cautions(made, "other") == []


def test_what_the_comparison_cannot_show_is_a_caution() -> None:
    pleased = report(shifted(0.1, role="trained_on"))
    assert words.cautions(pleased) == ["No metric is held out from the training pairs, so a rise here proves little."]
    known = [it.model_copy(update={"num_prompts_trained_on": 5}) for it in pleased.models]
    seen = report(shifted(0.1), models=tuple(known))
    assert words.cautions(seen)[0].startswith("5 of 64 prompts were in the training pairs")
    assert "With 1 prompt, intervals" in words.cautions(report(metric("m", "held_out", True, *np.zeros((2, 1, 1)))))[0]
    holes = shifted(0.1)
    holes.values["tuned"][:2] = np.nan
    assert words.cautions(report(holes)) == ["clip: 2 pairs of 64 could not be scored, and took no part."]


def test_a_change_that_holms_correction_takes_away_is_told() -> None:
    made = report(shifted(0.1), shifted(0.03, name="scene"), shifted(0.0, name="hps"))
    assert words.corrected(made.results).startswith("After Holm\u2019s correction for 3 metrics, clip ")
    lost = made.model_copy(
        update={"results": tuple(it.model_copy(update={"p_holm": 0.2}) for it in made.results)},
    )
    assert words.corrected(lost.results).endswith("none changed at a level of 5\u00a0%.")
    assert words.cautions(lost)[0].startswith("clip") and "it may be chance" in words.cautions(lost)[0]
    assert words.corrected(report(shifted(0.1)).results) == ""


def test_how_many_prompts_it_takes() -> None:
    made = report(shifted(0.1), prompts_needed={"0.55": 783, "0.6": 194})
    assert "55\u00a0% takes 783 prompts and 60\u00a0% takes 194 prompts, judged by clip" in words.power(made)
    assert words.power(report(shifted(0.1))) == ""


@pytest.mark.parametrize("p,text", [(None, "\u2013"), (1e-9, "<\u00a00.001"), (0.0312, "0.031"), (0.5, "0.50")])
def test_p_values(p: float | None, text: str) -> None:
    assert words.p_text(p) == text


@pytest.mark.parametrize("names,text", [(["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")])
def test_lists(names: list[str], text: str) -> None:
    assert words.listed(names) == text


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


def test_a_model_that_nobody_voted_on_is_headed_by_its_judges() -> None:
    votes = np.where(np.arange(64)[:, None] < 12, 1.0, np.nan)
    people = metric("people", "human", True, np.zeros((64, 1)), votes, np.full((64, 1), np.nan))
    made = report(people, shifted(0.08, 0.08, role="trained_on"))
    assert words.headline(made, "tuned").name == "people" and words.headline(made, "other").name == "clip"
    assert "people: 52 pairs of 64 have no vote, and took no part." in words.cautions(made, "tuned")
    assert any(it.startswith("No metric is held out") for it in words.cautions(made, "other"))
    assert not any(it.startswith("No metric is held out") for it in words.cautions(made, "tuned"))


def test_it_is_said_where_nothing_says_what_labelled() -> None:
    made = report(shifted(0.08))
    unknown = made.model_copy(update={"models": (made.models[0].model_copy(update={"labelled_by": None}),)})
    assert any("nothing says what labelled" in it.lower() for it in words.cautions(unknown))
    assert not any("nothing says what labelled" in it.lower() for it in words.cautions(made))


@pytest.mark.parametrize(
    "votes,text",
    [
        (
            np.ones((64, 1)),
            "people preferred tuned (win rate 100\u00a0%, 95\u00a0% interval 94\u00a0% to 100\u00a0%, 64 pairs)",
        ),
        (-np.ones((64, 1)), "people preferred the baseline (win rate 0\u00a0%"),
        (np.tile([[1.0], [-1.0]], (32, 1)), "people preferred neither measurably (win rate 50\u00a0%"),
        (
            np.tile([[1.0], [-1 / 3]], (32, 1)),
            "people preferred neither measurably (win rate 50\u00a0%",
        ),  # three raters
        (np.zeros((64, 1)), "people preferred neither (win rate 50\u00a0%"),
    ],
)
def test_what_people_said_is_said_as_a_preference(votes: np.ndarray, text: str) -> None:
    assert f"On 64 held-out prompts, {text}" in sentence(metric("people", "human", True, np.zeros((64, 1)), votes))
