"""How well one number, which nobody meant to prefer, predicts which image of a pair is chosen.

For pairs, whose sides are interchangeable, the area under the ROC curve (AUC) of a number x that guesses "the larger x
is the chosen one" is P(x_chosen > x_rejected) + P(x_chosen = x_rejected) / 2: 0.5 is chance, 1 and 0 decide every
label. Pairs of a prompt resemble each other, so they are averaged within each prompt, then over prompts, and the 95 %
interval is that of `statistics.share_interval`, which takes the prompt as the unit. A warning needs a p up to 0.05 in
the sign-flip test over prompts, after Holm's correction for all that was looked at.

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
from diffusion_dpo.report.statistics import share_interval, sign_flip_p
from diffusion_dpo.report.words import percent

LOUD_ABOVE = 0.65
"""An AUC above this, or below 1 minus this, is warned of where its interval excludes 0.5."""
MAX_VALUES = 12
"""Of a category with more values than this, the rarest are one value, "others"."""
_MOST_VALUES = 1000
MIN_PAIRS = 20
METHOD = (
    "AUC is the share of pairs in which the chosen image has the larger number, equal ones as one half, averaged "
    "within each prompt, then over prompts; 0.5 is chance. The 95 % interval is Wilson's at the effective number of "
    "prompts, widened to include 0.5 unless a sign-flip test over prompts rejects it. Values of a category are "
    "ordered by their win rates on one half of the prompts and judged on the other half, both ways. A warning needs "
    "a p of at most 0.05 in that test after Holm's correction for everything that was looked at."
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
    p: float = 1.0
    """Of the sign-flip test over prompts that it predicts nothing; `together` corrects it for their number."""

    @property
    def varies(self) -> bool:
        """Whether it differs in any pair."""
        return self.num_equal < self.num_pairs

    @property
    def is_loud(self) -> bool:
        """Whether to warn of it. A category's order is made to point upwards, so only a high AUC says something."""
        return not self.labelled and self.p <= 0.05 and self._is_far(LOUD_ABOVE)

    @property
    def is_untold(self) -> bool:
        """Whether it predicts nearly every label, under too few prompts to tell that from chance."""
        far = not self.labelled and self.num_pairs >= MIN_PAIRS and self._is_far(0.85)
        return far and not self.is_loud

    def _is_far(self, above: float) -> bool:
        return self.auc is not None and (self.auc > above or (not self.values and self.auc < 1 - above))

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


def together(predictors: Sequence[Predictor]) -> list[Predictor]:
    """Return predictors with the p that each has among all of them (Holm 1979): one in twenty is loud by chance alone,
    whatever their number.
    """
    testable = sorted((it.p, i) for i, it in enumerate(predictors) if it.varies and not it.labelled)
    found, least = list(predictors), 0.0
    for rank, (p, i) in enumerate(testable):
        least = max(least, min(1.0, p * (len(testable) - rank)))
        found[i] = replace(found[i], p=least)
    return found


def origin_keys(origins: Iterable[dict[str, object]]) -> dict[str, bool]:
    """Return the keys of origins, sorted: True for a category, False for a number.

    Few different values are a category, whatever they are: the best guidance is not the largest. Texts that are rarely
    the same, such as names of files, are none, and are left out.
    """
    values: dict[str, set[str]] = {}
    total: Counter[str] = Counter()
    numeric: dict[str, bool] = {}
    for origin in origins:
        total.update(origin.keys())
        for key, value in origin.items():
            seen = values.setdefault(key, set())
            if len(seen) <= _MOST_VALUES:
                seen.add(origin_text(value))
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            numeric[key] = numeric.get(key, True) and is_number
    few = {key: len(seen) <= MAX_VALUES for key, seen in values.items()}
    names = {key for key, seen in values.items() if len(seen) > _MOST_VALUES or 2 * len(seen) > total[key]}
    return {
        key: few[key] or not numeric[key] for key in sorted(values) if few[key] or numeric[key] or key not in names
    }


def few_values(sides: Sequence[Sequence[str | None]]) -> list[list[str | None]]:
    """Return a category with the rarest of more than MAX_VALUES values made one, "others"."""
    counts = Counter(it for side in sides for it in side if it is not None)
    kept = {value for value, _ in counts.most_common(MAX_VALUES if len(counts) <= MAX_VALUES else MAX_VALUES - 1)}
    return [[it if it is None or it in kept else "others" for it in side] for side in sides]


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
    interval, p = share_interval(per_prompt, outcomes), sign_flip_p(per_prompt)
    return Predictor(name, auc, interval, outcomes.size, equal, per_prompt.size, p=p)
