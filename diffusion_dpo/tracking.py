"""What a run says about itself: `metrics.jsonl` always, TensorBoard where it is installed.

`metrics.jsonl` holds nothing that depends on the clock or the machine, so that a resumed run writes the same file.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from diffusion_dpo.files import atomic_path


class Tracker:
    """Appends one JSON object a step; continuing at step k drops what an interrupted run wrote from k on."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open the logs of a run that goes on with `first_step` (from 1)."""
        self._path = run_dir / "metrics.jsonl"
        kept = _lines_before(self._path, first_step)
        with atomic_path(self._path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step; one that is not finite (an fp16 overflow) is written as null."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Make what was logged survive a power cut; called before a checkpoint claims to be beyond it."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()


def _lines_before(path: Path, first_step: int) -> list[str]:
    """The whole lines of the steps before `first_step`; a line cut short or damaged by a crash ends them."""
    kept: list[str] = []
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break
        if step >= first_step or not line.endswith("\n"):
            break
        kept.append(line)
    return kept
