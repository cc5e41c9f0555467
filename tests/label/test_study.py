"""Who is asked what: blind and fair sides, repeats, checks, leases, undo, and a state that is the log's replay."""

import asyncio
import errno
import json
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from diffusion_dpo import label
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.votes import read_lines, read_votes
from diffusion_dpo.label import _claimed, _opened
from diffusion_dpo.label.items import make_items
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.results import results_of
from diffusion_dpo.label.study import Study, Task, UnknownTask
from diffusion_dpo.settings import LabelConfig
from tests.label.studies import make_config, write_candidates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def open_study(config: LabelConfig, clock: Clock | None = None) -> Study:
    config.output_dir.mkdir(exist_ok=True)
    return Study(
        config, make_items(config, config.output_dir), Log(config.output_dir / "votes.jsonl"), clock or Clock()
    )


def answer(study: Study, rater: str, task: Task, choice: str = "left", **options: Any) -> None:
    facts = {"key": f"key-{rater}-{task.id}", "reason": "", "seconds": 1.0} | options
    study.vote(rater, task.id, choice, **facts)


def answer_all(study: Study, rater: str, choice: str = "left") -> list[Task]:
    asked = []
    while tasks := study.tasks(rater, 1):
        answer(study, rater, tasks[0], choice)
        asked.append(tasks[0])
    return asked


def test_sides_are_random_stored_and_the_same_after_a_restart(tmp_path: Path) -> None:
    config = make_config(tmp_path, prompts=[str(i) for i in range(200)], per_prompt=2)
    study = open_study(config)
    asked = answer_all(study, "ann")
    assert len(asked) == 200 and len({task.item.prompt for task in asked}) == 200
    lefts = Counter(task.left for task in asked)
    assert 70 < lefts["first"] < 130
    for event, task in zip(read_lines(config.output_dir / "votes.jsonl"), asked, strict=True):
        assert (event["left"], event["choice"], event["item"]) == (task.left, task.left, task.item.id)
    assert not open_study(config).tasks("ann", 1)
    others = {task.id: task.left for task in open_study(make_config(tmp_path, "votes_per_pair=2")).tasks("bob", 200)}
    same = sum(others[task.id] == task.left for task in asked)
    assert 70 < same < 130  # another rater sees other sides


def test_repeats_come_later_with_the_sides_swapped_and_count_for_nothing_else(tmp_path: Path) -> None:
    config = make_config(tmp_path, "repeat_share=0.3", prompts=[str(i) for i in range(60)])
    study = open_study(config)
    assert study.progress("ann")[0] == 0
    total = study.progress("ann")[1]
    asked = answer_all(study, "ann", "left")
    assert len(asked) == total and 8 <= total - 60 <= 30
    place = {task.item.id: i for i, task in enumerate(asked) if task.kind == "pair"}
    left = {task.item.id: task.left for task in asked if task.kind == "pair"}
    for i, task in enumerate(asked):
        if task.kind == "repeat":
            assert task.left != left[task.item.id]
            assert i - place[task.item.id] > 9 or place[task.item.id] > 45
    assert len(read_votes(config.output_dir)) == 60
    (rater,) = results_of(study.standing(), study.items).raters
    assert rater.repeats == (0, total - 60)  # always left is never the same image
    assert any("the same answer" in warning for warning in rater.warnings)
    assert any("chose the left image in" in warning for warning in rater.warnings)


def test_attention_checks_are_counted_and_make_no_pair(tmp_path: Path) -> None:
    config = make_config(tmp_path, "checks_share=0.5")
    study = open_study(config)
    asked = answer_all(study, "ann", "right")
    checks = [task for task in asked if task.kind == "check"]
    assert len(checks) == 6 and all(task.images[0] != task.images[1] for task in checks)
    passed, of = results_of(study.standing(), study.items).raters[0].checks
    assert of == 6 and passed == sum(task.left == "second" for task in checks)
    assert len(read_votes(config.output_dir)) == 12


def test_two_raters_do_not_get_the_same_pair_until_a_lease_ends(tmp_path: Path) -> None:
    clock = Clock()
    study = open_study(make_config(tmp_path, "lease_seconds=60"), clock)
    first, second = study.tasks("ann", 6), study.tasks("bob", 12)
    assert len(first) == len(second) == 6
    assert not {task.item.id for task in first} & {task.item.id for task in second}
    assert study.tasks("ann", 6) == first
    clock.now = 61
    assert len(study.tasks("bob", 12)) == 12
    assert not study.tasks("ann", 12)


def test_every_pair_is_shown_to_as_many_as_are_asked_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, "votes_per_pair=2", "labels=soft")
    study = open_study(config)
    for rater, choice in (("ann", "left"), ("bob", "left")):
        assert len(answer_all(study, rater, choice)) == 12
    assert not study.tasks("cyd", 1)
    found = results_of(study.standing(), study.items)
    assert found.agreement is not None and found.agreement[1] == 12
    assert found.kappa is not None and found.alpha is not None


def test_a_pair_that_was_answered_is_not_answered_twice(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path))
    (task,) = study.tasks("ann", 1)
    answer(study, "ann", task, "left")
    answer(study, "ann", task, "left")  # the same key: the answer to the first was lost on the way
    assert study.counts()["pair"] == 1
    with pytest.raises(UnknownTask, match="has your vote already"):
        answer(study, "ann", task, "right", key="another-key")
    with pytest.raises(UnknownTask, match="no such pair"):
        study.vote("ann", "nothing", "left", key="key-12345", reason="", seconds=1)
    with pytest.raises(UnknownTask, match="no answer 'middle'"):
        answer(study, "ann", study.tasks("ann", 1)[0], "middle")


def test_undo_is_an_event_and_brings_the_pair_back(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    with pytest.raises(UnknownTask, match="no vote of yours"):
        study.undo("ann", key="undo-0")
    tasks = study.tasks("ann", 3)
    for task in tasks:
        answer(study, "ann", task)
    assert study.undo("ann", key="undo-1") == tasks[2] and study.undo("ann", key="undo-2") == tasks[1]
    assert study.undo("ann", key="undo-1") == tasks[2]  # sent again, since the answer was lost
    assert study.tasks("ann", 2) == tasks[1:]
    answer(study, "ann", tasks[1], "tie", key="second-thoughts")
    log = read_lines(config.output_dir / "votes.jsonl")
    assert [event["event"] for event in log] == ["vote"] * 3 + ["undo"] * 2 + ["vote"]
    again = open_study(config)
    assert again.standing() == study.standing() and len(again.standing()) == 2
    assert [vote.choice for vote in read_votes(config.output_dir)] == [tasks[0].left, "tie"]
    assert again.undo("ann", key="undo-2") == tasks[1] and len(again.standing()) == 2
    assert again.undo("ann", key="undo-3") == tasks[1] and len(again.standing()) == 1
    answer(again, "ann", tasks[1], "tie", key="second-thoughts")  # late, and taken back already
    assert len(again.standing()) == 1


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_vote_that_a_crash_cut_short_is_not_there_and_harms_none(tmp_path: Path, cut: int) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    for task in study.tasks("ann", 3):
        answer(study, "ann", task)
    path = config.output_dir / "votes.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(read_votes(config.output_dir)) == 2
    again = open_study(config)
    assert again.counts()["pair"] == 2
    answer(again, "ann", again.tasks("ann", 1)[0])
    assert len(read_lines(path)) == 3


def test_a_full_disk_refuses_the_vote_and_leaves_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    first, second, _ = study.tasks("ann", 3)
    answer(study, "ann", first)
    path = config.output_dir / "votes.jsonl"
    before = path.read_bytes()
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        answer(study, "ann", second)
    assert path.read_bytes() == before and study.counts()["pair"] == 1
    monkeypatch.setattr(os, "fsync", real)
    answer(study, "ann", second)
    assert len(read_votes(config.output_dir)) == 2


def test_a_damaged_line_within_the_log_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    open_study(config)
    (config.output_dir / "votes.jsonl").write_text('{"event": "vo\n{"event": "undo", "vote": "x"}\n')
    with pytest.raises(ConfigError, match=r"votes\.jsonl line 1 is damaged"):
        open_study(config)


@pytest.mark.parametrize(
    "votes,labels,expected",
    [
        (["second", "second", "first"], "majority", (True, 1.0)),
        (["second", "second", "first"], "soft", (True, 2 / 3)),
        (["first", "tie"], "majority", "ties"),
        (["first", "second"], "soft", "votes evenly split"),
        (["both_bad"], "majority", "both bad"),
        (["skip"], "majority", "skipped"),
        (["first", "first", "tie"], "majority", (False, 1.0)),
    ],
)
def test_votes_become_pairs(tmp_path: Path, votes: list[str], labels: str, expected: Any) -> None:
    config = make_config(tmp_path, f"labels={labels}", f"votes_per_pair={len(votes)}", prompts=["one"])
    study = open_study(config)
    for number, choice in enumerate(votes):
        (task,) = study.tasks(f"rater {number}", 1)
        side = choice if choice not in ("first", "second") else "left" if task.left == choice else "right"
        answer(study, f"rater {number}", task, side, reason="other")
    folder, amount, drops = label.write_pairs(study, config.output_dir)
    if isinstance(expected, str):
        assert (amount, drops) == (0, {expected: 1}) and not folder.exists()
        return
    (pair,) = PairsData(path=folder, type="pairs").read()
    assert isinstance(pair, PreferencePair)
    second, probability = expected
    item = next(iter(study.items.values()))
    assert pair.chosen_uid == (item.second_uid if second else item.first_uid)
    assert pair.label_prob == pytest.approx(probability)
    assert json.loads((folder / "manifest.json").read_text())["labelled_by"] == ["human"]


def test_what_is_shown_says_nothing_of_where_it_came_from(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    uids = {uid for item in study.items.values() for uid in (item.first_uid, item.second_uid)}
    names = {path.stem for path in (config.output_dir / "images").iterdir()}
    assert len(names) == 24 and not names & uids
    other = make_config(tmp_path, f"output_dir={tmp_path / 'other'}")
    open_study(other)
    assert not names & {path.stem for path in (other.output_dir / "images").iterdir()}


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["path=nowhere"], "no file or folder nowhere to label"),
        (["output_dir={root}/candidates/label"], "lies inside"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, overrides: list[str], message: str) -> None:
    config = make_config(tmp_path, *(text.format(root=tmp_path) for text in overrides))
    with pytest.raises(ConfigError, match=message):
        label.export(config)


def test_one_image_a_prompt_is_nothing_to_ask_about(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompt has two different images"):
        label.export(make_config(tmp_path, per_prompt=1))


def test_a_public_address_needs_a_token() -> None:
    from diffusion_dpo.config import load

    with pytest.raises(ConfigError, match="can be reached by others"):
        load(LabelConfig, None, ["host=0.0.0.0"])
    with pytest.raises(ConfigError, match="token"):
        load(LabelConfig, None, ["token=short"])
    load(LabelConfig, None, ["host=0.0.0.0", "token=sixteen-letters-and-more"])


def test_no_more_people_are_given_a_pair_than_it_needs_votes(tmp_path: Path) -> None:
    study = open_study(make_config(tmp_path, "votes_per_pair=2"))
    given = [{task.item.id for task in study.tasks(name, 12)} for name in ("ann", "bob", "cleo", "dan")]
    assert len(given[0]) == len(given[1]) == 12 and not given[2] and not given[3]


def test_two_people_may_use_one_key(tmp_path: Path) -> None:
    config = make_config(tmp_path, "votes_per_pair=2")
    study = open_study(config)
    for name in ("ann", "bob"):
        answer(study, name, study.tasks(name, 1)[0], key="one-and-the-same")
    study.undo("bob", key="undo-of-bob")
    assert [event["rater"] for event in study.standing()] == ["ann"]
    assert open_study(config).standing() == study.standing()


def test_an_undo_without_a_key_is_one_of_an_earlier_version(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    study = open_study(config)
    answer(study, "ann", study.tasks("ann", 1)[0], key="a-vote")
    with (config.output_dir / "votes.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"event": "undo", "vote": "a-vote", "rater": "ann", "time": 1.0}\n')
    assert open_study(config).standing() == []


def test_a_port_that_is_taken_is_found_before_any_image_is_written(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = make_config(tmp_path, f"port={port}")
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            label.run(config)
    assert not (config.output_dir / "images").exists()


def test_answers_are_not_held_back(tmp_path: Path) -> None:
    """What asyncio accepts on a socket that does not name TCP has Nagle's algorithm on: 40 ms an answer."""
    config = make_config(tmp_path, "port=0")
    with label._listen(config) as listener:
        assert listener.proto == socket.IPPROTO_TCP

        async def is_undelayed() -> int:
            accepted = asyncio.get_running_loop().create_future()

            async def take(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                option = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                accepted.set_result(option)
                writer.close()

            async with await asyncio.start_server(take, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                found: int = await accepted
                writer.close()
            return found

        assert asyncio.run(is_undelayed())


def test_images_that_are_left_out_are_one_line_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_candidates(tmp_path / "candidates", [str(n) for n in range(40)], side_px=16)
    with pytest.raises(ConfigError, match="every image is broken"):
        label.export(make_config(tmp_path))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert line.startswith("warning: left out: 80 x smaller than 32 px (image ") and len(line) < 200


def test_a_study_goes_on_where_its_images_moved_and_not_with_others(tmp_path: Path) -> None:
    config = make_config(tmp_path, prompts=["a", "b"])
    with _claimed(config) as identity, _opened(config, identity) as study:
        items = study.items
    config.path.rename(tmp_path / "moved")
    moved = config.model_copy(update={"path": tmp_path / "moved"})
    with _claimed(moved) as identity, _opened(moved, identity) as study:
        assert study.items == items
    write_candidates(tmp_path / "others", ["a", "c"])
    others = config.model_copy(update={"path": tmp_path / "others"})
    with pytest.raises(ConfigError, match="belongs to another study"):  # noqa: SIM117
        with _claimed(others) as identity, _opened(others, identity):
            pass
