"""metrics.jsonl is read whatever a crash left of it, and what could not be read is said."""

import json
import math
from itertools import chain

import numpy as np
import pytest

from diffusion_dpo.report.alarms import Average
from diffusion_dpo.report.training_log import Curve, read_log, running_average
from tests.report.training_runs import LEVELS, make_lines, make_log


def test_curves_hold_what_was_logged() -> None:
    lines = list(make_lines(60))
    log = read_log(lines)
    rows = [json.loads(line) for line in lines]
    assert (log.first_step, log.last_step, log.num_steps, log.notes) == (1, 60, 60, ())
    assert log.curve("loss").values.tolist() == [row["loss"] for row in rows]
    assert log.curve("eval/accuracy").steps.tolist() == [20, 40, 60]
    assert log.points("eval/accuracy")[-1] == (60, 0.65, 0.03)
    assert log.noise_levels == list(LEVELS)
    excess = [row["errors/chosen"] / row["errors/reference_chosen"] - 1 for row in rows]
    assert np.allclose(log.curve("errors/chosen_excess").values, excess, rtol=0, atol=1e-15)


@pytest.mark.parametrize("cut", range(1, 300, 13))
def test_a_last_line_cut_anywhere_is_left_out(cut: int) -> None:
    lines = list(make_lines(5))
    log = read_log([*lines[:4], lines[4][:cut]])
    assert log.num_steps == 4 and len(log.notes) == 1 and "half-written" in log.notes[0]


@pytest.mark.parametrize(
    "damaged",
    ["\x00\x00\x00\n", "[]\n", "{}\n", '{"step": "3"}\n', '{"step": true}\n', '{"step": -1}\n', "[" * 100_000 + "\n"],
)
def test_damaged_lines_are_counted(damaged: str) -> None:
    lines = list(make_lines(5))
    log = read_log([*lines[:2], damaged, *lines[2:]])
    assert log.num_steps == 5 and log.notes == ("Of metrics.jsonl, 1 line could not be read.",)


def test_numbers_that_are_none_are_gaps() -> None:
    values = ["null", "NaN", "-Infinity", "1" + "0" * 400, "1e300", "0.5", "true", '"x"', "[1]"]
    log = read_log(f'{{"step": {i}, "loss": {value}}}\n' for i, value in enumerate(values, start=1))
    assert log.curve("loss").steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert log.finite("loss").values.tolist() == [0.5]
    assert log.num_steps == 9


def test_a_run_that_was_continued_shows_what_it_did_last() -> None:
    log = read_log(chain(make_lines(50), list(make_lines(80, lambda step: {"loss": 9.0}))[30:]))
    assert log.curve("loss").steps.tolist() == list(range(1, 81))
    assert (log.curve("loss").values == 9).tolist() == [False] * 30 + [True] * 50
    assert log.notes == ("20 steps logged twice: what was logged last is shown.",)


def test_the_running_average_is_the_one_that_training_watches() -> None:
    values = np.random.default_rng(0).normal(size=50)
    smooth, errors = running_average(Curve(np.arange(50), values))
    average = Average()
    for value in values.tolist():
        average.add(value)
    assert smooth.values[-1] == average.mean and errors[-1] == average.standard_error
    assert math.isclose(smooth.values[1], 0.95 * values[0] + 0.05 * values[1])
    assert make_log().smooth("no such metric")[0].steps.size == 0
