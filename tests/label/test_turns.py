"""Who is given what, beside a plain reading of the rules that looks at everything; and that nothing grows."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_dpo.data.votes import standing
from diffusion_dpo.label.items import Item
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.study import Study, UnknownTask
from diffusion_dpo.label.turns import Turns
from diffusion_dpo.settings import LabelConfig

RATERS = ("ann", "bob", "cyd", "dan")
LEASE = 60


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_items(amount: int, *, checks: bool = False) -> list[Item]:
    return [
        Item(f"{i:032x}", "p", f"a{i}", f"b{i}", f"{i}", f"{-i}", "r" * (checks and i % 3 == 0)) for i in range(amount)
    ]


class Plain:
    """The rules as they read: every question looks at all events, all pairs and all leases."""

    def __init__(self, study: Study, needed: int, clock: Clock) -> None:
        self.study, self.needed, self.clock = study, needed, clock
        self.leases: dict[str, dict[str, float]] = {}

    def votes(self, rater: str) -> list[dict[str, Any]]:
        return [vote for vote in standing(self.study.log.events) if vote["rater"] == rater]

    def is_free(self, item: Item, rater: str) -> bool:
        voters = {
            it["rater"] for it in standing(self.study.log.events) if (it["item"], it["kind"]) == (item.id, "pair")
        }
        kept = self.leases.get(item.id, {})
        others = sum(until > self.clock.now for name, until in kept.items() if name not in {rater, *voters})
        return rater not in voters and len(voters) + others < self.needed

    def schedule(self, rater: str) -> list[tuple[str, str]]:
        """Return everything that is left for a rater, in order."""
        votes = self.votes(rater)
        voted = [self.study.items[vote["item"]] for vote in votes if vote["kind"] == "pair"]
        seen = voted + [item for item in self.study._order if self.is_free(item, rater)]
        repeated = self.study._raters[rater].repeated
        asked = []
        for number, item in enumerate(seen):
            asked.append((number, 0, number, item.id, "pair"))
            if item.ruined_image:
                asked.append((number, 1, number, item.id, "check"))
            if number in repeated:
                asked.append((min(number + 10, len(seen) - 1), 2, number, item.id, "repeat"))
        done = {(vote["item"], vote["kind"]) for vote in votes}
        return [(item, kind) for *_, item, kind in sorted(asked) if (item, kind) not in done]

    def lease(self, rater: str, tasks: list[tuple[str, str]]) -> None:
        for item, kind in tasks:
            if kind == "pair":
                self.leases.setdefault(item, {})[rater] = self.clock.now + LEASE


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_questions_are_those_of_the_plain_rules(tmp_path: Path, needed: int) -> None:
    """Raters come, go, vote late or on nothing they were asked, take back, and come again after a restart."""
    config = LabelConfig(votes_per_pair=needed, repeat_share=0.3, lease_seconds=LEASE)
    items, clock, rng = make_items(14, checks=True), Clock(), random.Random(needed)
    for _ in range(3):
        study = Study(config, items, Log(tmp_path / "votes.jsonl"), clock)
        plain = Plain(study, needed, clock)
        for step in range(120):
            rater = rng.choice(RATERS)
            amount = rng.choice((1, 3, 12))
            asked = [(task.item.id, task.kind) for task in study.tasks(rater, amount)]
            expected = plain.schedule(rater)
            assert asked == expected[:amount]
            plain.lease(rater, asked)
            done = len(plain.votes(rater))
            assert study.progress(rater) == (done, done + len(plain.schedule(rater)))
            key = f"{study.name}{clock.now}{step}"
            if rng.random() < 0.3:
                try:
                    task = study.undo(rater, key=key)
                    plain.lease(rater, [(task.item.id, task.kind)])
                except UnknownTask:
                    assert done == 0
            elif rng.random() < 0.6 and asked:
                item, kind = rng.choice(asked[:2]) if rng.random() < 0.8 else (rng.choice(items).id, "pair")
                known = next(name for name, (it, of) in study._known.items() if (it.id, of) == (item, kind))
                is_early = kind != "pair" and item not in study._raters[rater].pairs
                if known not in study._raters[rater].votes and not is_early:
                    study.vote(rater, known, "tie", key=key, reason="", seconds=1)
                    plain.leases.get(item, {}).pop(rater if kind == "pair" else "", None)
            clock.now += rng.choice((0, 1, 20, LEASE))
        study.log._file.close()


def calls_in(work: Callable[[], None]) -> int:
    """Return how many functions are called, and lines run, within a piece of work: a number without noise."""
    amount = 0

    def trace(*_: Any) -> Any:
        nonlocal amount
        amount += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return amount


def work_of_a_vote(path: Path, *, pairs: int, raters: int, needed: int, votes: int) -> int:
    """Return the work of 20 votes of somebody who comes when others have voted, and hold what they hold."""
    config = LabelConfig(votes_per_pair=needed)
    study = Study(config, make_items(pairs, checks=True), Log(path))
    for number in range(raters):
        for turn in range(votes):
            task = study.tasks(f"rater {number}", 4)[0]
            study.vote(f"rater {number}", task.id, "tie", key=f"key {turn}", reason="", seconds=1)

    def vote() -> None:
        for turn in range(20):
            tasks = study.tasks("me", 4)
            study.progress("me")
            study.vote("me", tasks[0].id, "left", key=f"key-{turn}", reason="", seconds=1)
            study.counts()

    study.tasks("me", 4)
    work = calls_in(vote)
    study.log._file.close()
    return work


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> int:
    return work_of_a_vote(tmp_path_factory.mktemp("small") / "log", pairs=200, raters=2, needed=1, votes=5)


@pytest.mark.parametrize(
    "pairs,raters,needed,votes",
    [(20_000, 2, 1, 5), (2_000, 60, 1, 5), (2_000, 2, 1, 400), (2_000, 30, 3, 20)],
    ids=["pairs", "raters and leases", "votes", "votes a pair"],
)
def test_a_vote_is_the_same_work_whatever_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, pairs: int, raters: int, needed: int, votes: int
) -> None:
    monkeypatch.setattr("os.fsync", lambda handle: None)
    work = work_of_a_vote(tmp_path / "log", pairs=pairs, raters=raters, needed=needed, votes=votes)
    assert work < 1.5 * small


def test_what_a_rater_left_behind_comes_back_once_to_each(tmp_path: Path) -> None:
    """Also to those who have gone past it, and in the place that it had."""
    turns = Turns([False] * 9, 1)
    for place in turns.free("gone", 3):
        turns.lease(place, "gone", 10.0)
    assert turns.free("ann", 2) == [3, 4] and turns.num_free("ann") == (6, 0)
    turns.vote(3, "ann")
    turns.expire(9.9)
    assert turns.free("ann", 2) == [4, 5]
    turns.expire(10.0)
    assert turns.free("ann", 4) == turns.free("bob", 4) == [0, 1, 2, 4]
    turns.vote(0, "bob")
    assert turns.free("ann", 9) == turns.free("gone", 9) == [1, 2, 4, 5, 6, 7, 8]
    assert turns.num_free("ann") == turns.num_free("bob") == turns.num_free("newcomer") == (7, 0)


def test_a_place_that_two_hold_is_theirs_who_still_hold_it_when_the_other_lets_go() -> None:
    turns = Turns([False, False], 1)
    turns.lease(0, "bob", 100.0)
    turns.vote(0, "ann")  # late: it was hers before
    assert turns.free("bob", 2) == [1]
    turns.unvote(0, "ann", 50.0)
    assert turns.free("bob", 2) == [1]
    turns.expire(50.0)
    assert turns.free("bob", 2) == [0, 1] and turns.free("ann", 2) == [1]
    assert turns.num_free("bob") == (2, 0) and turns.num_free("ann") == (1, 0)
