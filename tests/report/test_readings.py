"""What is read out of curves: on the right side of every threshold, since the right step, and never out of noise."""

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from diffusion_dpo.report import alarms, readings
from diffusion_dpo.report import held_out_readings as held
from diffusion_dpo.report.reading import Reading
from diffusion_dpo.report.readings import read
from diffusion_dpo.report.training_log import Curve, Log, read_log
from diffusion_dpo.training.health import Health
from tests.report.training_runs import Change, make_lines, make_log, nothing, without_evaluation

Reader = Callable[[Log], Reading | None]


def held_out(**values: float) -> Change:
    return lambda step: {f"eval/{name.replace('__', '/')}": value for name, value in values.items()}


def accuracy(value: float, error: float = 0.03) -> Change:
    return held_out(accuracy=value, accuracy__se=error)


def chosen(value: float, error: float = 0.002) -> Change:
    return held_out(chosen_error=value, chosen_error__se=error)


def training(name: str, value: float) -> Change:
    return lambda step: {name: value}


def both(*changes: Change) -> Change:
    return lambda step: {name: value for change in changes for name, value in change(step).items()}


def after(start: int, change: Change, before: Change = nothing) -> Change:
    return lambda step: (change if step >= start else before)(step)


def level(value: float, error: float, overall: float) -> Change:
    name = "eval/log_snr_-4.64/chosen_error"
    return both(chosen(overall), lambda step: {name: value, f"{name}/se": error})


def flat(loss: float, right: float) -> Change:
    """A loss near ln 2, and an accuracy of training pairs that is noisy by 0.1."""

    def change(step: int) -> dict[str, float | None]:
        return {"loss": math.log(2) if step == 1 else loss, "rewards/accuracies": right + 0.1 * (-1) ** step}

    return change


def spikes(size: float, *steps: int) -> Change:
    return lambda step: {"grad_norm": size if step in steps else 1.0}


CASES: list[tuple[Reader, Change, Change, str]] = [
    (held.chosen_error, chosen(0.0099), chosen(0.0101), r"worse than .* \(held-out error \+1\.0.% ± "),
    (held.chosen_error, chosen(0.05, 0.018), chosen(0.05, 0.016), r"worse than by the reference"),
    (held.chosen_error, chosen(-0.0099), chosen(-0.0101), r"better than by the reference"),
    (held.memorising, accuracy(0.56), accuracy(0.54), r"0\.70 while that of held-out pairs is 0\.54 ± 0\.03"),
    (held.memorising, accuracy(0.5, 0.07), accuracy(0.5, 0.06), r"the policy memorises its pairs"),
    (
        held.past_its_best,
        after(100, accuracy(0.63), accuracy(0.75)),
        after(100, accuracy(0.62), accuracy(0.75)),
        r"best at step 20, 0\.75 ± 0\.03, and has fallen to 0\.62",
    ),
    (held.noise_levels, level(0.10, 0.004, 0.045), level(0.1, 0.004, 0.04), r"SNR .4\.64.*almost noise.*\+10.%"),
    (held.noise_levels, level(0.01, 0.001, 0.0), level(0.011, 0.001, 0.0), r"\+1\.1.%, against 0\.00.%"),
    (
        readings.saturated,
        both(training("rewards/accuracies", 0.979), accuracy(0.9)),
        both(training("rewards/accuracies", 0.981), accuracy(0.9)),
        r"on training pairs is 0\.98",
    ),
    (readings.not_moved, flat(0.6800, 0.7), flat(0.6842, 0.7), r"still ln 2 \(0\.684.\) though"),
    (readings.not_moved, flat(0.7050, 0.5), flat(0.7022, 0.5), r"no better than chance .*: nothing was learned"),
    (readings.at_chance, flat(0.90, 0.56), flat(0.90, 0.53), r"from ln 2 to 0\.9, yet .*no better than chance"),
    (readings.at_chance, flat(0.70, 0.5), flat(0.71, 0.5), r"from ln 2 to 0\.71"),
    (
        readings.large_margin,
        training("rewards/margins", 19.9),
        after(150, training("rewards/margins", -20.1)),
        r"beyond ±20 in 51 of 200 steps, the first of them step 150, and .20\.1",
    ),
    (readings.gradient_spikes, spikes(9.9, 50), spikes(10.1, 50), r"10 times its running average at step 50\."),
    (readings.gradient_spikes, spikes(11, 19), spikes(11, 20), r"at step 20\."),
    (readings.skipped_steps, nothing, lambda step: {"grad_norm": None if step < 4 else 1.0}, r"In 3 steps the"),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "below", "above", "says"), CASES)
def test_a_reading_holds_on_one_side_of_its_threshold(reader: Reader, below: Change, above: Change, says: str) -> None:
    assert reader(make_log(below)) is None
    found = reader(make_log(above))
    assert found is not None and re.search(says, found.text), found


@pytest.mark.parametrize(("value", "kind"), [(0.589, "caution"), (0.591, "good"), (0.411, "caution"), (0.409, "bad")])
def test_held_out_accuracy_is_beyond_chance_by_three_standard_errors(value: float, kind: str) -> None:
    found = held.held_out_accuracy(make_log(accuracy(value)))
    assert (found.kind, found.since) == (kind, None if kind == "caution" else 20)
    assert f"{value:.2f} ± 0.03" in found.text


def test_accuracy_without_a_standard_error_claims_nothing() -> None:
    """One prompt has none; and of very few, all may be right, which leaves an error of 0."""
    for error in (0.0, float("nan")):
        found = held.held_out_accuracy(make_log(accuracy(1.0, error)))
        assert found.kind == "caution" and "too few prompts" in found.text
    assert held.held_out_accuracy(without_evaluation()).text.startswith("No held-out pairs were evaluated")


@pytest.mark.parametrize(
    ("reader", "log", "since"),
    [
        (held.held_out_accuracy, make_log(after(90, accuracy(0.7), accuracy(0.5))), 100),
        (held.chosen_error, make_log(after(110, chosen(0.2))), 120),
        (held.chosen_error, make_log(lambda step: chosen(0.2 if step != 160 else 0.0)(step)), 180),
        (held.memorising, make_log(after(61, accuracy(0.5), accuracy(0.65))), 80),
        (readings.saturated, without_evaluation(training("rewards/accuracies", 1.0)), 20),
    ],
)
def test_since_when_is_the_start_of_the_stretch_that_lasts(reader: Reader, log: Log, since: int) -> None:
    found = reader(log)
    assert found is not None and found.since == since


def test_without_held_out_pairs_the_training_pairs_speak() -> None:
    def worse(by: float) -> Log:
        return without_evaluation(lambda step: {"errors/reference_chosen": 1.0, "errors/chosen": 1 + by})

    assert held.chosen_error(worse(0.0099)) is None
    found = held.chosen_error(worse(0.0101))
    assert found is not None and "of the training pairs" in found.text and found.since == alarms.FEWEST_STEPS


def test_a_margin_is_bad_where_it_stays_large() -> None:
    single = readings.large_margin(make_log(lambda step: {"rewards/margins": 25.0 if step == 99 else 1.0}))
    lasting = readings.large_margin(make_log(after(50, training("rewards/margins", 25.0))))
    assert single and (single.kind, single.since) == ("caution", None)
    assert lasting and lasting.kind == "bad" and 50 < (lasting.since or 0) < 100


def test_memorising_is_told_once() -> None:
    log = make_log(both(training("rewards/accuracies", 1.0), accuracy(0.5)))
    assert held.memorising(log) is not None and readings.saturated(log) is None


def test_training_and_its_report_tell_of_the_same_step() -> None:
    """The alarms that training gives while it runs, and what is read from its log afterwards, share their rules."""

    def trouble(step: int) -> dict[str, float | None]:
        worse = {"errors/chosen": 1.05 if step > 90 else 1.0, "errors/reference_chosen": 1.0}
        return worse | {"rewards/accuracies": 1.0 if step > 60 else 0.6, "grad_norm": 30.0 if step == 140 else 1.0}

    health, given = Health(), {}
    for line in make_lines(200, trouble, every=10**9):
        row = json.loads(line)
        for alarm in health.watch(row):
            given[alarm.split()[1].replace("gradient's", "norm")] = row["step"]
    log = without_evaluation(trouble)
    error, right, gradient = (
        held.chosen_error(log),
        readings.saturated(log),
        readings.gradient_spikes(log),
    )
    assert error and right and gradient
    assert (error.since, right.since) == (given["chosen"], given["implicit"])
    assert f"at step {given['norm']}." in gradient.text


def test_noise_is_read_as_nothing() -> None:
    """Seven held-out prompts, eight evaluations, nothing learned: in a thousand runs, hardly a claim."""
    rng = np.random.default_rng(0)
    steps = np.arange(20, 180, 20)
    claims = dict.fromkeys(("accuracy", "best", "error", "memorising"), 0)
    train_steps = np.arange(1, 161)
    for _ in range(1000):
        prompts = rng.normal(0, 0.15, (7, 1)) + rng.normal(0, 0.1, (7, len(steps)))
        mean, error = prompts.mean(0), prompts.std(0, ddof=1) / math.sqrt(7)
        curves = {
            "eval/accuracy": Curve(steps, 0.5 + mean),
            "eval/accuracy/se": Curve(steps, error),
            "eval/chosen_error": Curve(steps, mean / 5),
            "eval/chosen_error/se": Curve(steps, error / 5),
            "rewards/accuracies": Curve(train_steps, 0.5 + rng.normal(0, 0.1, len(train_steps))),
        }
        log = Log(curves, 1, 160, 160)
        claims["accuracy"] += held.held_out_accuracy(log).kind != "caution"
        claims["best"] += held.past_its_best(log) is not None
        claims["error"] += held.chosen_error(log) is not None
        claims["memorising"] += held.memorising(log) is not None
    assert claims["accuracy"] < 50 and claims["error"] < 50, claims
    assert claims["best"] < 50 and claims["memorising"] < 50, claims


@pytest.mark.parametrize("num_steps", [20, 25, 40, 160])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_of_single_steps_is_read_as_nothing_from_the_first_reading_on(num_steps: int, noise: float) -> None:
    """Without held-out pairs only running averages speak, of which the first value weighs much for a while."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, num_steps + 1)
    claims = dict.fromkeys(("error", "moved"), 0)
    for _ in range(500):
        loss = math.log(2) + rng.normal(0, noise, num_steps)
        loss[0] = math.log(2)
        curves = {
            "errors/chosen_excess": Curve(steps, rng.normal(0, noise, num_steps)),
            "loss": Curve(steps, loss),
            "rewards/accuracies": Curve(steps, 0.5 + rng.normal(0, 0.1, num_steps)),
        }
        log = Log(curves, 1, num_steps, num_steps)
        claims["error"] += held.chosen_error(log) is not None
        claims["moved"] += readings.at_chance(log) is not None
    assert max(claims.values()) <= 10, claims


# --- together --------------------------------------------------------------------------------------------------------


def test_a_healthy_run_has_nothing_to_complain_of() -> None:
    found = read(make_log(), relative=True, max_steps=200)
    assert found.headline == "Held-out accuracy is 0.65 ± 0.03, better than chance"
    assert [it.kind for it in found.readings] == ["good", "plain"]


def test_the_headline_says_the_verdict_and_the_worst() -> None:
    found = read(make_log(both(chosen(0.3), spikes(50, 77))), relative=True, max_steps=400)
    assert (
        found.headline == "Held-out accuracy is 0.65 ± 0.03, better than chance, but the policy forgets what was liked"
    )
    assert [it.kind for it in found.readings] == ["good", "bad", "caution", "plain", "plain"]
    assert found.readings[-1].text.startswith("200 of 400 steps are taken so far")
    found = read(make_log(both(flat(math.log(2), 0.5), accuracy(0.5))), relative=True)
    assert found.headline.endswith("cannot be told from chance, and nothing was learned")


def test_few_steps_are_not_read() -> None:
    found = read(make_log(both(chosen(9.0), training("rewards/margins", 99.0)), 19), relative=True, max_steps=19)
    assert found.headline == "Only 19 steps: too few to read anything from"
    assert len(found.readings) == 1
    assert read(make_log(num_steps=1), relative=True).headline.startswith("Only 1 step:")


def test_without_a_reference_nothing_is_said_of_accuracy_and_margin() -> None:
    log = without_evaluation(both(training("rewards/accuracies", 1.0), training("rewards/margins", 500.0)))
    assert len(read(log, relative=True).readings) == 3
    assert len(read(log, relative=False).readings) == 1


def test_a_run_that_reached_its_budget_says_so() -> None:
    log = make_log()  # at step 200 the KL divergence is 2 nats
    assert readings.unfinished(log, 300, 1.9).text == "Training ended at step 200, beyond evaluation.max_kl=1.9."
    assert readings.unfinished(log, 300, 2.1).text.startswith("200 of 300 steps")
    assert readings.unfinished(log, 200) is None


def test_a_second_round_says_how_far_it_is_from_the_pretrained_model() -> None:
    lines = list(make_lines(200))
    second = [json.dumps(json.loads(line) | {"eval/kl_base": 7.0}) if "eval/kl" in line else line for line in lines]
    first_round, second_round = held.divergence(read_log(lines)), held.divergence(read_log(second))
    assert first_round and second_round and "pretrained" not in first_round.text
    assert "2 nats per image from the reference, and 7 from the pretrained model" in second_round.text
