"""How well one number, which nobody meant to prefer, predicts which image of a pair is chosen.

For pairs, whose sides are interchangeable, the area under the ROC curve (AUC) of a number x that guesses "the larger x
is the chosen one" is P(x_chosen > x_rejected) + P(x_chosen = x_rejected) / 2: 0.5 is chance, 1 and 0 decide every
label. Pairs of a prompt resemble each other, so they are averaged within each prompt, then over prompts, and the 95 %
interval is that of `statistics.share_interval`, which takes the prompt as the unit.

A category (model, sampler, file format) has no order. Each of its values has a win rate: the share of the pairs with
this value on one side alone in which that side is chosen. To order the values by it and ask how well that order
predicts the same labels would be biased upwards. So the prompts are split at random into two halves, the values are
ordered by their win rates in one half, (wins + 1) / (pairs + 2), and the order is judged on the other half, both ways:
AUC is again P(rate_chosen > rate_rejected) + P(equal) / 2, and on average 0.5 where labels are random.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diffusion_dpo.report import Interval
from diffusion_dpo.report.statistics import share_interval
from diffusion_dpo.report.words import percent

LOUD_ABOVE = 0.65
"""An AUC above this, or below 1 minus this, is warned of where its interval excludes 0.5."""
MAX_VALUES = 12
"""A text with more different values than this is no category."""
METHOD = (
    "AUC is the share of pairs in which the chosen image has the larger number, equal ones as one half, averaged "
    "within each prompt, then over prompts; 0.5 is chance. The 95 % interval is Wilson's at the effective number of "
    "prompts, widened to include 0.5 unless a sign-flip test over prompts rejects it. Values of a category are "
    "ordered by their win rates on one half of the prompts and judged on the other half, both ways."
)
_ADJECTIVES = {
    "brightness": ("brighter", "darker"),
    "saturation": ("more saturated", "less saturated"),
    "sharpness": ("sharper", "less sharp"),
    "colorfulness": ("more colourful", "less colourful"),
    "file size": ("larger as files", "smaller as files"),
    "pixels": ("larger in pixels", "smaller in pixels"),
    "aspect ratio": ("wider in shape", "taller in shape"),
}


@dataclass(frozen=True)
class ValueRate:
    """How often the side with one value of a category is chosen, among pairs with that value on one side alone."""

    value: str
    rate: float
    interval: Interval | None
    num_pairs: int


@dataclass(frozen=True)
class Predictor:
    """How well one number, or category, predicts which side is chosen; `auc` is None where nothing can be said."""

    name: str
    auc: float | None
    interval: Interval | None
    num_pairs: int
    """Pairs in which both sides have a value."""
    num_equal: int
    """Those of them in which it is the same on both sides."""
    num_prompts: int
    values: tuple[ValueRate, ...] = ()
    """The values of a category, the most chosen first; () for a number."""
    labelled: bool = False
    """Whether it is what labelled the pairs, and so is meant to predict."""

    @property
    def varies(self) -> bool:
        """Whether it differs in any pair."""
        return self.num_equal < self.num_pairs

    @property
    def is_loud(self) -> bool:
        """Whether to warn of it. A category's order is made to point upwards, so only a high AUC says something."""
        if self.labelled or self.auc is None or self.interval is None or self.interval[0] <= 0.5 <= self.interval[1]:
            return False
        return self.auc > LOUD_ABOVE or (not self.values and self.auc < 1 - LOUD_ABOVE)

    @property
    def sentence(self) -> str:
        """`chosen images are brighter in 78 % of the pairs (AUC 0.78, 95 % interval 0.70 to 0.84)`."""
        if self.auc is None:
            return f"nothing can be said of {self.name}"
        interval = f", 95 % interval {self.interval[0]:.2f} to {self.interval[1]:.2f}" if self.interval else ""
        numbers = f"(AUC {self.auc:.2f}{interval})"
        if self.values:
            best = self.values[0]
            return (
                f"{self.name} predicts which image is chosen {numbers}: {best.value} is chosen in "
                f"{percent(best.rate)} of the {best.num_pairs} pairs with it on one side alone"
            )
        higher, lower = _ADJECTIVES.get(self.name, (f"higher in {self.name}", f"lower in {self.name}"))
        share = percent(max(self.auc, 1 - self.auc))
        ties = ", equal ones as one half" if self.num_equal else ""
        return f"chosen images are {higher if self.auc >= 0.5 else lower} in {share} of the pairs{ties} {numbers}"


def number(name: str, sides: Sequence[np.ndarray], prompts: np.ndarray) -> Predictor:
    """Return how well a number predicts. `sides` are its values of chosen and of rejected images, NaN where missing,
    and `prompts` says which prompt a pair is of; all of shape (num_pairs,).
    """
    chosen, rejected = sides
    known = np.isfinite(chosen) & np.isfinite(rejected)
    return _predictor(name, np.sign(chosen[known] - rejected[known]), prompts[known])


def category(name: str, sides: Sequence[Sequence[str | None]], prompts: np.ndarray) -> Predictor:
    """Return how well a category predicts: the same with texts, None where one is not known."""
    chosen, rejected = sides
    known = np.array([a is not None and b is not None for a, b in zip(chosen, rejected, strict=True)], dtype=bool)
    names, codes = np.unique([str(it) for it in (*chosen, *rejected)], return_inverse=True)
    ours, theirs = (part[known] for part in codes.reshape(2, -1))
    groups = prompts[known]
    rates = np.full((2, names.size), 0.5)
    present = np.unique(groups)
    second = np.isin(groups, np.random.default_rng(0).permutation(present)[: present.size // 2]).astype(int)
    for half in (0, 1):
        judged = (second != half) & (ours != theirs)
        wins, losses = (np.bincount(side[judged], minlength=names.size) for side in (ours, theirs))
        rates[half] = (wins + 1) / (wins + losses + 2)
    found = _predictor(name, np.sign(rates[second, ours] - rates[second, theirs]), groups)
    values = []
    for code in np.unique([ours, theirs]):
        decided = (ours != theirs) & ((ours == code) | (theirs == code))
        single = _predictor(str(names[code]), np.where(ours[decided] == code, 1.0, -1.0), groups[decided])
        if single.auc is not None:
            values.append(ValueRate(single.name, single.auc, single.interval, single.num_pairs))
    ranked = tuple(sorted(values, key=lambda it: (-it.rate, it.value)))
    return replace(found, values=ranked, num_equal=int((ours == theirs).sum()))


def origin_keys(origins: Iterable[dict[str, object]]) -> dict[str, bool]:
    """Return the keys of origins that can be compared, sorted: True for a category, False for a number.

    Few different values are a category, whatever they are: the best guidance is not the largest.
    """
    values: dict[str, Counter[str]] = {}
    numeric: dict[str, bool] = {}
    for origin in origins:
        for key, value in origin.items():
            seen = values.setdefault(key, Counter())
            if len(seen) <= MAX_VALUES:
                seen[origin_text(value)] += 1
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            numeric[key] = numeric.get(key, True) and is_number
    few = {key: len(seen) <= MAX_VALUES for key, seen in values.items()}
    return {key: few[key] for key in sorted(values) if few[key] or numeric[key]}


def origin_text(value: object) -> str:
    """Return a value of an origin as the name of a category."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else repr(value)


def _predictor(name: str, outcomes: np.ndarray, prompts: np.ndarray) -> Predictor:
    """`outcomes` (num_pairs,): 1 where the chosen side has more, 0 for equal ones, -1 where it has less."""
    equal = int((outcomes == 0).sum())
    if not outcomes.size:
        return Predictor(name, None, None, 0, 0, 0)
    _, codes, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    per_prompt = np.bincount(codes, outcomes) / counts
    auc = 0.5 + 0.5 * float(per_prompt.mean())
    return Predictor(name, auc, share_interval(per_prompt, outcomes), outcomes.size, equal, per_prompt.size)
