"""What is an alarm: the thresholds, averages and sentences that a training run and the report on it share.

Falling losses hide trouble: the loss looks at the difference of two errors, and both may rise (Diffusion-SDPO,
2511.03317).
"""

import math
from dataclasses import dataclass

DECAY = 0.95
"""Share of a running average that is kept at every step: it looks back over about 20 steps."""
FEWEST_STEPS = 20
"""Nothing is said of fewer steps."""
SPIKE = 10.0
"""How many times its running average a gradient's norm may be."""
LOGIT_LIMIT = 20.0
"""What the mean margin of rewards may be; a sigmoid of it is 1 up to 2e-9."""
SATURATED = 0.98
"""Implicit accuracy on training pairs from which on nothing is left to learn."""
WORSE = 0.01
"""What the error of chosen images may rise above the reference's, relatively, before it is told."""
SURE = 3.0
"""Standard errors that a running average has to be beyond its threshold."""

FORGETS = "the policy forgets what was liked along with what was not"
KEEP_CHOSEN = (
    "Try safeguard_mu=0.9, regularizers.sft (of beta / 4 it pulls as strongly as the loss), a smaller learning_rate "
    "or a larger beta"
)
STOP_EARLIER = "Compare eval/accuracy, and stop earlier or take more pairs"
CALM_GRADIENT = "a smaller learning_rate, warmup_steps, or a larger batch"
FLAT_OR_EXPLODES = "where the loss is flat or explodes: beta or learning_rate is too large"


@dataclass
class Average:
    """Exponential moving average and variance; None before the first value."""

    mean: float | None = None
    variance: float = 0.0
    """Weighted, around the mean; too small by the share that `squares` says."""
    squares: float = 1.0
    """Sum of the squared weights of the values in the mean: the first one weighs much for a while."""

    def add(self, value: float) -> None:
        """Take in the value of a step."""
        if self.mean is None:
            self.mean = value
            return
        change = value - self.mean
        self.mean += (1 - DECAY) * change
        self.variance = DECAY * (self.variance + (1 - DECAY) * change**2)
        self.squares = DECAY**2 * self.squares + (1 - DECAY) ** 2

    @property
    def standard_error(self) -> float:
        """Of the mean, values being independent; 0 before the second one."""
        return math.sqrt(self.variance * self.squares / (1 - self.squares)) if self.squares < 1 else 0.0


def is_worse(excess: float, standard_error: float) -> bool:
    """Whether chosen images are predicted worse than by the reference, and not by chance; `excess` is relative."""
    return excess > max(WORSE, SURE * standard_error)


def is_spike(grad_norm: float, before: float | None) -> bool:
    """Whether a gradient's norm jumped above its running average `before`; infinite, fp16 skipped the step."""
    return bool(before) and SPIKE * (before or 0.0) < grad_norm < math.inf


def is_large(margin: float) -> bool:
    """Whether a mean margin of rewards is where the loss does not work any more."""
    return abs(margin) > LOGIT_LIMIT
