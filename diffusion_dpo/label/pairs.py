"""Votes -> preference pairs that `train` reads."""

import shutil
import uuid
from collections import Counter, defaultdict
from pathlib import Path

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.data.shards import PAIRS, write_shard
from diffusion_dpo.files import put_in_place, write_json
from diffusion_dpo.label.items import IMAGES, Item
from diffusion_dpo.label.study import Study

FOLDER = "pairs"
_PAIRS_PER_SHARD = 256
_Outcome = tuple[bool, float]
"""Whether the second image is chosen, and the probability that the chosen one is better."""


def write_pairs(study: Study, folder: Path) -> tuple[Path, int, dict[str, int]]:
    """Write the pairs that the votes make, in place of those of before; return their folder, how many, and the drops.

    There is no such folder where no pair can be made.
    """
    votes: dict[str, list[str]] = defaultdict(list)
    for vote in study.standing():
        if vote["kind"] == "pair":
            votes[vote["item"]].append(vote["choice"])
    drops: Counter[str] = Counter()
    decided: list[tuple[Item, _Outcome]] = []
    for item_id, choices in votes.items():
        outcome = _decide(choices, soft=study.config.labels == "soft")
        if isinstance(outcome, str):
            drops[outcome] += 1
        else:
            decided.append((study.items[item_id], outcome))
    target = folder / FOLDER
    if not decided:
        if target.exists():  # of votes that were taken back
            shutil.rmtree(target)
        return target, 0, dict(drops)
    staging = folder / f".{FOLDER}.{uuid.uuid4().hex[:8]}.partial"
    staging.mkdir()
    for number, start in enumerate(range(0, len(decided), _PAIRS_PER_SHARD)):
        part = decided[start : start + _PAIRS_PER_SHARD]
        rows = [pair_row(_pair(item, outcome, folder)) for item, outcome in part]
        write_shard(staging / f"pairs-{number:05d}.parquet", rows, PAIRS)
    facts = {"made_by": "label", "complete": True, "num_pairs": len(decided), "drops": dict(drops)}
    write_json(staging / "manifest.json", facts | {"labels": study.config.labels, "labelled_by": ["human"]})
    put_in_place(staging, target)
    return target, len(decided), dict(drops)


def _decide(choices: list[str], *, soft: bool) -> _Outcome | str:
    """Return the outcome of the votes on one item, or why it makes no pair."""
    counts = Counter(choices)
    first, second = counts["first"], counts["second"]
    if not first + second:
        (most, _), *_ = counts.most_common(1)
        return {"tie": "ties", "both_bad": "both bad", "skip": "skipped"}[most]
    if first == second:
        return "votes evenly split"
    if max(first, second) <= counts["tie"] + counts["both_bad"]:
        return "ties"
    return second > first, max(first, second) / (first + second) if soft else 1.0


def _pair(item: Item, outcome: _Outcome, folder: Path) -> PreferencePair:
    second, probability = outcome
    sides = [(item.first_image, item.first_uid), (item.second_image, item.second_uid)]
    (chosen, chosen_uid), (rejected, rejected_uid) = sides[::-1] if second else sides
    data = [(folder / IMAGES / f"{name}.png").read_bytes() for name in (chosen, rejected)]
    return PreferencePair(
        pair_id=pair_id(item.prompt, *data),
        prompt=item.prompt,
        chosen=data[0],
        rejected=data[1],
        label_prob=probability,
        chosen_uid=chosen_uid,
        rejected_uid=rejected_uid,
        strategy="people",
        source="label",
    )
