"""Pairs as WebDataset tar files: an image a side and a JSON object for every pair, under one key.

Readers of tars take the columns, and the types of the JSON's values, from the first few pairs of the first file, and
refuse or lose what differs later. So every pair of an export has members of the same names, and values of the same
types: what a pair may lack, and what has keys of its own, is a text that holds JSON.
"""

import functools
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.portable import portable
from diffusion_dpo.data.rows import is_number, pair_id
from diffusion_dpo.data.shards import encode_png
from diffusion_dpo.files import atomic_path

SIDES = ("chosen", "rejected", "mask")
_PLAIN = ("prompt", "label_prob", "chosen_uid", "rejected_uid", "strategy", "source")
AS_TEXT = ("margin", "margin_norm", "chosen_scores", "rejected_scores", "chosen_origin", "rejected_origin")
"""What is written as a text that holds JSON."""
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: pairs-*.tar
---

# Preference pairs

WebDataset tar files. A pair is an image `<key>.chosen.*`, a worse one `<key>.rejected.*`, and a `<key>.json` with the
`prompt` that both are for.
"""
"""README.md beside the files: by it `datasets.load_dataset(folder)` finds them, however few they are."""


def write_tar(path: Path, pairs: Iterable[PreferencePair], suffixes: dict[str, str]) -> None:
    """Write a tar file of pairs, whole or not at all; the same pairs give the same bytes.

    The members of a pair are `<key>.chosen.png`, `.rejected.png`, `.json` and, where any pair of the export has one,
    `.mask.png`; the key is the pair's id. `suffixes` says which format all images of a side have, `png` where an image
    has to be rewritten; where it names no mask, none is written. A pair without a mask gets a white one, and
    `has_mask` false.
    """
    with atomic_path(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            key = pair_id(pair.prompt, pair.chosen, pair.rejected, pair.mask)  # 32 hex digits, whatever the source's
            images = {side: portable(getattr(pair, side), suffix) for side, suffix in suffixes.items()}
            if "mask" in images and not pair.mask:
                images["mask"] = _white(_size_px(images["chosen"]))
            for side, suffix in suffixes.items():
                _add(tar, f"{key}.{side}.{suffix}", images[side])
            _add(tar, f"{key}.json", json.dumps(_facts(pair), sort_keys=True, ensure_ascii=False).encode())


def _facts(pair: PreferencePair) -> dict[str, Any]:
    texts = {name: json.dumps(_plain(getattr(pair, name)), sort_keys=True, allow_nan=False) for name in AS_TEXT}
    return {name: _plain(getattr(pair, name)) for name in _PLAIN} | texts | {"has_mask": bool(pair.mask)}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, user and group are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _size_px(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


@functools.lru_cache(maxsize=8)
def _white(size_px: tuple[int, int]) -> bytes:
    return encode_png(Image.new("L", size_px, "white"))


def _plain(value: Any) -> Any:
    """Return a value with null for the numbers that JSON cannot hold, and ? for what is not valid Unicode."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if isinstance(value, float) and not is_number(value) else value
