"""Pairs as WebDataset tar files: an image a side and a JSON object for every pair, under one key."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import FORMATS
from diffusion_dpo.data.rows import is_number, pair_id
from diffusion_dpo.files import atomic_path

_FACTS = (
    *("prompt", "label_prob", "margin", "margin_norm", "chosen_uid", "rejected_uid", "chosen_scores"),
    *("rejected_scores", "chosen_origin", "rejected_origin", "strategy", "source"),
)


def write_tar(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """Write a tar file of pairs, whole or not at all; the same pairs give the same bytes.

    The members of a pair are `<key>.chosen.png`, `.rejected.png` (or another suffix, by what is inside), `.json` and,
    where there is one, `.mask.png`; the key is the pair's id. The images' bytes are as they were.
    """
    with atomic_path(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for pair in pairs:
            key = pair_id(pair.prompt, pair.chosen, pair.rejected, pair.mask)  # 32 hex digits, whatever the source's
            for side in ("chosen", "rejected", "mask"):
                data = getattr(pair, side)
                if data:
                    _add(tar, f"{key}.{side}.{_suffix(data)}", data)
            facts = _plain({name: getattr(pair, name) for name in _FACTS})
            _add(tar, f"{key}.json", json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time, user and group are 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        name = str(image.format).lower()
    return "jpg" if name == "jpeg" else name


def _plain(value: Any) -> Any:
    """Return a value with null for the numbers that JSON cannot hold, and ? for what is not valid Unicode."""
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return None if isinstance(value, float) and not is_number(value) else value
