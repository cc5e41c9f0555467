"""Where a judge's weights are: a file, a folder, or the hub; and how they are read: never by running what they say."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say

if TYPE_CHECKING:
    from torch import Tensor

_SMALL_FILES = ("*.json", "*.txt", "*.model")
Kind = Literal["model", "processor", "open_clip"]
"""A model of transformers, its preprocessor or tokenizer alone, or a model of open_clip."""
_MARKERS: dict[Kind, str] = {
    "model": "config.json",
    "processor": "preprocessor_config.json",
    "open_clip": "open_clip_config.json",
}
_WEIGHTS: dict[Kind, tuple[str, str]] = {
    "model": ("*.safetensors", "pytorch_model*.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
"""The weights on the hub, and the pickle that stands in where there are no safetensors."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Weights:
    """What a scorer needs, for finding it and for saying, in one sentence, what is missing and where to get it."""

    scorer: str
    pretrained: str
    """A local file or folder, or the id of a model on the Hugging Face hub."""
    revision: str | None
    """Branch, tag or commit on the hub; None takes the newest and says which one it is."""
    page: str
    """Where people download it."""
    licence: str

    def file(self, name: str) -> Path:
        """Return the file `pretrained`, or that of the name in its folder or on the hub; raises ConfigError."""
        local = Path(self.pretrained)
        if local.is_file():
            return local
        if local.is_dir():
            if not (local / name).is_file():
                raise self.missing(f"{local} lacks {name}", local)
            return local / name
        return self._download(name)

    def folder(self, kind: Kind = "model") -> Path:
        """Return the local folder of a model, downloading it if need be; raises ConfigError."""
        local = Path(self.pretrained)
        if local.is_file():
            raise ConfigError(f"scorer {self.scorer}: {local} is a file; give the folder that holds it")
        marker = _MARKERS[kind]
        if not local.is_dir():
            local = self.snapshot(kind)[0].parent
        if not (local / marker).is_file():
            raise self.missing(f"{local} lacks {marker}", local)
        if kind in _WEIGHTS and not any([*local.glob("*.safetensors"), *local.glob("*.bin")]):
            raise self.missing(f"{local} has {marker} but no model.safetensors", local)
        return local

    def snapshot(self, kind: Kind) -> list[Path]:
        """Return the files of a model on the hub: configuration, vocabulary, weights (pickles only if need be).

        What else lies in the cache is not among them. Raises ConfigError when they cannot be had.
        """
        marker = self._download(_MARKERS[kind])
        safe, pickled = _WEIGHTS.get(kind, ("", ""))
        files = self._download_matching((*_SMALL_FILES, safe) if safe else _SMALL_FILES)
        if safe and not any(file.match(safe) for file in files):
            files = [*files, *self._download_matching((pickled,))]
        return files if marker in files else [marker, *files]

    def missing(self, what: str, folder: Path | str) -> ConfigError:
        """Return the error that says what is missing, where it is, where it goes, and under which licence."""
        return ConfigError(
            f"scorer {self.scorer}: {what}; download it from {self.page} into {folder} (licence: {self.licence})"
        )

    def _download(self, name: str) -> Path:
        import huggingface_hub as hub
        from huggingface_hub import errors

        try:
            path = Path(hub.hf_hub_download(self.pretrained, name, revision=self.revision))
        except (OSError, errors.HTTPError, errors.HFValidationError) as error:
            raise self._unreachable(name, error) from error
        if self.revision is None:
            say(f"scorer {self.scorer}: {self.pretrained} is not pinned; now at revision={revision_of(path)}")
        return path

    def _download_matching(self, patterns: Sequence[str]) -> list[Path]:
        import huggingface_hub as hub
        from huggingface_hub import errors

        try:
            folder = hub.snapshot_download(self.pretrained, revision=self.revision, allow_patterns=list(patterns))
        except (OSError, errors.HTTPError, errors.HFValidationError) as error:
            raise self._unreachable("its files", error) from error
        return sorted(file for pattern in patterns for file in Path(folder).glob(pattern))

    def _unreachable(self, name: str, error: Exception) -> ConfigError:
        return self.missing(
            f"there is no file or folder {self.pretrained}, and {name} of that name cannot be had from the hub "
            f"({type(error).__name__})",
            "a folder, and name that folder instead",
        )


def content_hash(files: Sequence[Path]) -> str:
    """Return a hash of names and bytes, the same wherever and whenever the files were written."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's bytes; that of a large file in the hub's cache is its name there."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(folder: Path) -> list[Path]:
    """Return the files that decide what a model folder computes: weights, configuration, vocabulary."""
    suffixes = (".safetensors", ".bin", ".pth", ".json", ".txt", ".model")
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith("."))


def load_tensors(file: Path, scorer: str) -> "dict[str, Tensor]":
    """Read safetensors, or a PyTorch file as plain tensors; raises ConfigError for anything that would be executed."""
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(
            f"scorer {scorer}: cannot read the weights {file}: {' '.join(str(error).split())[:200]}; download it again"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"scorer {scorer}: {file} holds something other than named tensors; is it the right file?")
    return state


def revision_of(path: Path) -> str:
    """The commit that a file of the hub's cache belongs to: the folder below `snapshots`."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "unknown"
