"""What a paid judge answered, one JSON object a line: to read, and so that nothing is asked twice after a kill."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn


class AnswerLog:
    """Raw answers by the key of what was asked. Lines are only appended; several processes may share the file."""

    def __init__(self, path: Path) -> None:
        """Read what is there. What a kill left of a line is asked again. Raises ConfigError for an unusable file."""
        self.path = path
        self._answers: dict[str, str] = {}
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                damaged = sum(not self._remember(line) for line in file if line.strip())
        except OSError as error:
            raise ConfigError(f"cannot use log_path {path}: {error}") from error
        if damaged:
            warn(f"{damaged} line{'s'[: damaged != 1]} of {path} cannot be read; what they answered is asked again")

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> str:
        return self._answers[key]

    def add(self, key: str, raw: str, about: Mapping[str, str]) -> None:
        """Keep an answer, on disk before it counts; `about` is for those who read the file. Called from any thread."""
        line = json.dumps({"key": key, **about, "raw": raw}).encode() + b"\n"
        with self._lock:
            try:
                self._append(line)
            except OSError as error:
                raise ConfigError(f"cannot write to log_path {self.path}: {error}") from error
            self._answers[key] = raw

    def _append(self, line: bytes) -> None:
        with self.path.open("ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line  # after what a kill left of a line
            file.write(line)
            os.fsync(file.fileno())

    def _remember(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:
            return False
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("key", "raw")):
            return False
        self._answers[entry["key"]] = entry["raw"]
        return True
