"""A reference that is asked once: its errors on a few seeded draws of noise and timestep per example, kept on disk.

An error is a function of weights that never change and of a draw that its seed names, so that of each draw two numbers
per pair are all that training needs of the reference: epoch e goes by draw e mod `reference.num_draws`. Nobody asks
the reference again, and full fine-tuning holds no second copy of the weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data.order import Visit
from diffusion_dpo.files import atomic_path, settle
from diffusion_dpo.training.errors import reference_errors

if TYPE_CHECKING:
    from diffusion_dpo.training.batches import Reader

CELLS_PER_FILE = 1024
_VERSION = 1
_WORDS = {
    "version": "format",
    "base_weights": "base model",
    "encoded": "cache of images and prompts",
    "precision": "precision",
    "draws": "choice of draws",
    "examples": "choice of examples",
}
"""What a fact is about, for a message."""


@dataclass(frozen=True)
class CachedErrors:
    """The reference's errors, in memory: 4 bytes per image and draw."""

    num_draws: int
    table: np.ndarray
    """(draws, examples, K), float32; NaN where no step of the run looks."""

    def draw_of(self, visit: Visit) -> Visit:
        """Return the visit whose noise, timestep, dropout and flip this visit takes."""
        return Visit(visit.index, visit.epoch % self.num_draws)

    def of(self, draws: Sequence[Visit]) -> np.ndarray:
        """Return the errors (B, K) of some draws."""
        errors = self.table[[draw.epoch for draw in draws], [draw.index for draw in draws]]
        assert not np.isnan(errors).any(), "a draw that no step was expected to need"
        return errors


def build(root: Path, reader: "Reader", facts: Mapping[str, Any]) -> CachedErrors:
    """Ask the reference about every draw that the run will need and that is not known yet; return all of them.

    `facts` is what decides the errors, beside the draw. Files are whole or absent, and each is made by one process.
    """
    facts, processes = {"version": _VERSION, **facts}, reader.processes
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    folder = root / f"reference-{name}"
    if processes.is_main:
        settle(folder, facts, _WORDS)
    num_draws = reader.config.reference.num_draws
    cells = _cells(reader, num_draws)
    num_images = len(reader.examples[0].images)
    errors = CachedErrors(num_draws, np.full((cells[:, 0].max() + 1, len(reader.examples), num_images), np.nan, "f4"))
    files = {
        folder / f"errors-{number:05d}.safetensors": cells[start : start + CELLS_PER_FILE]
        for number, start in enumerate(range(0, len(cells), CELLS_PER_FILE))
    }
    found = [path for path, part in files.items() if _load(path, part, errors)] if processes.is_main else []
    found = processes.from_main(found)  # or the shares of two processes might not be those of one list
    missing = [path for path in files if path not in set(found)]
    if missing:
        todo = sum(len(files[path]) for path in missing)
        say(f"reference: its errors on {todo} draws, {num_draws} an example at most, are computed into {folder}")
        mine = processes.share(missing)
        with progress("reference", sum(len(files[path]) for path in mine), "draws") as advance:
            for path in mine:
                _make(path, files[path], reader, advance)
        processes.wait()
    for path in missing if processes.is_main else files:
        if not _load(path, files[path], errors):
            raise ConfigError(f"{path} was just written and cannot be read; run the same command again")
    return errors


def _cells(reader: "Reader", num_draws: int) -> np.ndarray:
    """Return the distinct draws of the run as (draw, example), int64 (n, 2), in the order in which they are first met.

    Before an epoch is `num_draws` nothing repeats, and after it nothing is new.
    """
    parts = []
    for step in range(reader.config.max_steps):
        indices, epochs = reader.schedule.batch(step)
        fresh = epochs < num_draws
        parts.append(np.stack([epochs[fresh], indices[fresh]], axis=1))
        if len(reader.schedule.groups) == 1 and not fresh.any():
            break
    return np.concatenate(parts)


def _make(path: Path, cells: np.ndarray, reader: "Reader", advance: Any) -> None:
    import torch
    from safetensors.torch import save_file

    size = reader.config.per_device_batch_size
    groups = reader.group_of[cells[:, 1]]
    values = np.empty((len(cells), len(reader.examples[0].images)), "f4")
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        for start in range(0, len(places), size):
            part = places[start : start + size]
            visits = [Visit(int(index), int(draw)) for draw, index in cells[part]]
            batch = reader.draw(visits).to(reader.model.device)
            values[part] = reference_errors(reader.model, batch).cpu().numpy()
            advance(len(part))
    tensors = {"cells": torch.from_numpy(cells.copy()), "errors": torch.from_numpy(values)}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"sha256": _digest(cells, values)})


def _load(path: Path, cells: np.ndarray, errors: CachedErrors) -> bool:
    """Put the errors of a file where they belong; return whether it is there, whole, and has all of `cells`."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return False
    try:
        with safe_open(path, "np") as file:
            found, values, told = file.get_tensor("cells"), file.get_tensor("errors"), file.metadata()["sha256"]
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        warn(f"{path} is damaged ({error}); the reference is asked again")
        return False
    if told != _digest(found, values):
        warn(f"{path} is damaged (not what was written); the reference is asked again")
        return False
    inside = found[:, 0] < len(errors.table)  # another run may need more draws than this one
    draws, indices = found[inside].T
    errors.table[draws, indices] = values[inside]
    return not np.isnan(errors.table[cells[:, 0], cells[:, 1]]).any()


def _digest(cells: np.ndarray, values: np.ndarray) -> str:
    return hashlib.sha256(cells.tobytes() + values.tobytes()).hexdigest()
