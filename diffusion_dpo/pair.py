"""`pair`: scored candidates -> preference pairs. What does not become a pair is counted, with the reason.

Raw values are stored as they are; they are oriented (higher is better) only to be compared. How images become pairs is
in `strategies/`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from diffusion_dpo.config import ConfigError, command
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.candidates import Candidate, Unit
from diffusion_dpo.data.images import BrokenImage, decode_rgb, fit_to
from diffusion_dpo.data.pairs import PairsData, pair_row
from diffusion_dpo.data.recognise import images_at
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.data.scores import MetricFacts, read_facts, read_values
from diffusion_dpo.data.shards import PAIRS, encode_png, write_shard
from diffusion_dpo.files import claim, finish
from diffusion_dpo.pairing import Images, Plan, Planned, distinct, is_test, plan_pairs, read_images
from diffusion_dpo.report.audit import write_audit
from diffusion_dpo.report.words import count
from diffusion_dpo.settings import PairConfig
from diffusion_dpo.strategies import Strategy

_PAIRS_PER_SHARD = 128
BROKEN_PHOTO = "pairs with a broken photograph"


def run(config: PairConfig) -> Path:
    """Make the pairs that are not there yet; return their folder."""
    beside = config.path if config.path.is_dir() else config.path.parent
    if config.path.is_dir() and config.output_dir.resolve().is_relative_to(config.path.resolve()):
        raise ConfigError(f"output_dir {config.output_dir} lies inside {config.path}; choose another one")
    units = images_at(config.path, config.prompt_column)
    facts = read_facts(config.scores_dir or beside)
    strategy: Strategy = config.strategy
    main = _choose_metric(config, facts)
    read = strategy.reads(main)
    _refuse_unknown(config, facts, read)
    directions = _directions(config, facts, main)
    arrows = ", ".join(f"{name} ({'higher' if directions[name] else 'lower'} is better)" for name in read)
    say(f"pair: {strategy.type}" + (f" by {arrows}" if arrows else ""))
    images, drops = read_images(units, read_values(config.scores_dir or beside, facts), facts, read)
    plan = plan_pairs(config, images, main, directions, drops)
    if not plan:
        raise ConfigError(f"no pairs are left from {config.path}; dropped: {_listed(drops)}")
    parts = _split(config, images, plan)
    identity = _identity(config, images, facts, main, directions)
    about = {
        "labelled_by": [] if config.shuffle_labels else list(read),
        "licence": "; ".join(dict.fromkeys(facts[name].licence for name in read)),
        "drops": dict(sorted(drops.items())),
    }
    num_pairs = 0
    for name, (folder, part) in parts.items():
        num_pairs += _make(folder, part, config, units, images, identity | {"part": name}, about)
    say(f"{count(num_pairs, 'pairs')} of {count(len(plan), 'prompts')}; dropped: {_listed(drops)}")
    say("\n".join(f"pairs: {folder}" for folder, _ in parts.values()))
    if config.audit:
        made = (it for it in PairsData(path=config.output_dir).read() if isinstance(it, PreferencePair))
        say(f"blind sheet: {write_audit(config.output_dir, made, config.seed, amount=config.audit)}")
    say(f"look: {command('inspect', {'path': config.output_dir})}")
    say(f"next: {command('train', {'data.path': config.output_dir})}")
    return config.output_dir


def _split(config: PairConfig, images: Images, plan: Plan) -> dict[str, tuple[Path, Plan]]:
    """Return folder and pairs of the training part and, where one is asked for, of the test part."""
    if not config.test_share:
        return {"train": (config.output_dir, plan)}
    test = {group: pairs for group, pairs in plan.items() if is_test(config, images.prompts[group])}
    train = {group: pairs for group, pairs in plan.items() if group not in test}
    if not train or not test:
        raise ConfigError(
            f"test_share={config.test_share:g} leaves no prompts {'to train on' if test else 'to test with'}: only "
            f"{count(len(plan), 'prompts')} have pairs; change it, or seed"
        )
    beside = config.output_dir if config.output_dir.name else config.output_dir.resolve()
    return {"train": (config.output_dir, train), "test": (beside.with_name(f"{beside.name}-test"), test)}


def _listed(drops: Mapping[str, int]) -> str:
    return "; ".join(f"{number} {reason}" for reason, number in sorted(drops.items())) or "nothing"


# --- which metrics ---------------------------------------------------------------------------------------------------


def _choose_metric(config: PairConfig, facts: dict[str, MetricFacts]) -> str:
    """Return the metric that labels: the one asked for, or the only main one; empty where none by itself does."""
    if not config.strategy.uses_main:
        for setting, value in (("metric", config.metric), ("higher_is_better", config.higher_is_better)):
            if value is not None:
                raise ConfigError(
                    f"{setting}={value} would do nothing: {config.strategy.type} names its metrics itself"
                )
        return ""
    if not facts:
        raise _unscored(config)
    if config.metric is not None:
        return config.metric
    mains = [fact.name for fact in facts.values() if fact.main]
    if len(mains) > 1:
        raise ConfigError(f"several metrics have been scored; set metric to one of: {', '.join(mains)}")
    return mains[0]


def _refuse_unknown(config: PairConfig, facts: dict[str, MetricFacts], names: Sequence[str]) -> None:
    for name in names:
        if not facts:
            raise _unscored(config)
        if name not in facts:
            raise ConfigError(f"metric={name} has not been scored; there are: {', '.join(facts)}")


def _unscored(config: PairConfig) -> ConfigError:
    return ConfigError(
        f"there are no scores in {config.scores_dir or config.path}; run: diffusion-dpo score path={config.path}"
    )


def _directions(config: PairConfig, facts: dict[str, MetricFacts], main: str) -> dict[str, bool]:
    """Return whether higher is better, by metric."""
    directions = {name: fact.higher_is_better for name, fact in facts.items()}
    if config.higher_is_better is not None and main:
        directions[main] = config.higher_is_better
    return directions


def _identity(
    config: PairConfig, images: Images, facts: Mapping[str, MetricFacts], main: str, directions: Mapping[str, bool]
) -> dict[str, Any]:
    """Everything that decides the pairs."""
    places = {"path", "prompt_column", "scores_dir", "output_dir", "metric", "higher_is_better", "audit"}
    digest = hashlib.sha256()
    for group, members in images.groups.items():
        digest.update(json.dumps([group, [images.uids[i] for i in members]]).encode())
    for name in sorted(images.values):
        digest.update(name.encode() + np.array(images.values[name], dtype=np.float64).tobytes())
    return config.model_dump(mode="json", exclude=places) | {
        "metrics": {name: [directions[name], facts[name].fingerprint] for name in config.strategy.reads(main)},
        "metric": main,
        "scored_images": digest.hexdigest()[:16],
    }


# --- writing ---------------------------------------------------------------------------------------------------------


def _make(
    folder: Path,
    plan: Plan,
    config: PairConfig,
    units: Sequence[Unit],
    images: Images,
    identity: dict[str, Any],
    facts: dict[str, Any],
) -> int:
    """Write one folder of pairs, and return how many it has."""
    num_pairs = sum(len(pairs) for pairs in plan.values())
    with claim(folder, "pair", identity) as before:
        num_shards = -(-int(before.get("num_pairs", 0)) // _PAIRS_PER_SHARD)
        shards = [folder / f"pairs-{number:05d}.parquet" for number in range(num_shards)]
        if before.get("complete") and all(shard.exists() for shard in shards):
            say(f"pair: all {count(int(before['num_pairs']), 'pairs')} are there already in {folder}")
            return int(before["num_pairs"])
        written = 0
        rows = _rows(config, units, images, plan)
        with progress("pair", num_pairs, "pairs") as advance:
            number = 0
            while shard := list(islice(rows, _PAIRS_PER_SHARD)):
                write_shard(folder / f"pairs-{number:05d}.parquet", shard, PAIRS)
                number += 1
                written += len(shard)
                advance(len(shard))
        if not written:
            raise ConfigError(f"no pairs are left from {config.path}: every photograph is broken")
        if written < num_pairs:
            facts = facts | {"drops": facts["drops"] | {BROKEN_PHOTO: num_pairs - written}}
            warn(f"{num_pairs - written} {BROKEN_PHOTO} were left out")
        finish(folder, "pair", identity, num_pairs=written, num_prompts=len(plan), **facts)
    return written


def _rows(config: PairConfig, units: Sequence[Unit], images: Images, plan: Plan) -> Iterator[dict[str, Any]]:
    """Read the images once more and yield a prompt's pairs when its last image has come: few are held at a time."""
    missing = {group: _wanted(images, pairs) for group, pairs in plan.items()}
    held: dict[str, dict[str, Candidate]] = {}
    for candidate in (candidate for unit in units for candidate in unit.read()):
        group, wanted = candidate.group, missing.get(candidate.group, set())
        if candidate.uid not in wanted:
            continue
        wanted.remove(candidate.uid)
        held.setdefault(group, {})[candidate.uid] = candidate
        if not wanted:
            found = held.pop(group)
            for pair in plan[group]:
                row = _row(config, pair, images, found)
                if row is not None:
                    yield row


def _wanted(images: Images, pairs: Sequence[Planned]) -> set[str]:
    chosen = {images.uids[pair.chosen] for pair in pairs if not pair.pick.photo}
    return chosen | {images.uids[pair.rejected] for pair in pairs}


def _row(config: PairConfig, pair: Planned, images: Images, found: Mapping[str, Candidate]) -> dict[str, Any] | None:
    """Return the row of a pair; None, having named it, where its photograph is broken."""
    rejected = found[images.uids[pair.rejected]]
    sides: list[tuple[bytes, str, dict[str, float], dict[str, Any], int | None]] = []
    if pair.pick.photo:
        try:
            photo = _photograph(rejected, pair.chosen)
        except BrokenImage as error:
            warn(f"skipped a pair of {rejected.where}: its photograph {pair.chosen} is broken: {error}")
            return None
        sides.append((photo, "", {}, {"model": "photograph"}, None))
    else:
        sides.append(_side(found[images.uids[pair.chosen]], pair.chosen, images))
    sides.append(_side(rejected, pair.rejected, images))
    chosen, other = sides[::-1] if pair.swapped else sides
    temperature = config.label_temperature
    margin, margin_norm = (_finite(value) for value in (pair.pick.margin, pair.pick.margin_norm))
    preference = PreferencePair(
        pair_id=pair_id(rejected.prompt, chosen[0], other[0]),
        prompt=rejected.prompt,
        chosen=chosen[0],
        rejected=other[0],
        label_prob=1.0 if temperature is None else float(expit(pair.pick.margin_norm / temperature)),
        chosen_uid=chosen[1],
        rejected_uid=other[1],
        chosen_scores=chosen[2],
        rejected_scores=other[2],
        chosen_origin=chosen[3],
        rejected_origin=other[3],
        margin=None if config.shuffle_labels else margin,
        margin_norm=None if config.shuffle_labels else margin_norm,
        strategy=config.strategy.type + (", labels shuffled" if config.shuffle_labels else ""),
        source=config.path.name,
    )
    return pair_row(preference, seeds=[side[4] for side in (chosen, other) if side[4] is not None])


def _side(
    candidate: Candidate, position: int, images: Images
) -> tuple[bytes, str, dict[str, float], dict[str, Any], int | None]:
    """Return an image's bytes, its uid, its scores, its origin and its seed."""
    scores = {name: values[position] for name, values in sorted(images.values.items())}
    known = {name: value for name, value in scores.items() if math.isfinite(value)}
    return candidate.data, candidate.uid, known, candidate.origin, candidate.seed


def _photograph(like: Candidate, number: int) -> bytes:
    """Return a reference photograph as the generated image is: of its size, as PNG, so that neither is the label."""
    image = decode_rgb(like.data)
    return encode_png(fit_to(decode_rgb(distinct(like.references)[number]), image.size))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
