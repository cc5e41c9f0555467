"""The images of a data set as a table of scores, and which of them become pairs: all of `pair` but the pixels."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from diffusion_dpo.console import warn
from diffusion_dpo.data.candidates import Unit
from diffusion_dpo.data.prompts import prompt_key
from diffusion_dpo.data.scores import MetricFacts
from diffusion_dpo.settings import PairConfig
from diffusion_dpo.strategies import Pick, Strategy
from diffusion_dpo.strategies.plan import Limits, make_table, pick_pairs, spread_within

NO_PROMPT, DUPLICATE = "images without a prompt", "duplicate images"


@dataclass
class Images:
    """All images, without their pixels; an image is a position. A group is one prompt with its references."""

    uids: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    """Raw scores by metric, NaN where there is none."""
    groups: dict[str, list[int]] = field(default_factory=dict)
    """The images of each prompt, prompts in the order of their first image."""
    prompts: dict[str, str] = field(default_factory=dict)
    photos: dict[str, int] = field(default_factory=dict)


class Planned(NamedTuple):
    """A pair: positions of its images, of chosen among the prompt's photographs if `pick.photo`."""

    chosen: int
    rejected: int
    pick: Pick
    swapped: bool = False


Plan = dict[str, list[Planned]]
"""The pairs of every prompt that has some, by group."""


def read_images(
    units: Sequence[Unit],
    values: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, MetricFacts],
    read: Sequence[str],
) -> tuple[Images, Counter[str]]:
    """Return all images with a prompt, each once a prompt, and a start of the drops; `read` are metrics that count."""
    images, drops = Images(values={name: [] for name in values}), Counter[str]()
    seen: set[tuple[str, str]] = set()
    unjudged = Counter[str]()
    settings = set()
    for candidate in (candidate for unit in units for candidate in unit.read(images=False)):
        settings.add(candidate.settings_hash)
        unjudged.update(name for name in read if candidate.key not in values[name])
        if not candidate.prompt.strip():
            drops[NO_PROMPT] += 1
        elif (candidate.group, candidate.uid) in seen:
            drops[DUPLICATE] += 1
        else:
            seen.add((candidate.group, candidate.uid))
            members = images.groups.setdefault(candidate.group, [])
            members.append(len(images.uids))
            images.prompts[candidate.group] = candidate.prompt
            images.photos[candidate.group] = len(distinct(candidate.references))
            images.uids.append(candidate.uid)
            for name, found in values.items():
                images.values[name].append(found.get(candidate.key, math.nan))
    for name, count in unjudged.items():
        warn(f"{count} images were not scored by {facts[name].scorer} in its present version; run score again")
    if len(settings) > 1:
        warn(
            f"the images were made with {len(settings)} different settings; pairs of two of them teach the difference "
            "between the settings. `inspect` on the pairs measures it"
        )
    return images, drops


def plan_pairs(
    config: PairConfig, images: Images, main: str, directions: Mapping[str, bool], drops: Counter[str]
) -> Plan:
    """Return the pairs of every prompt that has some; adds to `drops`."""
    strategy: Strategy = config.strategy
    columns = {name: np.array(images.values[name], dtype=np.float64) for name in strategy.reads(main)}
    groups = np.empty(len(images.uids), dtype=np.intp)
    for number, members in enumerate(images.groups.values()):
        groups[members] = number
    scale = {name: spread_within(column, groups) for name, column in columns.items()}
    limits = Limits(config.min_margin, config.min_margin_norm, config.max_pairs_per_prompt, config.max_pairs_per_image)
    plan: Plan = {}
    for group, members in images.groups.items():
        order = sorted(members, key=lambda i: images.uids[i])
        table, lacking = make_table(
            [images.uids[i] for i in order],
            {name: column[order] for name, column in columns.items()},
            strategy,
            main=main,
            higher_is_better=directions,
            scale=scale,
            missing=config.missing,
            num_photos=images.photos[group],
        )
        place = dict(zip((images.uids[i] for i in order), order, strict=True))
        picks, dropped = pick_pairs(table, strategy, limits)
        drops.update(lacking + dropped)
        planned = [_planned(config, group, pick, [place[uid] for uid in table.uids], images) for pick in picks]
        if planned:
            plan[group] = planned
    return plan


def _planned(config: PairConfig, group: str, pick: Pick, positions: Sequence[int], images: Images) -> Planned:
    chosen = pick.chosen if pick.photo else positions[pick.chosen]
    rejected = positions[pick.rejected]
    swapped = False
    if config.shuffle_labels:
        first = f"photo {chosen}" if pick.photo else images.uids[chosen]
        swapped = _draw(config.seed, "swap", group, first, images.uids[rejected]) < 0.5
    return Planned(chosen, rejected, pick, swapped)


def distinct(references: Sequence[bytes]) -> list[bytes]:
    """Return the photographs of a prompt, each once."""
    return list(dict.fromkeys(references))


def is_test(config: PairConfig, prompt: str) -> bool:
    """Whether a prompt is held out: a function of its text, so that no rewording of a file moves it."""
    return _draw(config.seed, "test", prompt_key(prompt)) < config.test_share


def _draw(*what: object) -> float:
    """Return a number from 0 to 1 that is a function of `what`."""
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest()[:8], "big") / 2**64
