"""One judge on its way through many images: shard by shard, each image once, never the same one again.

`score` and `compare` judge through this, so that what is broken, black, failed or missing is the same everywhere.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data.candidates import Candidate, Unit
from diffusion_dpo.data.images import BrokenImage, decode_rgb
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.scores import Verdict, facts_path, read_verdicts, shard_path, shards_of
from diffusion_dpo.data.shards import SCORES, write_shard
from diffusion_dpo.device import pick_device
from diffusion_dpo.files import write_json
from diffusion_dpo.scorers import Scorer, ScoreRequest
from diffusion_dpo.scorers.judge import FAILED, Judge, refuse_lacking

if TYPE_CHECKING:
    from PIL import Image

Verdicts = dict[str, Verdict]
"""The verdicts on one image, by metric."""
_BROKEN = "broken image: "
_BLACK = "black all over, as what a safety filter leaves"
IMAGES_PER_SHARD = 1024


@dataclass
class _Group:
    """All images of one prompt, for a judge that compares them."""

    uids: Counter[str] = field(default_factory=Counter)
    homes: list[Unit] = field(default_factory=list)
    """Where they lie."""


_Rivals = dict[str, dict[str, bytes]]
"""The encoded images of each prompt, by uid."""


@dataclass
class Scoring:
    """The settings are those of ScoreConfig; `path` is what the images are called in messages."""

    scorer: Scorer
    path: Path
    folder: Path
    """Where the shards are."""
    device: str
    batch_size: int
    timeout_seconds: float | None = None
    max_broken_share: float = 1.0
    whose: str = ""
    """Whose images these are, where those of others are judged apart from them."""
    known: dict[str, Verdicts] = field(default_factory=dict)
    """What was judged so far, by this run or an earlier one, by the key of the image."""
    _judge: Judge | None = None
    """There once something new has to be judged: a rerun loads no weights, and does not even import torch."""
    _fingerprint: str = ""
    _lacking: dict[str, str] = field(default_factory=dict)
    """Why images cannot be judged by this scorer, by key."""
    _groups: dict[str, _Group] = field(default_factory=dict)
    _facts_are_there: bool = False

    def run(self, units: Sequence[Unit]) -> list[Verdicts]:
        """Write the shards that are missing or outdated; return the verdicts on every image, in order.

        Raises ConfigError when images lack what the scorer needs (before anything is judged), and when too many are
        broken or make it fail.
        """
        label = self.scorer.metrics[0].name
        self._fingerprint = self.scorer.fingerprint()
        keys = self._survey(units)
        shards = self._read_shards(label)
        broken, num_images = 0, sum(map(len, keys.values()))
        num_lacking = sum(key in self._lacking for part in keys.values() for key in part)
        with progress(self._what(), num_images, "images") as advance:
            for unit in units:
                parts = {shard_path(self.folder, label, n): part for n, part in _parts(unit, keys[unit.name]).items()}
                if all(shards.get(path, {}).keys() == set(part) for path, part in parts.items()):
                    advance(len(keys[unit.name]))
                else:
                    self._judge_unit(unit, parts, advance)
                faults = [it for key in keys[unit.name] if (it := self._fault(key))]
                broken += len(faults)
                if faults and broken + num_lacking > self.max_broken_share * num_images:
                    lacking = f" or lack what it needs ({num_lacking})" if num_lacking else ""
                    raise ConfigError(
                        f"{broken + num_lacking} of {num_images} images of {self.path} are broken or make {label} fail"
                        f"{lacking}, more than max_broken_share={self.max_broken_share:g}; fix or remove them, or "
                        f"raise it. The last: {faults[-1]}"
                    )
        self._write_facts()
        if self._judge is not None:
            self.scorer.close()
        return [self.known[key] for unit in units for key in keys[unit.name]]

    def _survey(self, units: Sequence[Unit]) -> dict[str, list[str]]:
        """Return the keys of each unit's images, having refused what the scorer cannot judge.

        Where a scorer compares the images of a prompt, the values depend on all of them, and so does the fingerprint.
        """
        keys: dict[str, list[str]] = {}
        lacking: dict[str, list[str]] = {"prompt": [], "reference": []}
        compares = "rivals" in self.scorer.needs
        for unit in units:
            keys[unit.name] = []
            for candidate in unit.read(images=False):
                keys[unit.name].append(candidate.key)
                for need, reason in _lacks(candidate).items():
                    lacking[need].append(f"{candidate.where} ({reason})")
                    if need in self.scorer.needs:
                        self._lacking[candidate.key] = f"without a {need}: {reason}"
                if compares and candidate.group:
                    group = self._groups.setdefault(candidate.group, _Group())
                    group.uids[candidate.uid] += 1
                    if not group.homes or group.homes[-1] is not unit:
                        group.homes.append(unit)
        self._refuse_lacking(lacking, sum(map(len, keys.values())))
        if compares:
            content = json.dumps([[name, sorted(group.uids.items())] for name, group in sorted(self._groups.items())])
            self._fingerprint += "-among-" + hashlib.sha256(content.encode()).hexdigest()[:16]
        return keys

    def _refuse_lacking(self, lacking: dict[str, list[str]], total: int) -> None:
        """Name the images that lack what the scorer needs; raises ConfigError when they are too many.

        One alone is never too many, unless max_broken_share is 0.
        """
        for need in sorted(self.scorer.needs & lacking.keys()):
            names = lacking[need]
            if len(names) == total:
                refuse_lacking(self.scorer, {need: total}, total, first=names[0] if names else "")
            named = some(names)
            if len(names) > max(self.max_broken_share * total, self.max_broken_share > 0):
                raise ConfigError(
                    f"the scorer {self.scorer.type} needs a {need}, and {len(names)} of {total} images have none, "
                    f"more than max_broken_share={self.max_broken_share:g}: {named}; add it, or raise "
                    "max_broken_share to leave them without a score"
                )
            if names:
                warn(f"{len(names)} of {total} images have no {need} and get no {self._what()}: {named}")

    def _read_shards(self, label: str) -> dict[Path, dict[str, Verdicts]]:
        """Return what is there already by shard, and know it; where the scorer failed, it may not fail again."""
        shards = {path: _read_or_discard(path, self._fingerprint) for path in shards_of(self.folder, label)}
        for shard in shards.values():
            for key in [key for key, found in shard.items() if found[label].reason.startswith(FAILED)]:
                del shard[key]
            self.known.update(shard)
        return shards

    def _fault(self, key: str) -> str:
        reason = self.known[key][self.scorer.metrics[0].name].reason
        return reason if reason.startswith((_BROKEN, FAILED)) else ""

    def _judge_unit(self, unit: Unit, parts: dict[Path, list[str]], advance: Callable[[int], None]) -> None:
        """Write a unit's shards; of one that cannot be finished, what was judged of it."""
        candidates, rivals = unit.read(), self._rivals(unit)
        for path, part in parts.items():
            rows: list[dict[str, Any]] = []
            try:
                for row in self._rows(islice(candidates, len(part)), rivals, advance):
                    rows.append(row)
            except ConfigError:
                if rows:
                    self._write(path, rows)
                raise
            self._write(path, rows)

    def _write(self, path: Path, rows: Sequence[dict[str, Any]]) -> None:
        self._write_facts()
        write_shard(path, rows, SCORES)

    def _write_facts(self) -> None:
        """Say what the numbers mean: once there are some, since the numbers of another version do not count then."""
        if self._facts_are_there:
            return
        self._facts_are_there = True
        path = facts_path(self.folder, self.scorer.metrics[0].name)
        facts = _facts(self.scorer, self._fingerprint)
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if before != facts:
            write_json(path, facts)

    def _rivals(self, unit: Unit) -> _Rivals:
        """Return all images of the prompts that have some in this unit; none where nothing compares."""
        if not self._groups:
            return {}
        names = {candidate.group for candidate in unit.read(images=False)} & self._groups.keys()
        homes = {home.name: home for name in names for home in self._groups[name].homes}
        found: _Rivals = {name: {} for name in names}
        for candidate in (candidate for home in homes.values() for candidate in home.read()):
            if candidate.group in names and not candidate.broken:
                found[candidate.group][candidate.uid] = candidate.data
        return found

    def _rows(
        self, candidates: Iterator[Candidate], rivals: _Rivals, advance: Callable[[int], None]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of one shard, judging what is not known yet."""
        while portion := list(islice(candidates, self.batch_size)):
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
                        "fingerprint": self._fingerprint,
                    }
            advance(len(portion))

    def _verdicts(self, candidates: Sequence[Candidate], rivals: _Rivals) -> dict[str, Verdicts]:
        """Judge images with different keys; what is broken or black gets NaN with the reason."""
        requests: dict[str, ScoreRequest] = {}
        unusable: dict[str, str] = {}
        decoded: dict[bytes, Image.Image] = {}
        for candidate in candidates:
            if candidate.key in self._lacking and not candidate.broken:
                unusable[candidate.key] = self._lacking[candidate.key]
                continue
            try:
                request = self._request(candidate, rivals.get(candidate.group, {}), decoded)
            except BrokenImage as error:
                unusable[candidate.key] = f"{_BROKEN}{error}"
                warn(f"skipped {candidate.where}: {error}")
            else:
                if _is_black(request.image):
                    unusable[candidate.key] = _BLACK
                else:
                    requests[candidate.key] = request
        scores = self._loaded().score(list(requests.values()))
        found: dict[str, Verdicts] = {key: {} for key in (*requests, *unusable)}
        for name, values in scores.values.items():
            for key, value, reason in zip(requests, values, scores.reasons, strict=True):
                found[key][name] = Verdict(float(value), reason)
            for key, reason in unusable.items():
                found[key][name] = Verdict(math.nan, reason)
        return found

    def _what(self) -> str:
        return self.scorer.metrics[0].name + (f" of {self.whose}" if self.whose else "")

    def _loaded(self) -> Judge:
        if self._judge is None:
            device = pick_device(self.device)
            say(f"{self._what()}: on {device.type}")
            self.scorer.load(device)
            label = self.scorer.metrics[0].name
            has_answered = any(math.isfinite(found[label].value) for found in self.known.values())
            self._judge = Judge(
                self.scorer,
                batch_size=self.batch_size,
                timeout_seconds=self.timeout_seconds,
                has_answered=has_answered,
            )
        return self._judge

    def _request(
        self, candidate: Candidate, rivals: dict[str, bytes], decoded: "dict[bytes, Image.Image]"
    ) -> ScoreRequest:
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
                rival = decode(rivals[uid])
            except BrokenImage:  # is said of the rival itself
                continue
            if not _is_black(rival):
                others.append(rival)
        copies = self._groups[candidate.group].uids[candidate.uid] if candidate.group in self._groups else 1
        return ScoreRequest(image, candidate.prompt, references, tuple(others), copies)


def _lacks(candidate: Candidate) -> dict[str, str]:
    """Return what an image has not, of what scorers may need, and why."""
    reasons = {} if candidate.prompt.strip() else {"prompt": candidate.no_prompt or "no prompt"}
    return reasons if candidate.references else reasons | {"reference": "no references"}


def _is_black(image: "Image.Image") -> bool:
    return image.getbbox() is None


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
