"""What a folder of candidates holds: counts, scores, whether the judges agree, repeats, and how they were made."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion_dpo.config import command
from diffusion_dpo.console import progress
from diffusion_dpo.data import Dropped
from diffusion_dpo.data.candidates import Candidate, Unit, find_candidates
from diffusion_dpo.data.collect import in_order
from diffusion_dpo.data.contact_sheet import Block, Tile
from diffusion_dpo.data.images import BrokenImage, decode_rgb, pixel_hash
from diffusion_dpo.data.left_out import describe
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.scores import MetricFacts, Verdict, read_all_verdicts, read_facts
from diffusion_dpo.report.agreement import Tau, agreement
from diffusion_dpo.report.appearance import Appearance, look_at, near_duplicates
from diffusion_dpo.report.data_page import (
    Findings,
    Scores,
    Sheet,
    blank_text,
    describe_tau,
    drop_rows,
    kept,
    score_text,
    sizes,
    spread,
    spread_evenly,
)
from diffusion_dpo.report.prompt_warnings import prompt_warnings
from diffusion_dpo.report.words import count

_MISSING = Verdict(math.nan, "")


@dataclass(frozen=True)
class _Seen:
    """What is kept of a candidate that decodes; `key` finds its scores, `uid` is its pixel hash."""

    number: int
    where: str
    prompt: str
    no_prompt: str
    group: str
    key: str
    uid: str
    settings_hash: str
    looks: Appearance


def look_at_candidates(path: Path, num_images: int, prompt_column: str | None = None) -> Findings:
    """Look at every image once, and at those that are shown a second time."""
    there = find_candidates(path, prompt_column)
    units = there.units
    facts = read_facts(path) if path.is_dir() else {}
    verdicts = read_all_verdicts(path, facts) if facts else {}
    seen: list[_Seen] = []
    dropped: list[Dropped] = []
    with progress("looking", sum(unit.num_images for unit in units), "images") as advance:
        for it in in_order(_look, _numbered(units)):
            advance()
            if isinstance(it, Dropped):
                dropped.append(it)
            else:
                seen.append(it)
    groups: dict[str, list[_Seen]] = defaultdict(list)
    for it in seen:
        groups[it.group].append(it)
    values = {name: [verdicts.get(it.key, {}).get(name, _MISSING).value for it in seen] for name in facts}
    taus = _taus(groups, facts, verdicts)
    prompts = [group for group in groups if group]
    held = f"{count(len(seen), 'images')} under {count(len(prompts), 'prompts')}" if prompts else f"{len(seen)} images"
    shown = {key: {name: it.value for name, it in row.items() if facts[name].main} for key, row in verdicts.items()}
    column = {} if prompt_column is None else {"prompt_column": prompt_column}
    blocks = _blocks(units, list(groups.values()), shown, num_images)
    return Findings(
        headline=f"{held}.",
        tiles=(
            ("Images", f"{len(seen):,}"),
            ("Prompts", f"{len(prompts):,}"),
            ("Dropped", f"{len(dropped):,}"),
            ("Metrics", f"{len(facts):,}"),
        ),
        rows=(
            ("kind", "candidates" if prompts else "images without prompts"),
            ("images", f"{len(seen)} of {len(seen) + len(dropped)} can be used"),
            ("prompts", f"{len(prompts)} different; images each: {spread(map(len, groups.values()))}"),
            ("without a prompt", _without(seen)),
            ("image sizes", sizes(it.looks.size_px for it in seen)),
            *_repeats(seen, groups),
            *((name, _score_line(it)) for name, it in values.items()),
            *((f"tau of {tau.first}, {tau.second}", describe_tau(tau)) for tau in taus if tau.num_prompts),
            *drop_rows(dropped),
            ("left out", describe(there.left_out)),
        ),
        warnings=(
            *_mixed_settings(seen),
            *prompt_warnings({it.prompt: it.where for it in reversed(seen) if it.prompt}),
        ),
        dropped=tuple(dropped),
        next_command=command("pair" if facts else "score", {"path": str(path)} | column) if seen else "",
        sheets=(Sheet("Examples", blocks),) if blocks else (),
        sides=("images", ""),
        scores=tuple(Scores(name, np.array(it, dtype=float), np.empty(0)) for name, it in values.items()),
        taus=tuple(taus),
        is_oriented=True,
    )


def _numbered(units: Sequence[Unit]) -> Iterator[tuple[int, Candidate]]:
    return enumerate(candidate for unit in units for candidate in unit.read())


def _look(numbered: tuple[int, Candidate]) -> _Seen | Dropped:
    number, it = numbered
    if it.broken:
        return Dropped(it.where, it.broken)
    try:
        image = decode_rgb(it.data)
    except BrokenImage as error:
        return Dropped(it.where, str(error))
    looks = look_at(image, it.data)
    return _Seen(
        number, it.where, it.prompt, it.no_prompt, it.group, it.key, pixel_hash(image), it.settings_hash, looks
    )


def _without(seen: Sequence[_Seen]) -> str:
    """Say how many images have no prompt, and why, by the reason; "" when all have one."""
    names: dict[str, list[str]] = defaultdict(list)
    for it in seen:
        if not it.group:
            names[it.no_prompt or "no prompt"].append(it.where)
    return "; ".join(f"{len(where)} x {reason} ({some(where)})" for reason, where in names.items())


def _taus(
    groups: dict[str, list[_Seen]], facts: dict[str, MetricFacts], verdicts: dict[str, dict[str, Verdict]]
) -> list[Tau]:
    """Return how alike the judges order the distinct images of a prompt."""
    metrics = [name for name, fact in facts.items() if not fact.auxiliary]
    lower = frozenset(name for name in metrics if not facts[name].higher_is_better)
    keys = [{it.uid: it.key for it in group}.values() for name, group in groups.items() if name]
    prompts = ([{name: it.value for name, it in verdicts.get(key, {}).items()} for key in part] for part in keys)
    return agreement(prompts, metrics, lower_is_better=lower)


def _repeats(seen: Sequence[_Seen], groups: dict[str, list[_Seen]]) -> list[tuple[str, str]]:
    repeats = len(seen) - len({(it.group, it.uid) for it in seen})
    near = sum(
        near_duplicates(list({it.uid: it.looks.cells for it in group}.values()))
        for name, group in groups.items()
        if name
    )
    return [
        ("same image again", f"{repeats} (under the same prompt)"),
        ("nearly the same image again", f"{near} (under the same prompt)"),
        ("blank images", blank_text(sum(it.looks.is_blank for it in seen), len(seen))),
    ]


def _mixed_settings(seen: Sequence[_Seen]) -> Iterator[str]:
    """Warn of images that were drawn with different settings: their labels may tell settings apart, not images."""
    hashes = Counter(it.settings_hash for it in seen if it.settings_hash)
    if len(hashes) > 1:
        counts = ", ".join(f"{amount} x {name}" for name, amount in hashes.most_common(4))
        more = ", ..." if len(hashes) > 4 else ""
        yield (
            f"the images were drawn with {len(hashes)} different settings (settings_hash: {counts}{more}); pairs "
            "across them may prefer settings rather than images: keep one folder for each, unless the mixture is meant"
        )


def _score_line(values: Sequence[float]) -> str:
    missing = sum(map(math.isnan, values))
    return spread(values) + (f"; {missing} without a score" if missing else "")


def _blocks(
    units: Sequence[Unit], groups: Sequence[Sequence[_Seen]], scores: dict[str, dict[str, float]], num_images: int
) -> list[Block]:
    """Return the images of prompts that are spread evenly over the data, with their main scores."""
    if not groups or not num_images:
        return []
    largest = min(max(map(len, groups)), num_images)
    chosen = [group[:largest] for group in spread_evenly(groups, max(1, num_images // largest))]
    wanted = {it.number for group in chosen for it in group}
    images = {number: kept(decode_rgb(it.data)) for number, it in _numbered(units) if number in wanted}
    blocks = []
    for group in chosen:
        captions = [score_text(scores.get(it.key, {})) or it.where for it in group]
        tiles = [Tile(images[it.number], caption) for it, caption in zip(group, captions, strict=True)]
        blocks.append(Block(group[0].prompt, tuple(tiles)))
    return blocks
