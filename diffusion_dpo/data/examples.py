"""From pairs to examples: the images that share one draw of noise, and that one value of the objective is about.

An objective over pairs sees the two images of a pair; one over single images sees each distinct image of a prompt
once; one over rankings sees several distinct images of a prompt, which is what pairs of one prompt amount to.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.index import PairRecord
from diffusion_dpo.data.lazy import LazySequence

CHOSEN, REJECTED = 0, 1


@dataclass(frozen=True, slots=True)
class Example:
    """K images of one prompt, best first; an image is named by its pair's index in the data and its side."""

    key: str
    """What its randomness is keyed by: the pair id, for pairs."""
    images: tuple[tuple[int, int], ...]
    labels: tuple[float, ...]
    """Probability of each image to be desirable."""
    scores: tuple[float, ...] = ()
    """Of each image, from 0, the worst of the data, to 1, the best; () where nothing looks at them."""
    weight: float = 1.0


@dataclass(frozen=True)
class ScoreTable:
    """One metric over the data, oriented and scaled to [0, 1], and calibrated within each prompt."""

    metric: str
    _values: dict[tuple[str, str], float]

    def of(self, record: PairRecord, side: int) -> float:
        """Return the score of one image; 1 is best."""
        return self._values[record.prompt, uid_of(record, side)]


def uid_of(record: PairRecord, side: int) -> str:
    """Return the pixel hash of one side, "" where it is not there."""
    return record.rejected_uid if side == REJECTED else record.chosen_uid


def split_held_out(
    prompt_keys: np.ndarray, is_pair: np.ndarray, *, share: float, max_pairs: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices to train on and those held out, rising: whole prompts, at most `share` of the data.

    `prompt_keys` are the keys (uint64, see `prompts.prompt_key`) of the N pairs' prompts. Which prompts are held out
    depends on the seed and on the prompts, not on their order. Single images stay, with the pairs of their prompt.
    """
    room = min(int(share * len(prompt_keys)), max_pairs)
    keys, group, sizes = np.unique(prompt_keys, return_inverse=True, return_counts=True)
    allowed = np.bincount(group, weights=~is_pair, minlength=len(keys)) == 0
    held_prompts = np.zeros(len(keys), dtype=bool)
    for prompt in np.argsort(_shuffle(keys, seed), kind="stable") if room else ():
        if allowed[prompt] and sizes[prompt] <= room:
            held_prompts[prompt] = True
            room -= sizes[prompt]
            if not room:
                break
    held = held_prompts[group]
    return np.flatnonzero(~held), np.flatnonzero(held)


def _shuffle(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return pseudo-random numbers (uint64) that depend on the keys and the seed: the finaliser of splitmix64."""
    start = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big")
    mixed = keys ^ np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def read_scores(
    records: Sequence[PairRecord], metric: str, calibrate: Callable[[Sequence[float]], list[float]]
) -> ScoreTable:
    """Return the scores of every image, oriented so that chosen images score higher.

    Raises ConfigError when a score is missing or not finite, when all are equal, and when the metric does not say
    which is better.
    """
    raw: dict[tuple[str, str], float] = {}
    agreement = 0
    for record in records:
        for side, scores in ((CHOSEN, record.chosen_scores), (REJECTED, record.rejected_scores)):
            uid = uid_of(record, side)
            if uid and not math.isfinite(scores.get(metric, math.nan)):
                known = ", ".join(sorted(scores)) or "none"
                raise ConfigError(
                    f"{record.where}: the {('chosen', 'rejected')[side]} image has no finite score {metric!r} (it "
                    f"has: {known}), and this training looks at scores; score and pair again, or set score_metric"
                )
            if uid:
                raw[record.prompt, uid] = scores[metric]
        if record.is_pair:
            agreement += int(np.sign(record.chosen_scores[metric] - record.rejected_scores[metric]))
    low, high = min(raw.values()), max(raw.values())
    if low == high or agreement == 0:
        raise ConfigError(f"score_metric {metric}: its values do not tell chosen from rejected images")
    unit = {
        key: (value - low) / (high - low) if agreement > 0 else (high - value) / (high - low)
        for key, value in raw.items()
    }
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in unit:
        groups.setdefault(key[0], []).append(key)
    calibrated: dict[tuple[str, str], float] = {}
    for keys in groups.values():
        calibrated.update(zip(keys, calibrate([unit[key] for key in keys]), strict=True))
    return ScoreTable(metric, calibrated)


def refuse_single_images(records: Sequence[PairRecord], is_pair: np.ndarray) -> None:
    """Raise ConfigError when there are images that were judged by themselves."""
    alone = np.flatnonzero(~is_pair)
    if len(alone):
        raise ConfigError(
            f"{len(alone)} of {len(records)} rows are single images (e.g. {records[int(alone[0])].where}), and this "
            "objective compares the two images of a pair; take one over single images: loss.type=kto, sft or dco"
        )


def form_examples(
    records: Sequence[PairRecord],
    indices: Sequence[int] | np.ndarray,
    unit: Literal["pair", "image", "chosen", "list"],
    *,
    scores: ScoreTable | None = None,
    list_size: int = 2,
    swap_labels: bool = False,
) -> Sequence[Example]:
    """Return the examples that the pairs at `indices` make; raises ConfigError when they make none.

    `swap_labels` takes what was rejected for chosen, and the worst for the best. Pairs are made when they are asked
    for; images and rankings are kept, a small object each.
    """
    sides = (REJECTED, CHOSEN) if swap_labels else (CHOSEN, REJECTED)
    if unit == "pair":
        return LazySequence(len(indices), lambda i: _pair(records, int(indices[i]), sides, scores))
    if unit == "list":
        assert scores is not None
        examples = list(_lists(records, indices, scores, list_size, swap_labels=swap_labels))
        if not examples:
            raise ConfigError(
                f"no prompt has {list_size} distinct scored images (loss.list_size); pair with strategy=top_bottom "
                "and a larger strategy.top_k, or lower loss.list_size"
            )
    else:
        examples = _single_images(records, indices, sides)
        if unit == "chosen":
            examples = [example for example in examples if example.labels[0] > 0.5]
        if not examples:
            raise ConfigError("there is no image that was chosen, and this objective learns from those alone")
    return examples


def weigh_by_gain(examples: Sequence[Example]) -> list[Example]:
    """Return pairs weighted by |2^s_chosen - 2^s_rejected|, the gain of RankDPO (2410.18013); the mean weight is 1."""
    gains = [abs(2 ** example.scores[0] - 2 ** example.scores[1]) for example in examples]
    mean = sum(gains) / len(gains)
    return [replace(example, weight=gain / mean) for example, gain in zip(examples, gains, strict=True)]


def easiest_first(examples: Sequence[Example]) -> list[Example]:
    """Return pairs in the order of a curriculum: the widest difference of scores first."""
    return sorted(examples, key=lambda example: (-abs(example.scores[0] - example.scores[1]), example.key))


def _pair(records: Sequence[PairRecord], index: int, sides: tuple[int, int], scores: ScoreTable | None) -> Example:
    record = records[index]
    values = () if scores is None else tuple(scores.of(record, side) for side in sides)
    return Example(
        key=record.pair_id,
        images=tuple((index, side) for side in sides),
        labels=(record.label_prob, 1 - record.label_prob),
        scores=values if sides == (CHOSEN, REJECTED) else tuple(1 - value for value in values),
    )


def _single_images(
    records: Sequence[PairRecord], indices: Sequence[int] | np.ndarray, sides: tuple[int, int]
) -> list[Example]:
    """Every distinct image of a prompt once; liked if it was preferred at least once, as in Diffusion-KTO."""
    found: dict[tuple[str, str], Example] = {}
    for index in map(int, indices):
        record = records[index]
        for side, label in zip(sides, (record.label_prob, 1 - record.label_prob), strict=True):
            uid = uid_of(record, side)
            before = found.get((record.prompt, uid))
            if uid and (before is None or before.labels[0] < label):
                key = before.key if before else f"{record.pair_id} {side}"
                found[record.prompt, uid] = Example(key, ((index, side),), (label,))
    return list(found.values())


def _lists(
    records: Sequence[PairRecord],
    indices: Sequence[int] | np.ndarray,
    scores: ScoreTable,
    size: int,
    *,
    swap_labels: bool,
) -> Iterator[Example]:
    """Lists of `size` images of one prompt, best first; of more images, those at evenly spaced ranks."""
    prompts: dict[str, dict[str, tuple[float, tuple[int, int]]]] = {}
    for index in map(int, indices):
        record = records[index]
        for side in (CHOSEN, REJECTED):
            uid = uid_of(record, side)
            if uid:
                score = scores.of(record, side)
                prompts.setdefault(record.prompt, {})[uid] = (1 - score if swap_labels else score, (index, side))
    for prompt, images in prompts.items():
        ranked = sorted(images, key=lambda uid: (-images[uid][0], uid))
        if len(ranked) >= size:
            taken = [ranked[i] for i in np.linspace(0, len(ranked) - 1, size).round().astype(int)]
            yield Example(
                key=" ".join([prompt, *taken]),
                images=tuple(images[uid][1] for uid in taken),
                labels=(1.0, *[0.5] * (size - 2), 0.0),
                scores=tuple(images[uid][0] for uid in taken),
            )
