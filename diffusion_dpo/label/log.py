"""The log of votes: an event is on the disk before it is acknowledged, or it is not in the log at all."""

import errno
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from diffusion_dpo.data.votes import read_lines
from diffusion_dpo.files import fsync_folder


class Log:
    """An append-only file of JSON lines, one fsync an event. Used by one process, whose folder is locked."""

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

    def append(self, event: dict[str, Any]) -> None:
        """Write an event; raises OSError, and leaves the log as it was, when the disk does not take it."""
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):  # what a full disk does to the last line that it takes
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(line)
        self.events.append(event)
