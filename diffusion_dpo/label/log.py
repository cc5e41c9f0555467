"""The log of votes: an event is on the disk before it is acknowledged, or it is not in the log at all."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffusion_dpo.data.votes import read_lines
from diffusion_dpo.files import fsync_folder


class Log:
    """An append-only file of JSON lines. Used by one process, whose folder is locked, and one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open a log, new or not; what a crash cut short is cut away, so that nothing is ever joined to it."""
        self.events: list[dict[str, Any]] = read_lines(path)
        self._file = path.open("ab", buffering=0)
        self._end = path.read_bytes().rfind(b"\n") + 1
        self._file.truncate(self._end)
        os.fsync(self._file.fileno())
        fsync_folder(path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, *events: dict[str, Any]) -> None:
        """Write events with one fsync.

        Raises OSError, and leaves the log as it was, when the disk does not take them.
        """
        lines = b"".join(json.dumps(event, ensure_ascii=False).encode() + b"\n" for event in events)
        try:
            if self._file.write(lines) < len(lines):  # what a full disk does to the last line that it takes
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(lines)
        self.events += events


class SharedLog:
    """A log for many who write at once: whoever comes while an fsync goes on shares the next one."""

    def __init__(self, log: Log, taken: Callable[[dict[str, Any]], None]) -> None:
        """`taken` is called with each event, in the order of the log, once it is on the disk."""
        self._log = log
        self._taken = taken
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def append(self, event: dict[str, Any]) -> None:
        """Return when an event is on the disk; raises OSError when the disk does not take it."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((event, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        try:
            while self._waiting:
                now, self._waiting = self._waiting, []
                await self._write_together(now)
        finally:
            self._writing = None

    async def _write_together(self, entries: list[tuple[dict[str, Any], asyncio.Future[None]]]) -> None:
        problem: OSError | None = None
        try:
            await asyncio.to_thread(self._log.append, *(event for event, _ in entries))
        except OSError as error:
            problem = error
        for event, written in entries:
            if problem is None:
                self._taken(event)
            if written.cancelled():  # whoever waited is gone
                continue
            if problem is None:
                written.set_result(None)
            else:
                written.set_exception(problem)
