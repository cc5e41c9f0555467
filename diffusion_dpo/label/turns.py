"""Whose turn is at which place: each place of one common order is given to as many raters as it needs votes.

No operation looks at all places, all votes, all leases or all raters. A rater walks along the order once; behind them
only a place that becomes free again concerns them. What ends a lease is a heap; counts are kept as places change. Each
costs the logarithm of a small number, and the length of a byte search where a newcomer skips what others have done.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush


@dataclass(slots=True)
class _Place:
    """Who has voted there, and for whom it is kept until when: a rater is in one of them at most."""

    has_check: bool
    voters: set[str] = field(default_factory=set)
    leases: dict[str, float] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        return len(self.voters) + len(self.leases)


@dataclass(slots=True)
class _Walk:
    """How far a rater has come."""

    reached: int = 0
    """Every place before this one was taken, or is in `ahead`, when they came by."""
    ahead: list[int] = field(default_factory=list)
    """In order: places before `reached` that may be theirs; which are is seen when they are needed."""
    heard: int = 0
    """Of the places that became free again, how many they know of."""
    pairs: int = 0
    """Free places beyond those that are open to everybody: their own leases; less the open ones with their vote."""
    checks: int = 0
    """Of these, the ones with a check."""


class Turns:
    """Places, walked by raters. A place is open while votes and leases are fewer than the votes that it needs."""

    def __init__(self, has_check: Sequence[bool], votes_needed: int) -> None:
        self._places = [_Place(has_it) for has_it in has_check]
        self._needed = votes_needed
        self._is_open = bytearray(b"\1" * len(self._places))
        self._num_open = len(self._places)
        self._num_open_checks = sum(has_check)
        self._again: list[int] = []
        """Places that became free again, in order of time."""
        self._ends: list[tuple[float, int, str]] = []
        """A heap with at least one entry a lease, which comes no later than its end."""
        self._walks: defaultdict[str, _Walk] = defaultdict(_Walk)

    def free(self, rater: str, amount: int) -> list[int]:
        """Return the first places, in order, that a rater has not voted at and that others leave to them."""
        walk = self._walks[rater]
        for place in self._again[walk.heard :]:
            if place < walk.reached:
                _insert(walk.ahead, place)
        walk.heard = len(self._again)
        kept = 0
        while kept < amount:
            if kept == len(walk.ahead) and not self._walk_on(walk, len(self._places)):
                break
            if self._is_free(self._places[walk.ahead[kept]], rater):
                kept += 1
            else:
                del walk.ahead[kept]
        return walk.ahead[:kept]

    def num_free(self, rater: str) -> tuple[int, int]:
        """Return how many places `free` would find, and how many of them have a check."""
        walk = self._walks[rater]
        return self._num_open + walk.pairs, self._num_open_checks + walk.checks

    def lease(self, place: int, rater: str, until: float) -> None:
        """Keep a place that is free for a rater from the others."""
        leases = self._places[place].leases
        if rater in leases:  # its entry in the heap is put off when it comes
            leases[rater] = until
            return
        with self._changed(place):
            leases[rater] = until
        heappush(self._ends, (until, place, rater))

    def expire(self, now: float) -> None:
        """End the leases that are over."""
        while self._ends and self._ends[0][0] <= now:
            _, place, rater = heappop(self._ends)
            leases = self._places[place].leases
            if leases.get(rater, now) > now:
                heappush(self._ends, (leases[rater], place, rater))
            elif rater in leases:
                with self._changed(place):
                    del leases[rater]

    def vote(self, place: int, rater: str) -> None:
        """Count a vote, in place of the rater's lease if there is one."""
        with self._changed(place) as it:
            it.leases.pop(rater, None)
            it.voters.add(rater)

    def unvote(self, place: int, rater: str, until: float) -> None:
        """Take a vote back; the place is kept for the rater."""
        with self._changed(place) as it:
            it.voters.discard(rater)
            it.leases[rater] = until
        heappush(self._ends, (until, place, rater))
        walk = self._walks[rater]
        while self._walk_on(walk, place):
            pass
        _insert(walk.ahead, place)
        walk.reached = max(walk.reached, place + 1)

    def _walk_on(self, walk: _Walk, end: int) -> bool:
        """Take the next open place before `end` into what lies ahead; return whether there was one."""
        place = self._is_open.find(1, walk.reached, end)
        if place < 0:
            return False
        walk.ahead.append(place)
        walk.reached = place + 1
        return True

    def _is_free(self, it: _Place, rater: str) -> bool:
        return rater not in it.voters and it.taken - (rater in it.leases) < self._needed

    @contextmanager
    def _changed(self, place: int) -> Iterator[_Place]:
        """Keep the counts while a place changes, and remember it where it became free for somebody."""
        it = self._places[place]
        before = it.taken
        self._count(it, -1)
        yield it
        self._count(it, 1)
        self._is_open[place] = it.taken < self._needed
        if it.taken < before and it.taken <= self._needed:
            self._again.append(place)

    def _count(self, it: _Place, sign: int) -> None:
        """Add a place to the counts or take it out of them: of everybody, and of those for whom it differs."""
        concerned: set[str] | dict[str, float] = set()
        if it.taken < self._needed:
            self._num_open += sign
            self._num_open_checks += sign * it.has_check
            concerned, sign = it.voters, -sign
        elif it.taken == self._needed:
            concerned = it.leases
        for rater in concerned:
            walk = self._walks[rater]
            walk.pairs += sign
            walk.checks += sign * it.has_check


def _insert(places: list[int], place: int) -> None:
    """Insert a place where it is not there yet; `places` is sorted."""
    index = bisect_left(places, place)
    if places[index : index + 1] != [place]:
        places.insert(index, place)
