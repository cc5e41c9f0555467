"""Who is asked what, and on which side: a function of items, raters and the log, so that a restart changes nothing.

A question costs the same whatever the number of pairs, votes and raters: see `turns`.
"""

import hashlib
import heapq
import json
import random
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from diffusion_dpo.data.votes import CHOICES, standing
from diffusion_dpo.label.items import Item
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.turns import Turns
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


@dataclass(slots=True)
class _Rater:
    """What one rater has answered, and what follows from it."""

    repeated: list[int]
    """In order: the n-th pairs that they vote on, counted from 0, which they see again."""
    votes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By task id: the vote that stands, in order of time."""
    pairs: dict[str, int] = field(default_factory=dict)
    """By item: its number among the pairs that they have voted on, from 0."""
    checks: list[tuple[int, Item]] = field(default_factory=list)
    """Checks of pairs that they have voted on which are not answered yet, with the number of the pair; sorted."""
    repeats: list[tuple[int, Item]] = field(default_factory=list)
    """Repeats of such pairs, likewise."""


class Study:
    """The state of a labelling: the log, replayed, and who has what before them. Used by one thread at a time."""

    def __init__(
        self, config: LabelConfig, items: Sequence[Item], log: Log, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Replay the log; `clock` gives seconds."""
        self.config = config
        self.items = {item.id: item for item in items}
        self._known: dict[str, tuple[Item, Kind]] = {
            _task_id(item.id, kind): (item, kind)
            for item in items
            for kind in get_args(Kind)
            if kind != "check" or item.ruined_image
        }
        self.name = hashlib.sha256(" ".join(sorted(self.items)).encode()).hexdigest()[:16]
        """What a page that keeps votes for later knows this study by; it says nothing of what is in it."""
        self._order = sorted(items, key=lambda item: self._chance("order", item.id, "everyone"))
        self._place = {item.id: place for place, item in enumerate(self._order)}
        self._turns = Turns([bool(item.ruined_image) for item in self._order], config.votes_per_pair)
        self.log = log
        self._clock = clock
        self._raters: dict[str, _Rater] = {}
        self._standing: dict[tuple[str, str], dict[str, Any]] = {}
        """By rater and key: the votes that stand, in order of time."""
        self._counts: Counter[str] = Counter()
        self._heard: dict[tuple[str, str], str] = {}
        """By rater and key: the task of every vote and every undo there was, for whoever sends one again."""
        self._replay()

    def tasks(self, rater: str, amount: int) -> list[Task]:
        """Return what a rater is to be asked next, and keep the pairs among it from others for a while."""
        now = self._clock()
        self._turns.expire(now)
        done = self._rater(rater).votes
        upcoming: list[Task] = []
        for item, kind in self._schedule(rater, amount):
            if len(upcoming) == amount:
                break
            if _task_id(item.id, kind) in done:
                continue
            if kind == "pair":
                self._turns.lease(self._place[item.id], rater, now + self.config.lease_seconds)
            upcoming.append(self._make(item, kind, rater))
        return upcoming

    def vote(self, rater: str, task_id: str, answer: str, *, key: str, reason: str, seconds: float) -> None:
        """Record an answer: left, right, tie, both_bad or skip. The same key again changes nothing.

        Raises UnknownTask, and OSError when the disk does not take the vote.
        """
        if event := self.vote_event(rater, task_id, answer, key=key, reason=reason, seconds=seconds):
            self.log.append(event)
            self.take(event)

    def undo(self, rater: str, *, key: str) -> Task:
        """Take a rater's last vote back and return what it was on. The same key again changes nothing.

        Raises UnknownTask where there is no vote, and OSError when the disk does not take the event.
        """
        if event := self.undo_event(rater, key=key):
            self.log.append(event)
            self.take(event)
        return self.undone(rater, key)

    def vote_event(
        self, rater: str, task_id: str, answer: str, *, key: str, reason: str, seconds: float
    ) -> dict[str, Any] | None:
        """Return a vote as it is written down, for `take` once it is; None when it was taken before."""
        if (rater, key) in self._heard:
            return None
        task = self._task(rater, task_id)
        if task_id in self._rater(rater).votes:
            raise UnknownTask("this pair has your vote already; press u to take it back first")
        choice = answer
        if answer in SIDES:
            choice = task.left if answer == "left" else ("second" if task.left == "first" else "first")
        if choice not in CHOICES:
            raise UnknownTask(f"there is no answer {answer!r}; it is one of left, right, tie, both_bad, skip")
        return {
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

    def undo_event(self, rater: str, *, key: str) -> dict[str, Any] | None:
        """Return the undo of a rater's last vote as it is written down; None when it was taken before."""
        if (rater, key) in self._heard:
            return None
        votes = self._rater(rater).votes
        if not votes:
            raise UnknownTask("there is no vote of yours to take back")
        last = votes[next(reversed(votes))]
        return {"event": "undo", "key": key, "vote": last["key"], "rater": rater, "time": round(time.time(), 3)}

    def take(self, event: dict[str, Any]) -> None:
        """Take an event that is in the log. Between it and its making there is none of the same rater."""
        self._hear(event)
        if event["event"] == "vote":
            self._add(event)
        else:
            self._remove(self._standing[event["rater"], event["vote"]])

    def undone(self, rater: str, key: str) -> Task:
        """Return the question that the undo with a key has brought back."""
        return self._task(rater, self._heard[rater, key])

    def progress(self, rater: str) -> tuple[int, int]:
        """Return how many questions a rater has answered, and how many there are for them, answered ones included."""
        self._turns.expire(self._clock())
        mine = self._rater(rater)
        pairs, checks = self._turns.num_free(rater)
        voted = len(mine.pairs)
        repeats = bisect_left(mine.repeated, voted + pairs) - bisect_left(mine.repeated, voted)
        left = pairs + checks + repeats + len(mine.checks) + len(mine.repeats)
        return len(mine.votes), len(mine.votes) + left

    @property
    def num_events(self) -> int:
        """How many votes and undos there were, taken together."""
        return len(self.log.events)

    def standing(self) -> list[dict[str, Any]]:
        """Return the votes that stand, in order of time."""
        return list(self._standing.values())

    def counts(self) -> Counter[str]:
        """Return how many votes stand, by kind."""
        return +self._counts

    def _schedule(self, rater: str, amount: int) -> Iterator[tuple[Item, Kind]]:
        """Yield what a rater is asked next, in order: pairs, checks among them, and repeats a while after their pairs.

        The pairs are those that they may still be given, at most `amount`; a check or repeat in it may be answered.
        """
        mine = self._rater(rater)
        voted = len(mine.pairs)
        last = voted + self._turns.num_free(rater)[0] - 1
        checks = ((number, 0, item) for number, item in mine.checks)
        repeats = ((min(number + _APART, last), 1, item) for number, item in mine.repeats)
        for due, is_repeat, item in heapq.merge(checks, repeats):
            if due >= voted:
                break
            yield item, "repeat" if is_repeat else "check"
        soon = deque(mine.repeats[bisect_left(mine.repeats, voted - _APART, key=_number) :])
        for number, place in enumerate(self._turns.free(rater, amount), start=voted):
            item = self._order[place]
            yield item, "pair"
            if _has(mine.repeated, number):
                soon.append((number, item))
            if item.ruined_image:
                yield item, "check"
            while soon and min(soon[0][0] + _APART, last) <= number:
                yield soon.popleft()[1], "repeat"

    def _rater(self, name: str) -> _Rater:
        if name not in self._raters:
            chance = random.Random(json.dumps([self.config.seed, "repeat", name]))
            numbers = [n for n in range(len(self._order)) if chance.random() < self.config.repeat_share]
            self._raters[name] = _Rater(numbers)
        return self._raters[name]

    def _make(self, item: Item, kind: Kind, rater: str) -> Task:
        left_is_first = self._chance("side", item.id, rater) < 0.5
        if kind == "check":
            left_is_first = self._chance("check", item.id, rater) < 0.5
        return Task(item, kind, "first" if left_is_first == (kind != "repeat") else "second")

    def _task(self, rater: str, task_id: str) -> Task:
        if task_id not in self._known:
            raise UnknownTask("there is no such pair here; reload the page")
        return self._make(*self._known[task_id], rater)

    def _chance(self, use: str, item: str, rater: str) -> float:
        """Return a number in [0, 1) that only what it is for decides."""
        digest = hashlib.sha256(json.dumps([self.config.seed, use, item, rater]).encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _replay(self) -> None:
        for event in self.log.events:
            self._hear(event)
        for event in standing(self.log.events):
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
        """Count a vote, and put down what it brings on: a pair its check and its repeat."""
        item, kind, rater = self.items[event["item"]], event["kind"], event["rater"]
        mine = self._rater(rater)
        mine.votes[_task_id(item.id, kind)] = event
        self._standing[rater, event["key"]] = event
        self._counts[kind] += 1
        if kind != "pair":
            _discard(mine.checks if kind == "check" else mine.repeats, mine.pairs.get(item.id))
            return
        number = mine.pairs[item.id] = len(mine.pairs)
        self._turns.vote(self._place[item.id], rater)
        if item.ruined_image and _task_id(item.id, "check") not in mine.votes:
            mine.checks.append((number, item))
        if _has(mine.repeated, number) and _task_id(item.id, "repeat") not in mine.votes:
            mine.repeats.append((number, item))

    def _remove(self, vote: dict[str, Any]) -> None:
        """Undo what `_add` did with a rater's last vote."""
        item, kind, rater = self.items[vote["item"]], vote["kind"], vote["rater"]
        mine = self._rater(rater)
        del mine.votes[_task_id(item.id, kind)], self._standing[rater, vote["key"]]
        self._counts[kind] -= 1
        number = mine.pairs.get(item.id)
        if kind == "pair":
            del mine.pairs[item.id]
            self._turns.unvote(self._place[item.id], rater, self._clock() + self.config.lease_seconds)
            _discard(mine.checks, number)
            _discard(mine.repeats, number)
        elif number is not None and (kind == "check" or _has(mine.repeated, number)):
            pending = mine.checks if kind == "check" else mine.repeats
            pending.insert(bisect_left(pending, number, key=_number), (number, item))


def _number(entry: tuple[int, Item]) -> int:
    return entry[0]


def _has(numbers: Sequence[int], number: int) -> bool:
    """Whether a number is among sorted ones."""
    index = bisect_left(numbers, number)
    return index < len(numbers) and numbers[index] == number


def _discard(pending: list[tuple[int, Item]], number: int | None) -> None:
    """Take the entry with a number out of a sorted list, if it is there."""
    if number is None:
        return
    index = bisect_left(pending, number, key=_number)
    if index < len(pending) and pending[index][0] == number:
        del pending[index]


def _task_id(item: str, kind: Kind) -> str:
    return hashlib.sha256(f"{item} {kind}".encode()).hexdigest()[:16]
