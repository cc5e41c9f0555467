"""What people see while a command works: one-line decisions, progress bars with rate and time left, final paths."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment, Segments
from rich.text import Text

_console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
_FOREIGN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but tab and line break, what turns the direction of a line, and halves of characters."""
_LINE_EVERY_SECONDS = 10


def plain(text: str) -> str:
    """Return text that a terminal shows and does not obey: anybody may have written what files and servers say."""
    return _FOREIGN.sub("\ufffd", text)


def say(text: str) -> None:
    """Print a line of plain text; neither markup nor controls in it are obeyed."""
    _console.print(plain(text))


def show(renderable: RenderableType) -> None:
    """Print a table or another object of rich as wide as it needs: a number that is cut off says something else.

    Like `say`, it obeys neither markup nor controls in the text of others.
    """
    needed = Measurement.get(_console, _console.options.update(width=1000), renderable).maximum
    width = max(_console.width, needed)
    wide = Console(highlight=False, quiet=_console.quiet, width=width, markup=False, emoji=False)
    parts = [Segment(plain(part.text), part.style, part.control) for part in wide.render(renderable)]
    wide.print(Segments(parts), crop=False, end="")


def warn(text: str) -> None:
    """Print a warning, in yellow where there is colour."""
    _console.print(plain(f"warning: {text}"), style="yellow")


def silence() -> None:
    """Print nothing from now on: another process of the same run speaks."""
    _console.quiet = True


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f} {self.unit}/s")


@contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Callable[..., None]]:
    """Show a bar; yields a function `advance(count=1, note="")`. Without a terminal, print a line now and then."""
    if _console.is_terminal and not _console.quiet:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=_console) as bar:
            task = bar.add_task(plain(description), total=total, completed=done, note="")

            def advance(count: int = 1, note: str = "") -> None:
                bar.update(task, advance=count, note=plain(note))

            yield advance
        return

    began = shown = time.monotonic()
    now = done

    def advance_plain(count: int = 1, note: str = "") -> None:
        nonlocal now, shown
        now += count
        instant = time.monotonic()
        if instant - shown >= _LINE_EVERY_SECONDS or (now >= total and instant - began >= 2):
            shown = instant
            rate = (now - done) / max(instant - began, 1e-9)
            left = (total - now) / max(rate, 1e-9)
            say(f"{description}: {now}/{total}, {rate:.1f} {unit}/s, {left:.0f} s left{' ' if note else ''}{note}")
            sys.stdout.flush()

    yield advance_plain
