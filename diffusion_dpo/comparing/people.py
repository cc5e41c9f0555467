"""People's votes on the images of a comparison, as a metric beside the judges'."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from diffusion_dpo.comparing import Wall
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.votes import Vote
from diffusion_dpo.report import BASELINE, MetricScores

_VALUES = {"first": -1.0, "tie": 0.0, "both_bad": 0.0, "second": 1.0}
NAME = "people"


def votes_as_scores(votes: Iterable[Vote], wall: Wall, folder: Path) -> list[MetricScores]:
    """Return what people chose as a metric: the baseline is 0, a model 1 where all chose its image, -1 where none did.

    Votes on one pair are averaged; a tie, or both bad, is 0; a pair that nobody saw, or that was skipped, is NaN.
    Raises ConfigError, naming the folder that they are from, where no vote is on these images.
    """
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for vote in votes:
        if vote.choice in _VALUES:
            found[vote.prompt, vote.first_uid, vote.second_uid].append(_VALUES[vote.choice])
    uids = {
        name: [candidate.uid for unit in units for candidate in unit.read(images=False)]
        for name, units in wall.units.items()
    }
    prompts = [prompt.text for prompt in wall.prompts] * wall.num_seeds
    values = {BASELINE: np.zeros((len(wall.prompts), wall.num_seeds))}
    for name in wall.units:
        if name != BASELINE:
            pairs = zip(prompts, uids[BASELINE], uids[name], strict=True)
            means = [float(np.mean(found[pair])) if pair in found else float("nan") for pair in pairs]
            values[name] = wall.arrange(means)
    if all(np.isnan(given).all() for name, given in values.items() if name != BASELINE):
        raise ConfigError(
            f"human={folder}: none of its {len(found)} pairs with votes is of these images; it is of another "
            "comparison, or of other prompts, seeds or models"
        )
    return [MetricScores(NAME, "human", True, values)]
