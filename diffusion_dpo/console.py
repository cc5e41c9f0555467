"""What people see while a command works: one-line decisions, progress bars with rate and time left, final paths."""

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
from rich.text import Text

_console = Console(highlight=False, soft_wrap=True)
_LINE_EVERY_SECONDS = 10


def say(text: str) -> None:
    """Print a line of plain text (no markup is interpreted)."""
    _console.print(text, markup=False)


def show(renderable: RenderableType) -> None:
    """Print a table or another object of rich as wide as it needs: a number that is cut off says something else."""
    needed = Measurement.get(_console, _console.options.update(width=1000), renderable).maximum
    wide = Console(highlight=False, quiet=_console.quiet, width=max(_console.width, needed))
    wide.print(renderable, crop=False)


def warn(text: str) -> None:
    """Print a warning, in yellow where there is colour."""
    _console.print(f"warning: {text}", style="yellow", markup=False)


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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=_console) as bar:
            task = bar.add_task(description, total=total, completed=done, note="")

            def advance(count: int = 1, note: str = "") -> None:
                bar.update(task, advance=count, note=note)

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
