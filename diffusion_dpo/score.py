"""`score`: candidates -> scores. One shard a judge and portion of images; what was judged once is not judged again."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_dpo.config import ConfigError, command
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data.candidates import Candidate, Unit, find_units
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.scores import Verdict, facts_path, read_verdicts, shard_path, shards_of
from diffusion_dpo.data.shards import SCORES, write_shard
from diffusion_dpo.device import pick_device
from diffusion_dpo.files import alone_in, claim, finish, write_json
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.scorers.judge import FAILED, Judge, check_metrics, warn_if_constant
from diffusion_dpo.settings import ScoreConfig

if TYPE_CHECKING:
    from PIL import Image

Verdicts = dict[str, Verdict]
"""The verdicts on one image, by metric."""
Rivals = dict[str, dict[str, bytes]]
"""The encoded images of each prompt, by uid."""
_BROKEN = "broken image: "
_BLACK = "black all over, as what a safety filter leaves"
IMAGES_PER_SHARD = 1024


def run(config: ScoreConfig) -> Path:
    """Judge the images that were not judged yet; return the folder of the scores."""
    check_metrics(config.scorers)
    units = find_units(config.path)
    beside = config.path if config.path.is_dir() else config.path.parent
    folder = config.output_dir or beside
    elsewhere = folder.resolve() != beside.resolve()
    num_images = sum(unit.num_images for unit in units)
    mains = [scorer.metrics[0].name for scorer in config.scorers]
    say(f"score: {num_images} images of {config.path} by {', '.join(mains)}")
    identity = {"path": str(config.path)}
    lines = [f"{'metric':<24}{'mean':>10}{'min':>10}{'max':>10}{'missing':>9}"]
    with claim(folder, "score", identity) if elsewhere else alone_in(folder):
        for scorer in config.scorers:
            lines += _summary(scorer, _Scoring(scorer, config, folder).run(units))
        if elsewhere:
            finish(folder, "score", identity, num_images=num_images)
    following: dict[str, object] = {"path": config.path}
    if elsewhere:
        following["scores_dir"] = folder
    if len(mains) > 1:
        following["metric"] = mains[0]
    say("\n".join([*lines, f"scores: {folder}", f"next: {command('pair', following)}"]))
    return folder


@dataclass
class _Scoring:
    """One scorer on its way through all images."""

    scorer: Scorer
    config: ScoreConfig
    folder: Path
    known: dict[str, Verdicts] = field(default_factory=dict)
    """What was judged so far, by this run or an earlier one."""
    judge: Judge | None = None
    """There once something new has to be judged: a rerun loads no weights, and does not even import torch."""
    fingerprint: str = ""
    homes: dict[str, list[Unit]] = field(default_factory=dict)
    """Where the images of a prompt lie, for a scorer that compares them with each other."""

    def run(self, units: Sequence[Unit]) -> list[Verdicts]:
        """Write the shards that are missing or outdated; return the verdicts on every image, in order."""
        label = self.scorer.metrics[0].name
        self.fingerprint = self.scorer.fingerprint()
        if "rivals" in self.scorer.needs:
            self._find_homes(units)
        write_json(facts_path(self.folder, label), _facts(self.scorer, self.fingerprint))
        shards = {path: _read_or_discard(path, self.fingerprint) for path in shards_of(self.folder, label)}
        for shard in shards.values():
            for key in [key for key, found in shard.items() if found[label].reason.startswith(FAILED)]:
                del shard[key]  # perhaps it does not fail again
            self.known.update(shard)
        keys: list[str] = []
        broken = 0
        num_images = sum(unit.num_images for unit in units)
        with progress(label, num_images, "images") as advance:
            for unit in units:
                unit_keys = [candidate.key for candidate in unit.read(images=False)]
                parts = _parts(unit, unit_keys)
                paths = {shard_path(self.folder, label, name): part for name, part in parts.items()}
                if all(shards.get(path, {}).keys() == set(part) for path, part in paths.items()):
                    advance(len(unit_keys))
                else:
                    candidates = unit.read()
                    rivals = self._rivals(unit)
                    for path, part in paths.items():
                        rows = self._rows(islice(candidates, len(part)), rivals, advance)
                        write_shard(path, list(rows), SCORES)
                keys += unit_keys
                broken += sum(self.known[key][label].reason.startswith((_BROKEN, FAILED)) for key in unit_keys)
                if broken > self.config.max_broken_share * num_images:
                    raise ConfigError(
                        f"{broken} of {num_images} images of {self.config.path} are broken or make {label} fail, more "
                        f"than max_broken_share={self.config.max_broken_share:g}; mend or remove them, or raise it. "
                        f"The last: {next(r for r in self._reasons(unit_keys) if r.startswith((_BROKEN, FAILED)))}"
                    )
        if self.judge is not None:
            self.scorer.close()
        return [self.known[key] for key in keys]

    def _reasons(self, keys: Sequence[str]) -> Iterator[str]:
        return (self.known[key][self.scorer.metrics[0].name].reason for key in reversed(keys))

    def _find_homes(self, units: Sequence[Unit]) -> None:
        """Note where each prompt's images lie; the values depend on all of them, and so does the fingerprint."""
        members: dict[str, set[str]] = defaultdict(set)
        for unit in units:
            groups = set()
            for candidate in unit.read(images=False):
                groups.add(candidate.group)
                members[candidate.group].add(candidate.uid)
            for group in groups - {""}:
                self.homes.setdefault(group, []).append(unit)
        content = json.dumps([[group, *sorted(uids)] for group, uids in sorted(members.items())])
        self.fingerprint += "-among-" + hashlib.sha256(content.encode()).hexdigest()[:16]

    def _rivals(self, unit: Unit) -> Rivals:
        """Return all images of the prompts that have some in this unit; none where nothing compares."""
        if not self.homes:
            return {}
        groups = {candidate.group for candidate in unit.read(images=False)} & self.homes.keys()
        homes = {home.name: home for group in groups for home in self.homes[group]}
        found: Rivals = {group: {} for group in groups}
        for candidate in (candidate for home in homes.values() for candidate in home.read()):
            if candidate.group in groups and not candidate.broken:
                found[candidate.group][candidate.uid] = candidate.data
        return found

    def _rows(
        self, candidates: Iterator[Candidate], rivals: Rivals, advance: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of one shard, judging what is not known yet."""
        while portion := list(islice(candidates, self.config.batch_size)):
            new = {candidate.key: candidate for candidate in portion if candidate.key not in self.known}
            if new:
                self.known.update(self._verdicts(list(new.values()), rivals))
            for candidate in portion:
                for metric, verdict in self.known[candidate.key].items():
                    yield {
                        "uid": candidate.uid,
                        "key": candidate.key,
                        "metric": metric,
                        "value": None if math.isnan(verdict.value) else verdict.value,
                        "reason": verdict.reason,
                        "fingerprint": self.fingerprint,
                    }
            advance(len(portion))

    def _verdicts(self, candidates: Sequence[Candidate], rivals: Rivals) -> dict[str, Verdicts]:
        """Judge images with different keys; what is broken or black gets NaN with the reason."""
        requests: dict[str, ScoreRequest] = {}
        unusable: dict[str, str] = {}
        decoded: dict[bytes, Image.Image] = {}
        for candidate in candidates:
            try:
                request = _request(candidate, rivals.get(candidate.group, {}), decoded)
            except BrokenImage as error:
                unusable[candidate.key] = f"{_BROKEN}{error}"
                warn(f"skipped {candidate.where}: {error}")
            else:
                if request.image.getbbox() is None:
                    unusable[candidate.key] = _BLACK
                else:
                    requests[candidate.key] = request
        if self.judge is None:
            device = pick_device(self.config.device)
            say(f"{self.scorer.metrics[0].name}: on {device.type}")
            self.scorer.load(device)
            self.judge = Judge(
                self.scorer, batch_size=self.config.batch_size, timeout_seconds=self.config.batch_timeout_seconds
            )
        scores = self.judge.score(list(requests.values()))
        found: dict[str, Verdicts] = {key: {} for key in (*requests, *unusable)}
        for name, values in scores.values.items():
            for key, value, reason in zip(requests, values, scores.reasons, strict=True):
                found[key][name] = Verdict(float(value), reason)
            for key, reason in unusable.items():
                found[key][name] = Verdict(math.nan, reason)
        return found


def _parts(unit: Unit, keys: list[str]) -> dict[str, list[str]]:
    """Split a unit's images among shards, by name: a foreign file may hold more than one wants to lose."""
    if len(keys) <= IMAGES_PER_SHARD:
        return {unit.name: keys}
    starts = range(0, len(keys), IMAGES_PER_SHARD)
    return {f"{unit.name}.{i:04d}": keys[start : start + IMAGES_PER_SHARD] for i, start in enumerate(starts)}


def _read_or_discard(path: Path, fingerprint: str) -> dict[str, Verdicts]:
    """Return what a shard knows; a damaged one knows nothing, and is written again."""
    try:
        return read_verdicts(path, fingerprint)
    except ConfigError as error:
        warn(f"making these scores again: {error}")
        return {}


def _request(candidate: Candidate, rivals: dict[str, bytes], decoded: "dict[bytes, Image.Image]") -> ScoreRequest:
    """Decode an image and what it is compared with, each file of these once; raises BrokenImage."""

    def decode(data: bytes) -> "Image.Image":
        if data not in decoded:
            decoded[data] = decode_rgb(data)
        return decoded[data]

    if candidate.broken:
        raise BrokenImage(candidate.broken)
    image = decode(candidate.data)
    try:
        references = tuple(decode(data) for data in candidate.references)
    except BrokenImage as error:
        raise BrokenImage(f"its reference is broken: {error}") from None
    others = []
    for uid in sorted(rivals.keys() - {candidate.uid}):
        try:
            others.append(decode(rivals[uid]))
        except BrokenImage:  # is said of the rival itself
            continue
    return ScoreRequest(image, candidate.prompt, references, tuple(others))


def _facts(scorer: Scorer, fingerprint: str) -> dict[str, Any]:
    """What `pair` and `compare` need to know of the numbers; an infinite bound becomes null."""
    return {
        "scorer": scorer.metrics[0].name,
        "settings": scorer.model_dump(mode="json"),
        "licence": scorer.licence,
        "fingerprint": fingerprint,
        "metrics": [
            {
                "name": metric.name,
                "higher_is_better": metric.higher_is_better,
                "range": [bound if math.isfinite(bound) else None for bound in metric.range],
                "auxiliary": metric.auxiliary,
            }
            for metric in scorer.metrics
        ],
    }


def _summary(scorer: Scorer, verdicts: Sequence[Verdicts]) -> list[str]:
    """One line a metric, and one for every reason why values are missing."""
    lines = []
    values = {m.name: np.array([found[m.name].value for found in verdicts]) for m in scorer.metrics}
    warn_if_constant(scorer.metrics, values)
    for name, array in values.items():
        there = array[np.isfinite(array)]
        numbers = [there.mean(), there.min(), there.max()] if len(there) else [math.nan] * 3
        lines.append(f"{name:<24}" + "".join(f"{x:>10.4f}" for x in numbers) + f"{len(array) - len(there):>9}")
    reasons = Counter(v.reason for found in verdicts for v in [found[scorer.metrics[0].name]] if math.isnan(v.value))
    return lines + [f"  {count} missing: {reason}" for reason, count in reasons.most_common()]
