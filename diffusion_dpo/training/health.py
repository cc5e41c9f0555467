"""Alarms in plain words: what goes wrong with preference training shows in its metrics before it shows in images.

Their thresholds are those of the report on a run (report/alarms.py).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from diffusion_dpo.report import alarms as limits
from diffusion_dpo.report.alarms import Average


@dataclass
class Health:
    """Running averages over past steps, and which alarms were given; saved with every checkpoint."""

    steps: int = 0
    chosen_excess: Average = field(default_factory=Average)
    accuracy: Average = field(default_factory=Average)
    grad_norm: Average = field(default_factory=Average)
    advantage: Average = field(default_factory=Average)
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
        if self.steps < limits.FEWEST_STEPS:
            return []
        alarms = {}
        excess = self.chosen_excess.mean or 0.0
        if limits.is_worse(excess, self.chosen_excess.standard_error):
            alarms["chosen"] = (
                f"the chosen images are now predicted worse than by the reference (error {excess:+.2%}): "
                f"{limits.FORGETS}. {limits.KEEP_CHOSEN}"
            )
        if relative and (self.accuracy.mean or 0.0) > limits.SATURATED:
            alarms["accuracy"] = (
                f"the implicit accuracy on training pairs has reached {self.accuracy.mean:.0%}: from here on the "
                f"margin grows without learning. {limits.STOP_EARLIER}"
            )
        if limits.is_spike(metrics["grad_norm"], before):
            alarms["gradient"] = (
                f"the gradient's norm jumped to {metrics['grad_norm']:.3g}, from about {before:.3g}. If it happens "
                f"again: {limits.CALM_GRADIENT}"
            )
        if relative and limits.is_large(metrics.get("rewards/margins", 0.0)):
            alarms["logit"] = (
                f"the mean margin of rewards is {metrics['rewards/margins']:.3g}, {limits.FLAT_OR_EXPLODES}"
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
        values: dict[str, Any] = {k: Average(**v) if isinstance(v, dict) else v for k, v in state.items()}
        return cls(**values)
