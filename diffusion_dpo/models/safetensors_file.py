"""Safetensors files: the header, read before any weight; what a file is that is none; equal weights as equal bytes."""

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_dpo.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER_BYTES = 100_000_000
"""The most that the format allows."""
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_VERSIONS = {"sd_v1": "Stable Diffusion 1.x", "sd_v2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
_OF_A_LORA = re.compile(r"[._](?:lora|hada|lokr|dora)_|\.(?:alpha|diff|diff_b)\Z")
_OTHERS: tuple[tuple[str, str], ...] = (
    ("double_blocks.", "a FLUX transformer"),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("transformer_blocks.0.attn.add_q_proj", "a transformer of a flow model"),
    ("motion_modules.", "an AnimateDiff motion module"),
    ("control_model.", "a ControlNet"),
    ("controlnet_cond_embedding.", "a ControlNet"),
    ("ip_adapter.", "an IP-Adapter"),
    ("emb_params", "a textual inversion"),
    ("clip_g", "a textual inversion"),
    ("down_blocks.0.resnets", "a UNet of a diffusers folder: give the folder that holds unet/, with model_index.json"),
    ("first_stage_model.", "a VAE alone"),
    ("decoder.up.", "a VAE alone"),
    ("decoder.up_blocks.", "a VAE alone"),
    ("text_model.", "a text encoder alone"),
    ("transformer.resblocks.", "a text encoder alone"),
)
"""What a file is that is neither a checkpoint nor an adapter, by a part of its tensors' names; the first that is found
counts."""
_SHOWN_METADATA = ("ss_", "modelspec.")
_MAX_SHOWN = 80
HASH = "modelspec.hash_sha256"
"""The entry of a header that holds the hash of the tensors."""


@dataclass(frozen=True)
class FileFacts:
    """The header of a safetensors file."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a single-file checkpoint in the original layout."""
        return any(key.startswith("model.diffusion_model.") and not _OF_A_LORA.search(key) for key in self.shapes)

    @property
    def family(self) -> str:
        """The family that the width of the text embeddings or kohya's header tells, in words; "" where none does."""
        for key, shape in self.shapes.items():
            if "attn2" in key and ("to_k" in key or "to_v" in key) and len(shape) > 1 and shape[1] in _WIDTHS:
                return _WIDTHS[shape[1]]
        said = self.metadata.get("ss_base_model_version", "")
        return next((family for begin, family in _VERSIONS.items() if said.startswith(begin)), "")


def read_facts(file: Path) -> FileFacts:
    """Read a file's header; raises ConfigError, saying what it is instead, when it is no whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(512)
        _refuse_other_kinds(file, head)
        (length,) = struct.unpack("<Q", head[:8])
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ConfigError(
                f"{file} is cut off or no safetensors file: its header should take {length} bytes of {size}"
            )
        stream.seek(8)
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ConfigError(f"{file} is no safetensors file: its header cannot be read") from error
    if 8 + length + end != size:
        what = "cut off" if size < 8 + length + end else "longer than it should be"
        raise ConfigError(f"{file} is {what}: {size} bytes, and its header says {8 + length + end}; fetch it again")
    return FileFacts(shapes, metadata)


def _refuse_other_kinds(file: Path, head: bytes) -> None:
    text = head.lstrip().lower()
    if len(head) < 8:
        raise ConfigError(f"{file} is {'empty' if not head else 'cut off'}; fetch it again")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ConfigError(f"{file} is a web page, not a model: the download needed a login, or the link was to a page")
    if text.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"{file} is a git-lfs pointer, not the model; run `git lfs pull`, or download it from the hub"
        )
    is_header = head[8:9] == b"{"  # after a length that may begin with any two bytes
    if not is_header and head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ConfigError(
            f"{file} is a pickle of torch.save, which can run any program when it is loaded, and is not opened; "
            "convert it where you trust it, with safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
        )


def other_model(names: Iterable[str]) -> str | None:
    """Return what a file of these tensors is that is neither a checkpoint nor an adapter; None: nothing known."""
    names = list(names)
    return next((words for part, words in _OTHERS if any(part in name for name in names)), None)


def shown(text: str) -> str:
    """Return text from a file as one printable line of bounded length."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def shown_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Return the entries that programs look at, one a line."""
    return [f"{shown(key)}: {shown(metadata[key])}" for key in sorted(metadata) if key.startswith(_SHOWN_METADATA)]


def write_safetensors(path: Path, weights: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> None:
    """Write a file with its metadata in order, and the hash of all its tensors' bytes where there is a place for it.

    safetensors writes the entries in another order every time, so the header is written again, in as many bytes.
    """
    from safetensors.torch import save_file

    save_file(dict(weights), path, metadata=dict(metadata))
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        filled = dict(metadata) | ({HASH: f"0x{digest}"} if HASH in metadata else {})
        header["__metadata__"] = dict(sorted(filled.items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))
