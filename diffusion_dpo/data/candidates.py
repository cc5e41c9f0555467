"""Images to be judged, from candidates, foreign Parquet or a folder of files; and the scores that lie beside them.

An image's scores are found by its *key*, a hash of what was judged: the image, its prompt and its references. So they
survive renamed files and changed orders, and the same image under two prompts has two scores.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.images import BrokenImage, image_bytes
from diffusion_dpo.data.shards import CANDIDATES, column_names, located_rows, num_rows

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_FILES_PER_UNIT = 64


@dataclass(frozen=True)
class Candidate:
    """One image as it lies on disk. `data` is empty where it was not asked for or is `broken` (a few words on why).

    `uid` stands for the image alone: the pixel hash of a candidate of ours, a hash of the encoded bytes otherwise.
    """

    where: str
    uid: str
    prompt: str = ""
    prompt_id: str = ""
    seed: int | None = None
    data: bytes = b""
    references: tuple[bytes, ...] = ()
    origin: str = ""
    """JSON object on how the image came about: its model, sampler, guidance, position; empty where nobody said."""
    broken: str = ""
    settings_hash: str = ""
    """Of the settings that made it, where they are known."""

    @cached_property
    def key(self) -> str:
        """Hash of everything that a scorer sees."""
        return _hash([self.uid, self.prompt, *self._reference_hashes])

    @cached_property
    def group(self) -> str:
        """What the images of one prompt have in common: its text and references; without a text its id, if any."""
        if not self.prompt:
            return self.prompt_id and _hash([self.prompt_id])
        return _hash(["", self.prompt, *self._reference_hashes])

    @cached_property
    def _reference_hashes(self) -> list[str]:
        return [_sha256(reference) for reference in self.references]


@dataclass(frozen=True)
class Unit:
    """A portion of images that is scored as a whole: one Parquet file, or some image files. `name` is its own."""

    name: str
    files: tuple[Path, ...]
    num_images: int

    def read(self, *, images: bool = True) -> Iterator[Candidate]:
        """Yield the images in order; without `images`, candidates of ours are read without their pixels."""
        if self.files[0].suffix == ".parquet":
            yield from _read_parquet(self.files[0], images=images)
        else:
            yield from (_read_file(file) for file in self.files)


def find_units(path: Path) -> list[Unit]:
    """Return the images of a candidates folder, a Parquet file, or a folder of images, in a stable order.

    Raises ConfigError when there are none.
    """
    if not path.exists():
        raise ConfigError(f"there is no file or folder {path}")
    root = path if path.is_dir() else path.parent
    files = [file.relative_to(root) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    visible = [file for file in files if not any(part.startswith(".") for part in file.parts)]
    parquet = [file for file in visible if file.suffix == ".parquet" and not file.name.startswith("scores-")]
    if parquet:
        names = _unit_names(parquet)
        return [Unit(names[file], (root / file,), num_rows(root / file)) for file in parquet]
    images = tuple(root / file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ConfigError(f"{path} holds neither Parquet files nor images ({', '.join(IMAGE_SUFFIXES)})")
    if path.is_file():
        return [Unit(path.name, images, 1)]
    portions = [images[start : start + _FILES_PER_UNIT] for start in range(0, len(images), _FILES_PER_UNIT)]
    return [Unit(f"{number:05d}", portion, len(portion)) for number, portion in enumerate(portions)]


def _unit_names(files: list[Path]) -> dict[Path, str]:
    """Name each Parquet file's unit: `images-00003.parquet` is 00003, `b/train.parquet` is b-train.

    Of two that would have the same name (`a.parquet` beside `images-a.parquet`), each has a hash of its path in it.
    """
    names = {file: "-".join(file.with_suffix("").parts).removeprefix("images-") for file in files}
    times = Counter(names.values())
    return {
        file: name if times[name] == 1 else f"{name}-{_hash([file.as_posix()])[:8]}" for file, name in names.items()
    }


def _read_parquet(file: Path, *, images: bool) -> Iterator[Candidate]:
    present = column_names(file)
    ours = set(present) >= set(CANDIDATES.names) - {"origin"}
    wanted = ["image", *(name for name in CANDIDATES.names if name in present and name != "image")]
    columns = [name for name in wanted if images or not ours or name != "image"]
    references: tuple[bytes, ...] = ()
    for where, row in located_rows(file, columns):
        found = tuple(_image(reference)[0] for reference in row.get("references") or ())
        references = references if found == references else found  # one object for all images of a prompt
        data, broken = b"", ""
        if "image" in columns:
            data, broken = _image(row["image"])
        yield Candidate(
            where=where,
            uid=_uid(where, row) if ours else _content_id(data or broken.encode()),
            prompt=row.get("prompt") or "",
            prompt_id=str(row.get("prompt_id") or ""),
            seed=row.get("seed"),
            data=data,
            references=references,
            origin=row.get("origin") or "",
            settings_hash=row.get("settings_hash") or "",
            broken=broken,
        )


def _uid(where: str, row: dict[str, Any]) -> str:
    if not isinstance(row["uid"], str) or not row["uid"]:
        raise ConfigError(
            f"{where} has no uid; make the candidates again, or remove the column uid to have it computed"
        )
    return row["uid"]


def _read_file(file: Path) -> Candidate:
    caption = file.with_suffix(".txt")
    try:
        prompt = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
        data = file.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file} or its caption {caption.name}: {error}") from error
    return Candidate(file.name, _content_id(data), prompt, data=data, broken="" if data else "an empty file")


def _image(value: Any) -> tuple[bytes, str]:
    """Return the bytes of an image column's value, or nothing and the reason."""
    try:
        return image_bytes(value), ""
    except BrokenImage as error:
        return b"", str(error)


def _content_id(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@lru_cache(maxsize=16)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
