"""Alarms in plain words: what goes wrong with preference training shows in its metrics before it shows in images.

Falling losses hide it: the loss looks at the difference of two errors, and both may rise (Diffusion-SDPO, 2511.03317).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

_DECAY = 0.95
_STEPS_BEFORE_ALARMS = 20
_SPIKE = 10.0
_LOGIT_LIMIT = 20.0
_SATURATED = 0.98
_WORSE = 0.01
"""What the error of chosen images may rise above the reference's, relatively, before it is told."""


@dataclass
class _Average:
    """Exponential moving average and variance; None before the first value."""

    mean: float | None = None
    variance: float = 0.0

    def add(self, value: float) -> None:
        if self.mean is None:
            self.mean = value
            return
        change = value - self.mean
        self.mean += (1 - _DECAY) * change
        self.variance = _DECAY * (self.variance + (1 - _DECAY) * change**2)

    @property
    def standard_error(self) -> float:
        """Of the mean, values being independent."""
        return math.sqrt(self.variance * (1 - _DECAY) / (1 + _DECAY))


@dataclass
class Health:
    """Running averages over past steps, and which alarms were given; saved with every checkpoint."""

    steps: int = 0
    chosen_excess: _Average = field(default_factory=_Average)
    accuracy: _Average = field(default_factory=_Average)
    grad_norm: _Average = field(default_factory=_Average)
    advantage: _Average = field(default_factory=_Average)
    """Of the reference's errors minus the policy's, over all images."""
    given: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> float:
        """How much the policy has gained on any image at all, mean over past steps; 0 at the start."""
        return self.advantage.mean or 0.0

    def watch(self, metrics: Mapping[str, float], *, relative: bool = True) -> list[str]:
        """Take in the metrics of a step; return the alarms that it raises for the first time in the run.

        `relative` says whether rewards are measured against the reference, so that they start at 0.
        """
        before = self.grad_norm.mean
        self.steps += 1
        if "errors/advantage" in metrics:
            self.advantage.add(metrics["errors/advantage"])
        if "errors/chosen" in metrics and metrics.get("errors/reference_chosen"):  # 0 where a timestep weighs nothing
            self.chosen_excess.add(metrics["errors/chosen"] / metrics["errors/reference_chosen"] - 1)
        if "rewards/accuracies" in metrics:
            self.accuracy.add(metrics["rewards/accuracies"])
        if math.isfinite(metrics["grad_norm"]):
            self.grad_norm.add(metrics["grad_norm"])
        if self.steps < _STEPS_BEFORE_ALARMS:
            return []
        alarms = {}
        excess = self.chosen_excess.mean or 0.0
        if excess > max(_WORSE, 3 * self.chosen_excess.standard_error):
            alarms["chosen"] = (
                f"the chosen images are now predicted worse than by the reference (error {excess:+.2%}): the policy "
                "forgets what was liked along with what was not. Try safeguard_mu=0.9, regularizers.sft (of beta "
                "/ 4 it pulls as strongly as the loss), a smaller learning_rate or a larger beta"
            )
        if relative and (self.accuracy.mean or 0.0) > _SATURATED:
            alarms["accuracy"] = (
                f"the implicit accuracy on training pairs has reached {self.accuracy.mean:.0%}: from here on the "
                "margin grows without learning. Compare eval/accuracy, and stop earlier or take more pairs"
            )
        if before and _SPIKE * before < metrics["grad_norm"] < math.inf:  # inf: fp16, and the step was skipped
            alarms["gradient"] = (
                f"the gradient's norm jumped to {metrics['grad_norm']:.3g}, from about {before:.3g}. If it happens "
                "again: a smaller learning_rate, warmup_steps, or a larger batch"
            )
        if relative and abs(metrics.get("rewards/margins", 0.0)) > _LOGIT_LIMIT:
            alarms["logit"] = (
                f"the mean margin of rewards is {metrics['rewards/margins']:.3g}, where the loss is flat or explodes: "
                "beta or learning_rate is too large"
            )
        fresh = [name for name in alarms if name not in self.given]
        self.given += fresh
        return [alarms[name] for name in fresh]

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain JSON, exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Return what `to_json` gave."""
        values: dict[str, Any] = {k: _Average(**v) if isinstance(v, dict) else v for k, v in state.items()}
        return cls(**values)
