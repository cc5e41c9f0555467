"""Who is asked what, and on which side: a function of items, raters and the log, so that a restart changes nothing."""

import functools
import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from diffusion_dpo.data.votes import CHOICES, standing
from diffusion_dpo.label.items import Item
from diffusion_dpo.label.log import Log
from diffusion_dpo.settings import LabelConfig

Kind = Literal["pair", "repeat", "check"]
SIDES = ("left", "right")
REASONS = ("corrupt", "off-prompt", "unsafe", "other")
_APART = 10
"""Votes between a pair and its repeat, where there are that many."""


class UnknownTask(ValueError):  # noqa: N818 - it names what the page asked for
    """A vote for something that nobody was asked, or an undo of nothing."""


@dataclass(frozen=True)
class Task:
    """One question to one rater. `left` is which image of the item stands on the left."""

    item: Item
    kind: Kind
    left: Literal["first", "second"]

    @property
    def id(self) -> str:
        """What the page calls it: it says neither which kind it is nor which side."""
        return _task_id(self.item.id, self.kind)

    @property
    def images(self) -> tuple[str, str]:
        """The names of the left and the right image."""
        second = self.item.ruined_image if self.kind == "check" else self.item.second_image
        both = (self.item.first_image, second)
        return both if self.left == "first" else both[::-1]


class Study:
    """The state of a labelling: the log, replayed, and who has what before them. Used from one thread."""

    def __init__(
        self, config: LabelConfig, items: Sequence[Item], log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Replay the log; `clock` gives seconds."""
        self.config = config
        self.items = {item.id: item for item in items}
        self._known = {
            _task_id(item.id, kind): (item, kind)
            for item in items
            for kind in get_args(Kind)
            if kind != "check" or item.ruined_image
        }
        self.name = hashlib.sha256(" ".join(sorted(self.items)).encode()).hexdigest()[:16]
        """What a page that keeps votes for later knows this study by; it says nothing of what is in it."""
        self._order = sorted(items, key=lambda item: self._chance("order", item.id, "everyone"))
        self._repeats: dict[str, frozenset[str]] = {}
        """By rater: the items that they see twice."""
        self._log = log
        self._clock = clock
        self._leases: dict[str, dict[str, float]] = {}
        """By item and rater: until when it is kept for them."""
        self._votes: dict[str, dict[str, dict[str, Any]]] = {}
        """By rater and task id: the vote that stands, in order of time."""
        self._raters: dict[str, set[str]] = {}
        """By item: who has voted on it."""
        self._heard: dict[tuple[str, str], str] = {}
        """By rater and key: the task of every vote and every undo there was, for whoever sends one again."""
        self._replay()

    def tasks(self, rater: str, amount: int) -> list[Task]:
        """Return what a rater is to be asked next, and keep the pairs among it from others for a while."""
        done = self._votes.get(rater, {})
        upcoming: list[Task] = []
        now = self._clock()
        for item, kind in self._schedule(rater):
            if len(upcoming) == amount:
                break
            if _task_id(item.id, kind) in done:
                continue
            if kind == "pair":
                self._leases.setdefault(item.id, {})[rater] = now + self.config.lease_seconds
            upcoming.append(self._make(item, kind, rater))
        return upcoming

    def vote(self, rater: str, task_id: str, answer: str, *, key: str, reason: str, seconds: float) -> None:
        """Record an answer: left, right, tie, both_bad or skip. The same key again changes nothing.

        Raises UnknownTask, and OSError when the disk does not take the vote.
        """
        if (rater, key) in self._heard:
            return
        task = self._task(rater, task_id)
        if task_id in self._votes.get(rater, {}):
            raise UnknownTask("this pair has your vote already; press u to take it back first")
        choice = answer
        if answer in SIDES:
            choice = task.left if answer == "left" else ("second" if task.left == "first" else "first")
        if choice not in CHOICES:
            raise UnknownTask(f"there is no answer {answer!r}; it is one of left, right, tie, both_bad, skip")
        event = {
            "event": "vote",
            "key": key,
            "rater": rater,
            "item": task.item.id,
            "kind": task.kind,
            "left": task.left,
            "answer": answer,
            "choice": choice,
            "reason": reason if answer == "skip" else "",
            "seconds": round(seconds, 3),
            "time": round(time.time(), 3),
        }
        self._log.append(event)
        self._hear(event)
        self._add(event)

    def undo(self, rater: str, *, key: str) -> Task:
        """Take a rater's last vote back and return what it was on. The same key again changes nothing.

        Raises UnknownTask where there is no vote, and OSError when the disk does not take the event.
        """
        if (rater, key) in self._heard:
            return self._task(rater, self._heard[rater, key])
        votes = self._votes.get(rater)
        if not votes:
            raise UnknownTask("there is no vote of yours to take back")
        task_id, last = next(reversed(votes.items()))
        task = self._task(rater, task_id)
        event = {"event": "undo", "key": key, "vote": last["key"], "rater": rater, "time": round(time.time(), 3)}
        self._log.append(event)
        self._hear(event)
        del votes[task_id]
        if last["kind"] == "pair":
            self._raters[last["item"]].discard(rater)
            self._leases.setdefault(last["item"], {})[rater] = self._clock() + self.config.lease_seconds
        return task

    def progress(self, rater: str) -> tuple[int, int]:
        """Return how many questions a rater has answered, and how many there are for them, answered ones included."""
        done = self._votes.get(rater, {})
        left = sum(_task_id(item.id, kind) not in done for item, kind in self._schedule(rater))
        return len(done), len(done) + left

    def _schedule(self, rater: str) -> Iterator[tuple[Item, Kind]]:
        """Yield all that a rater is asked, in order: pairs, each repeat a while after its pair, and checks among them.

        The pairs are those that they have answered or may still be given: what is others' is not repeated, either.
        """
        now = self._clock()
        seen = [self.items[vote["item"]] for vote in self._votes.get(rater, {}).values() if vote["kind"] == "pair"]
        seen += [item for item in self._order if self._is_free(item.id, rater, now)]
        repeats = self._repeated(rater)
        due: dict[int, list[Item]] = defaultdict(list)
        for place, item in enumerate(seen):
            yield item, "pair"
            if item.id in repeats:
                due[min(place + _APART, len(seen) - 1)].append(item)
            if item.ruined_image:
                yield item, "check"
            for again in due.pop(place, ()):
                yield again, "repeat"

    def _repeated(self, rater: str) -> frozenset[str]:
        if rater not in self._repeats:
            chances = ((item.id, self._chance("repeat", item.id, rater)) for item in self._order)
            self._repeats[rater] = frozenset(name for name, it in chances if it < self.config.repeat_share)
        return self._repeats[rater]

    def _make(self, item: Item, kind: Kind, rater: str) -> Task:
        left_is_first = self._chance("side", item.id, rater) < 0.5
        if kind == "check":
            left_is_first = self._chance("check", item.id, rater) < 0.5
        return Task(item, kind, "first" if left_is_first == (kind != "repeat") else "second")

    def _task(self, rater: str, task_id: str) -> Task:
        if task_id not in self._known:
            raise UnknownTask("there is no such pair here; reload the page")
        return self._make(*self._known[task_id], rater)

    def _is_free(self, item: str, rater: str, now: float) -> bool:
        """Whether an item still lacks votes, counting those that others are about to give."""
        voters = self._raters.get(item, set())
        if rater in voters:
            return False
        pending = sum(until > now for holder, until in self._leases.get(item, {}).items() if holder != rater)
        return len(voters) + pending < self.config.votes_per_pair

    def _chance(self, use: str, item: str, rater: str) -> float:
        return _chance(self.config.seed, use, item, rater)

    def _replay(self) -> None:
        for event in self._log.events:
            self._hear(event)
        for event in standing(self._log.events):
            if event["item"] in self.items:
                self._add(event)

    def _hear(self, event: dict[str, Any]) -> None:
        """Remember the key of a vote or an undo; earlier versions gave an undo none."""
        if "key" not in event:
            return
        is_vote = event["event"] == "vote"
        rater = event["rater"]
        about = _task_id(event["item"], event["kind"]) if is_vote else self._heard.get((rater, event["vote"]), "")
        self._heard[rater, event["key"]] = about

    def _add(self, event: dict[str, Any]) -> None:
        rater, item = event["rater"], self.items[event["item"]]
        task = self._make(item, event["kind"], rater)
        self._votes.setdefault(rater, {})[task.id] = event
        if event["kind"] == "pair":
            self._raters.setdefault(item.id, set()).add(rater)
            self._leases.get(item.id, {}).pop(rater, None)

    def standing(self) -> list[dict[str, Any]]:
        """Return the votes that stand, in order of time."""
        return [vote for vote in standing(self._log.events) if vote["item"] in self.items]

    def counts(self) -> Counter[str]:
        """Return how many votes stand, by kind."""
        return Counter(vote["kind"] for votes in self._votes.values() for vote in votes.values())


@functools.lru_cache(maxsize=1_000_000)
def _task_id(item: str, kind: Kind) -> str:
    return hashlib.sha256(f"{item} {kind}".encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=1_000_000)
def _chance(seed: int, use: str, item: str, rater: str) -> float:
    """Return a number in [0, 1) that only what it is for decides."""
    digest = hashlib.sha256(json.dumps([seed, use, item, rater]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
