"""What people said of pairs of images: the log of `label`, and the votes in it that stand.

`votes.jsonl` has one JSON object a line, written and synced before a vote is acknowledged. State is the replay of the
log; undo is an event of its own. A last line that a crash cut short was never acknowledged, and does not count.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from diffusion_dpo.config import ConfigError

LOG, ITEMS = "votes.jsonl", "items.jsonl"
Choice = Literal["first", "second", "tie", "both_bad", "skip"]
CHOICES = get_args(Choice)


@dataclass(frozen=True)
class Vote:
    """One person's choice between two images, whichever side they were on; of a comparison, first is the baseline."""

    prompt: str
    first_uid: str
    second_uid: str
    rater: str
    choice: Choice


def read_votes(folder: Path) -> list[Vote]:
    """Return the votes of a labelling that stand, without repeats and attention checks; ConfigError if it is none."""
    if not (folder / ITEMS).is_file():
        raise ConfigError(f"{folder} is no folder of `label`: it has no {ITEMS}")
    items = {item["id"]: item for item in read_lines(folder / ITEMS)}
    return [
        Vote(
            items[event["item"]]["prompt"],
            items[event["item"]]["first_uid"],
            items[event["item"]]["second_uid"],
            event["rater"],
            event["choice"],
        )
        for event in standing(read_lines(folder / LOG))
        if event["kind"] == "pair" and event["item"] in items
    ]


def standing(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the votes that were not taken back, in order; each is known by its rater and its `key`."""
    votes: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event["event"] == "undo":
            votes.pop((event["rater"], event["vote"]), None)
        else:
            votes.setdefault((event["rater"], event["key"]), event)
    yield from votes.values()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log; none where there is no file. Raises ConfigError for a line that is damaged."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break was cut short
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} line {number} is damaged: {error}; remove that line to go on") from None
        if not isinstance(entry, dict) or not entry:
            raise ConfigError(f"{path} line {number} is damaged: it says nothing; remove that line to go on")
        found.append(entry)
    return found
