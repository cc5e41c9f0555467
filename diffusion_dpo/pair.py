"""`pair`: scored candidates -> preference pairs. What does not become a pair is counted, with the reason.

Raw values are stored as they are; they are oriented (higher is better) only to be compared.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_dpo.config import ConfigError, command
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.candidates import Candidate, Unit, find_units
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.data.scores import MetricFacts, Verdict, read_all_verdicts, read_facts
from diffusion_dpo.data.shards import PAIRS, write_shard
from diffusion_dpo.files import claim, finish
from diffusion_dpo.settings import PairConfig

_PAIRS_PER_SHARD = 128
NO_SCORE, NO_PROMPT, DUPLICATE = "images without a score", "images without a prompt", "duplicate images"
TOO_FEW = "prompts with fewer than two scored images"
EQUAL, NARROW, CAPPED = "pairs with equal scores", "pairs below min_margin", "pairs over max_pairs_per_prompt"


class Pick(NamedTuple):
    """A pair within one prompt: the positions of its images, and how much better the chosen one is."""

    chosen: int
    rejected: int
    margin: float


def pick_pairs(
    uids: Sequence[str],
    values: Sequence[float],
    *,
    higher_is_better: bool,
    top_k: int | None = None,
    min_margin: float = 0.0,
    max_pairs: int | None = None,
) -> tuple[list[Pick], Counter[str]]:
    """Pair the images of one prompt; return the pairs, widest margin first, and what was dropped, by reason.

    `values` are raw scores, NaN where there is none. Without `top_k` the best image is paired with the worst; with it,
    each of the best k with each of the worst k, k being at most half of the images. Equal scores make no pair, the
    same image counts once, and the result does not depend on the order of the images: ties are broken by uid.
    """
    drops: Counter[str] = Counter()
    images: dict[str, int] = {}
    for i, (uid, value) in enumerate(zip(uids, values, strict=True)):
        if not math.isfinite(value):
            drops[NO_SCORE] += 1
        elif uid in images:
            drops[DUPLICATE] += 1
        else:
            images[uid] = i
    if len(images) < 2:
        return [], drops + Counter({TOO_FEW: 1})
    merit = {uid: values[i] if higher_is_better else -values[i] for uid, i in images.items()}
    k = min(top_k or 1, len(images) // 2)
    best = sorted(merit, key=lambda uid: (-merit[uid], uid))[:k]
    worst = sorted(merit, key=lambda uid: (merit[uid], uid))[:k]
    ranked = sorted(((merit[a] - merit[b], a, b) for a in best for b in worst), key=lambda pair: (-pair[0], *pair[1:]))
    wide = [Pick(images[a], images[b], margin) for margin, a, b in ranked if margin > 0 and margin >= min_margin]
    drops[EQUAL] += sum(margin == 0 for margin, _, _ in ranked)
    drops[NARROW] += sum(0 < margin < min_margin for margin, _, _ in ranked)
    kept = wide[:max_pairs]
    drops[CAPPED] += len(wide) - len(kept)
    return kept, +drops


class _Seen(NamedTuple):
    """An image of a prompt, without its pixels."""

    uid: str
    scores: dict[str, float]


class _Planned(NamedTuple):
    chosen: _Seen
    rejected: _Seen
    margin: float


def run(config: PairConfig) -> Path:
    """Make the pairs that are not there yet; return their folder."""
    beside = config.path if config.path.is_dir() else config.path.parent
    units = find_units(config.path)
    facts = read_facts(config.scores_dir or beside)
    metric = _choose_metric(config, facts)
    higher_is_better = metric.higher_is_better if config.higher_is_better is None else config.higher_is_better
    say(f"pair: {config.strategy} by {metric.name}, {'higher' if higher_is_better else 'lower'} is better")
    prompts, drops = _read_scored(units, read_all_verdicts(config.scores_dir or beside, facts), metric)
    plan = _plan(config, prompts, metric.name, higher_is_better, drops)
    num_pairs = sum(len(pairs) for pairs in plan.values())
    dropped = "; ".join(f"{count} {reason}" for reason, count in sorted(drops.items())) or "nothing"
    if num_pairs == 0:
        raise ConfigError(f"no pairs are left of {config.path}; dropped: {dropped}")
    decisive = {"strategy", "top_k", "min_margin", "max_pairs_per_prompt"}
    identity = config.model_dump(mode="json", include=decisive) | {
        "metric": metric.name,
        "higher_is_better": higher_is_better,
        "scorer": metric.fingerprint,
        "scored_images": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
    }
    with claim(config.output_dir, "pair", identity) as before:
        if before.get("complete"):
            say(f"pair: all {num_pairs} pairs are there already")
        else:
            _write(config, units, plan)
            finish(
                config.output_dir,
                "pair",
                identity,
                num_pairs=num_pairs,
                num_prompts=len(plan),
                labelled_by=[metric.name],
                licence=metric.licence,
                drops=dict(sorted(drops.items())),
            )
    say(f"{num_pairs} pairs of {len(plan)} prompts; dropped: {dropped}")
    say(f"pairs: {config.output_dir}\nnext: {command('train', {'data.path': config.output_dir})}")
    return config.output_dir


def _choose_metric(config: PairConfig, facts: dict[str, MetricFacts]) -> MetricFacts:
    """Return the metric that labels: the one asked for, or the only main one."""
    if not facts:
        raise ConfigError(
            f"there are no scores in {config.scores_dir or config.path}; run: diffusion-dpo score path={config.path}"
        )
    if config.metric is not None:
        if config.metric not in facts:
            raise ConfigError(f"metric={config.metric} has not been scored; there are: {', '.join(facts)}")
        return facts[config.metric]
    mains = [fact for fact in facts.values() if fact.main]
    if len(mains) > 1:
        raise ConfigError(
            f"several metrics have been scored; set metric to one of: {', '.join(m.name for m in mains)}"
        )
    return mains[0]


def _read_scored(
    units: Sequence[Unit], verdicts: dict[str, dict[str, Verdict]], metric: MetricFacts
) -> tuple[dict[str, list[_Seen]], Counter[str]]:
    """Return the images of every prompt, prompts in the order of their first image, and a start of the drops."""
    drops: Counter[str] = Counter()
    prompts: dict[str, list[_Seen]] = {}
    unjudged = 0
    for candidate in (candidate for unit in units for candidate in unit.read(images=False)):
        found = verdicts.get(candidate.key, {})
        unjudged += metric.name not in found
        if not candidate.prompt.strip():
            drops[NO_PROMPT] += 1
        else:
            scores = {name: verdict.value for name, verdict in sorted(found.items()) if math.isfinite(verdict.value)}
            prompts.setdefault(candidate.group, []).append(_Seen(candidate.uid, scores))
    if unjudged:
        warn(f"{unjudged} images were not scored by {metric.scorer} in its present version; run score again")
    return prompts, drops


def _plan(
    config: PairConfig, prompts: dict[str, list[_Seen]], metric: str, higher_is_better: bool, drops: Counter[str]
) -> dict[str, list[_Planned]]:
    """Return the pairs of every prompt that has some; adds to `drops`."""
    plan = {}
    for group, images in prompts.items():
        picks, dropped = pick_pairs(
            [image.uid for image in images],
            [image.scores.get(metric, math.nan) for image in images],
            higher_is_better=higher_is_better,
            top_k=config.top_k if config.strategy == "top_bottom" else None,
            min_margin=config.min_margin,
            max_pairs=config.max_pairs_per_prompt,
        )
        drops.update(dropped)
        if picks:
            plan[group] = [_Planned(images[pick.chosen], images[pick.rejected], pick.margin) for pick in picks]
    return plan


def _write(config: PairConfig, units: Sequence[Unit], plan: dict[str, list[_Planned]]) -> None:
    rows = _rows(config, units, plan)
    with progress("pair", sum(len(pairs) for pairs in plan.values()), "pairs") as advance:
        number = 0
        while shard := list(islice(rows, _PAIRS_PER_SHARD)):
            write_shard(config.output_dir / f"pairs-{number:05d}.parquet", shard, PAIRS)
            number += 1
            advance(len(shard))


def _rows(config: PairConfig, units: Sequence[Unit], plan: dict[str, list[_Planned]]) -> Iterator[dict[str, Any]]:
    """Read the images once more and yield a prompt's pairs when its last image has come: few are held at a time."""
    missing = {group: {side.uid for p in pairs for side in (p.chosen, p.rejected)} for group, pairs in plan.items()}
    held: dict[str, dict[str, Candidate]] = {}
    for candidate in (candidate for unit in units for candidate in unit.read()):
        group, wanted = candidate.group, missing.get(candidate.group, set())
        if candidate.uid not in wanted:
            continue
        wanted.remove(candidate.uid)
        held.setdefault(group, {})[candidate.uid] = candidate
        if not wanted:
            images = held.pop(group)
            for pair in plan[group]:
                yield _row(config, pair, images[pair.chosen.uid], images[pair.rejected.uid])


def _row(config: PairConfig, pair: _Planned, chosen: Candidate, rejected: Candidate) -> dict[str, Any]:
    preference = PreferencePair(
        pair_id=pair_id(chosen.prompt, chosen.data, rejected.data),
        prompt=chosen.prompt,
        chosen=chosen.data,
        rejected=rejected.data,
        chosen_uid=chosen.uid,
        rejected_uid=rejected.uid,
        chosen_scores=pair.chosen.scores,
        rejected_scores=pair.rejected.scores,
        margin=pair.margin,
        strategy=config.strategy,
        source=config.path.name,
    )
    seeds = [candidate.seed for candidate in (chosen, rejected) if candidate.seed is not None]
    return pair_row(preference, seeds=seeds)
