"""A report.json as `compare` writes one, of few numbers."""

from pathlib import Path

import numpy as np

from diffusion_dpo.report import BASELINE, MetricScores, ModelFacts, Report
from diffusion_dpo.report.statistics import METHODS, summarise_all
from diffusion_dpo.sampling import adapter_hash


def made_report(run: Path, *, scale: float = 1.0) -> Report:
    """A comparison of a run's adapter, `mine`, and another one that is far better, by two metrics."""
    baseline = np.random.default_rng(0).normal(size=(50, 2))
    values = {BASELINE: baseline, "other": baseline + 9, "mine": baseline + 1}
    scores = [
        MetricScores("clip|x", "held_out", True, values),
        MetricScores("brightness", "held_out", True, values, auxiliary=True),
    ]
    return Report(
        num_prompts=50,
        seeds_per_prompt=2,
        baseline=ModelFacts(name=BASELINE, description="a/secret/base", weights="b"),
        models=(
            ModelFacts(name="other", description="", weights="o", adapter="another"),
            ModelFacts(name="mine", description="", weights="m", adapter=adapter_hash(run), adapter_scale=scale),
        ),
        results=tuple(summarise_all(scores, ["a", "b"] * 25)),
        methods=METHODS,
        made_with={},
    )
