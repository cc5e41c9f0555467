"""Logs of training runs that never were: a run in which all is well, and what is changed of it."""

import json
import math
import random
from collections.abc import Callable, Iterator

from diffusion_dpo.report.training_log import Log, read_log

Change = Callable[[int], dict[str, float | None]]
LEVELS = ("log_snr_+2.73", "log_snr_-0.55", "log_snr_-4.64")


def nothing(step: int) -> dict[str, float | None]:
    return {}


def healthy(num_steps: int, *, every: int = 20) -> Iterator[dict[str, float | None]]:
    """A DPO run: held-out accuracy 0.65 at every evaluation, chosen images neither better nor worse."""
    rng, noise = random.Random(0), 0.02
    for step in range(1, num_steps + 1):
        reference = 0.3 * (1 + rng.gauss(0, noise))
        row: dict[str, float | None] = {
            "step": step,
            "loss": math.log(2) if step == 1 else 0.6 + rng.gauss(0, noise),
            "rewards/chosen": 0.1 + rng.gauss(0, noise),
            "rewards/rejected": -0.3 + rng.gauss(0, noise),
            "rewards/margins": 0.4 + rng.gauss(0, noise),
            "rewards/accuracies": 0.7 + rng.gauss(0, noise),
            "errors/chosen": reference * (1 + rng.gauss(0, noise / 10)),
            "errors/rejected": 1.02 * reference,
            "errors/reference_chosen": reference,
            "errors/reference_rejected": reference,
            "grad_norm": 1 + rng.gauss(0, noise),
            "learning_rate": 1e-5,
        }
        if step % every == 0:
            row |= {"eval/accuracy": 0.65, "eval/accuracy/se": 0.03, "eval/loss": 0.62, "eval/loss/se": 0.02}
            row |= {"eval/chosen_error": 0.0, "eval/chosen_error/se": 0.002, "eval/kl": step / 100}
            row |= {"eval/rejected_error": 0.02, "eval/rejected_error/se": 0.002}
            for level in LEVELS:
                row |= {f"eval/{level}/accuracy": 0.65, f"eval/{level}/accuracy/se": 0.08}
                row |= {f"eval/{level}/chosen_error": 0.0, f"eval/{level}/chosen_error/se": 0.002}
        yield row


def make_lines(num_steps: int, change: Change = nothing, *, every: int = 20) -> Iterator[str]:
    """Lines of metrics.jsonl; a change to a name that a step does not have is left out, like one of another run."""
    for row in healthy(num_steps, every=every):
        changed = {name: value for name, value in change(int(row["step"] or 0)).items() if name in row}
        yield json.dumps(row | changed) + "\n"


def make_log(change: Change = nothing, num_steps: int = 200, *, every: int = 20) -> Log:
    return read_log(make_lines(num_steps, change, every=every))


def without_evaluation(change: Change = nothing, num_steps: int = 200) -> Log:
    return make_log(change, num_steps, every=10**9)
