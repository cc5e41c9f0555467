"""Checkpoints that are whole or absent: staged, hashed, renamed, and only then are old ones removed.

A checkpoint is a folder `step-00000100/` of safetensors files, one per named part, and `manifest.json`, written last,
with the size and sha256 of every file and a hash of itself. Nothing is pickled, neither written nor read.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import warn
from diffusion_dpo.files import put_in_place

if TYPE_CHECKING:
    from torch import Tensor

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: `parts[name]` maps names to tensors (on the CPU), `state` is plain JSON."""

    step: int
    parts: dict[str, dict[str, "Tensor"]]
    state: dict[str, Any]


def save(
    folder: Path, step: int, parts: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-XXXXXXXX` and then remove all but the newest `keep`; return its path.

    When anything fails (a full disk, a kill) no older checkpoint has been touched, and what was begun is not mistaken
    for a checkpoint.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob(".staging-*"), *folder.glob(".step-*")):  # of a run that was killed
        shutil.rmtree(leftover)
    staging = folder / f".staging-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    try:
        files = {}
        for name, tensors in parts.items():
            path = staging / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
            files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        manifest = staging / _MANIFEST
        facts = {"step": step, "state": dict(state), "files": files}
        manifest.write_text(json.dumps({**facts, "sha256": _sha256_of_facts(facts)}, indent=2))
        final = folder / f"step-{step:08d}"
        put_in_place(staging, final)  # of a damaged one of the same step, or it would have been resumed from
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    older = sorted((path for path in folder.glob("step-*") if path.name < final.name), reverse=True)
    newer = [
        path for path in folder.glob("step-*") if path.name > final.name
    ]  # damaged: the run came from before them
    for path in [*older[keep - 1 :], *newer]:
        shutil.rmtree(path)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files are what its manifest says, None when there is none.

    Damaged ones are named in a warning and passed over.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            return load(path)
        except ConfigError as error:
            warn(f"{error}; trying the one before it")
    return None


def load(path: Path) -> Checkpoint:
    """Return one checkpoint; raises ConfigError when its files are not what its manifest says."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    fault = _fault(path)
    if fault:
        raise ConfigError(f"the checkpoint {path} is damaged ({fault})")
    manifest = json.loads((path / _MANIFEST).read_text())
    try:
        parts = {Path(name).stem: load_file(path / name) for name in manifest["files"]}
        found = Checkpoint(int(manifest["step"]), parts, dict(manifest["state"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"the checkpoint {path} is damaged ({_first_line(error)})") from error
    weights = [(name, it) for name, tensors in parts.items() if name != "optimizer" for it in tensors.values()]
    bad = [name for name, it in weights if not it.isfinite().all()]
    if bad:
        raise ConfigError(f"the checkpoint {path} is damaged ({bad[0]} holds numbers that are not finite)")
    return found


def refuse_misfit(found: Checkpoint, expected: Mapping[str, Mapping[str, "Tensor"]], where: Path) -> None:
    """Raise ConfigError where a checkpoint lacks parts, or tensors of these names and shapes."""
    for part, tensors in expected.items():
        shapes = {name: tuple(value.shape) for name, value in found.parts.get(part, {}).items()}
        for name, tensor in tensors.items():
            if shapes.get(name) != tuple(tensor.shape):
                there = shapes.get(name, "nothing")
                raise ConfigError(
                    f"the checkpoint of step {found.step} in {where} is not of this model: {part} holds {there} for "
                    f"{name}, of shape {tuple(tensor.shape)}; move it away"
                )


def _fault(path: Path) -> str:
    """Say what is wrong with a checkpoint, "" when it is whole."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest.pop("sha256") != _sha256_of_facts(manifest):
            return f"{_MANIFEST} is not what was written"
        files = manifest["files"]
        for name, facts in files.items():
            if (path / name).stat().st_size != facts["size"] or _sha256(path / name) != facts["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {_first_line(error)}"
    return ""


def _first_line(error: Exception) -> str:
    """Return the start of an error's text, on one line."""
    return " ".join(str(error).split())[:200]


def _sha256_of_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
