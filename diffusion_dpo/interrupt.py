"""Stopping on request: Ctrl-C, `kill`, and a closed terminal end a command in order, after it has saved."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the command to stop. Like KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number
        """What a shell expects: 130 for Ctrl-C, 143 for `kill`."""


@dataclass
class Stop:
    """Whether a signal has come in; read it between two steps."""

    signal_number: int | None = None

    @property
    def requested(self) -> bool:
        """True once a signal has asked to stop."""
        return self.signal_number is not None

    @property
    def exception(self) -> Interrupted:
        """What to raise once everything is saved."""
        assert self.signal_number is not None
        return Interrupted(self.signal_number)


def install() -> None:
    """Turn SIGTERM and SIGHUP into Interrupted, so that `finally` blocks run; Ctrl-C stays a KeyboardInterrupt.

    A signal that the caller ignores (`nohup`) stays ignored.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if _in_main_thread() and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise)


@contextmanager
def deferred() -> Iterator[Stop]:
    """Within it, the first signal only sets `stop.requested`; one after that raises Interrupted at once.

    Not within a second of the first: a launcher passes on what the terminal has sent to everyone already.

        with interrupt.deferred() as stop:
            for step in ...:
                ...
                if stop.requested:
                    save()
                    raise stop.exception

    A request that the block has not answered by its end is raised there, so no signal is lost.
    """
    stop = Stop()
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not stop.requested:
            stop.signal_number, first = number, time.monotonic()
        elif time.monotonic() - first > 1:
            raise Interrupted(number)

    before = {n: signal.getsignal(n) for n in _SIGNALS if _in_main_thread() and signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.requested:
        raise stop.exception


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


def _in_main_thread() -> bool:
    """Only the main thread may set handlers."""
    return threading.current_thread() is threading.main_thread()
