"""What a safetensors file says before any weight of it is read, and what a file is that is none."""

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError

_MAX_HEADER_BYTES = 100_000_000
"""The most that the format allows."""
_DOWN = (
    ".lora_down.weight",
    ".lora_A.weight",
    ".lora.down.weight",
    "_lora.down.weight",
    ".lora_linear_layer.down.weight",
)
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_OF_A_TRANSFORMER = re.compile(
    r"transformer\.|lora_transformer_|(?:diffusion_model\.|lora_unet_)(?:double_|single_|joint_)(?:transformer_)?blocks"
)
_OF_A_BARE_UNET = re.compile(
    r"base_model\.|conv_|(?:time|add|class)_embedding\.|down_blocks\.|mid_block\.|up_blocks\."
)
_SHOWN_METADATA = ("ss_", "modelspec.")
_MAX_SHOWN = 80


@dataclass(frozen=True)
class FileFacts:
    """The header of a safetensors file."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @property
    def is_lora(self) -> bool:
        """Whether it holds low-rank updates."""
        return any(key.endswith(_DOWN) for key in self.shapes)

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is a single-file checkpoint in the original layout."""
        return any(key.startswith("model.diffusion_model.") for key in self.shapes)

    @property
    def naming(self) -> str:
        """Whose names a LoRA's layers have; peft's are of a bare UNet, a transformer's of Flux or SD 3."""
        downs = [key for key in self.shapes if key.endswith(_DOWN)]
        if any(_OF_A_TRANSFORMER.match(key) for key in downs):
            return "transformer"
        if all(key.startswith(("lora_unet_", "lora_te")) for key in downs):
            return "kohya"
        if all(key.startswith(("unet.", "text_encoder.", "text_encoder_2.")) for key in downs):
            return "diffusers"
        return "peft" if all(_OF_A_BARE_UNET.match(key) for key in downs) else "unknown"

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer of a LoRA, by the layer's name in the file."""
        return {
            key.removesuffix(end): shape[0]
            for key, shape in self.shapes.items()
            for end in _DOWN
            if key.endswith(end) and shape
        }

    @property
    def family(self) -> str:
        """The family that the width of the text embeddings tells, in words."""
        for key, shape in self.shapes.items():
            if "attn2" in key and ("to_k" in key or "to_v" in key) and len(shape) > 1 and shape[1] in _WIDTHS:
                return _WIDTHS[shape[1]]
        return "an unknown family"


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
            f"{file} is a pickle of torch.save, which can run any program when it is loaded; only safetensors are read"
        )


def shown(text: str) -> str:
    """Return text from a file as one printable line of bounded length."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def shown_metadata(metadata: Mapping[str, str]) -> list[str]:
    """Return the entries that programs look at, one a line."""
    return [f"{shown(key)}: {shown(metadata[key])}" for key in sorted(metadata) if key.startswith(_SHOWN_METADATA)]


def span(numbers: Mapping[str, float]) -> str:
    """Return the values of layers in words: one number, or the most frequent with the range."""
    counts = Counter(numbers.values())
    if not counts:
        return "none"
    often, _ = counts.most_common(1)[0]
    return f"{often:g}" if len(counts) == 1 else f"{often:g} mostly ({min(counts):g} to {max(counts):g})"
