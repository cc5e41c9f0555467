"""Images to be judged, from candidates, foreign Parquet or a folder of files; and the scores that lie beside them.

An image's scores are found by its *key*, a hash of what was judged: the image, its prompt and its references. So they
survive renamed files and changed orders, and the same image under two prompts has two scores.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from posixpath import basename, splitext
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data.captions import CAPTION_SUFFIXES, Captions
from diffusion_dpo.data.embedded import Embedded, Made, read_embedded
from diffusion_dpo.data.image_kinds import DECODED
from diffusion_dpo.data.images import BrokenImage, image_bytes
from diffusion_dpo.data.inside import read_inside
from diffusion_dpo.data.left_out import describe, is_own, sort_out
from diffusion_dpo.data.listing import Listing, list_files
from diffusion_dpo.data.shards import CANDIDATES, column_names, is_table, located_rows, num_rows
from diffusion_dpo.data.tables import prompt_value, text_column

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
"""What a column of images is called in Parquet; the first that is there counts."""
_FILES_PER_UNIT = 64
_GRID = re.compile(r"(xyz_)?grid-\d{4}")
"""The names of the overviews that AUTOMATIC1111's web UI saves beside its images, with the prompt of the first."""
NO_PROMPT = "no prompt beside it or inside it"


@dataclass(frozen=True)
class Candidate:
    """One image as it lies on disk. `data` is empty where it was not asked for or is `broken` (a few words on why)."""

    where: str
    known_uid: str = ""
    """The pixel hash, of an image that `generate` drew."""
    prompt: str = ""
    prompt_id: str = ""
    data: bytes = b""
    references: tuple[bytes, ...] = ()
    broken: str = ""
    no_prompt: str = ""
    """Why it has no prompt, in a few words."""
    made: Made | None = None
    """How it came about; None of an image file that says so itself."""
    made_by: str = ""
    """The settings_hash, of an image that `generate` drew."""
    file: str = ""
    """Where its bytes are, of an image file."""

    @cached_property
    def uid(self) -> str:
        """The id of the image alone: the pixel hash if `generate` drew it, else a hash of its bytes."""
        if self.known_uid:
            return self.known_uid
        data = self.data or (Path(self.file).read_bytes() if self.file and not self.broken else b"")
        return _content_id(data or self.broken.encode())

    @cached_property
    def key(self) -> str:
        """Hash of everything that a scorer sees."""
        return _hash(self.uid, self.prompt, *self._reference_hashes)

    @property
    def group(self) -> str:
        """What the images of one prompt have in common: its text and references; without a text its id, if any."""
        if not self.prompt:
            return self.prompt_id and _hash(self.prompt_id)
        return _hash("", self.prompt, *self._reference_hashes)

    @property
    def seed(self) -> int | None:
        """The seed that it was drawn with, where that is known."""
        return self._made.seed

    @property
    def origin(self) -> dict[str, Any]:
        """How it came about: its model, sampler, guidance, position; empty where nobody said."""
        return self._made.origin

    @property
    def settings_hash(self) -> str:
        """Hash of the settings that made it; empty where they are not known."""
        return self.made_by or (_hash(json.dumps(self.origin, sort_keys=True))[:16] if self.origin else "")

    @cached_property
    def _made(self) -> Made:
        return self.made or read_embedded(self.data or self.file).tell()

    @cached_property
    def _reference_hashes(self) -> list[str]:
        return [_sha256(reference) for reference in self.references]


@dataclass(frozen=True)
class Unit:
    """A portion of images that is scored as a whole: one Parquet file, or some image files. `name` is its own."""

    name: str
    root: Path
    files: tuple[str, ...]
    """Relative to `root`."""
    num_images: int
    captions: Captions | None = None
    """What lies beside the image files."""
    prompt_column: str | None = None

    def read(self, *, images: bool = True) -> Iterator[Candidate]:
        """Yield the images in order; without `images`, of image files the headers alone, and no pixels of a table."""
        if self.captions is None:
            yield from _read_parquet(self.root / self.files[0], images=images, prompt_column=self.prompt_column)
            return
        for name in self.files:
            yield _read_file(name, self.captions, images=images)


@dataclass(frozen=True)
class Found:
    """The images of a path, and the names of the files there that are not read, by kind."""

    units: list[Unit]
    left_out: dict[str, list[str]]


def find_units(path: Path, prompt_column: str | None = None) -> list[Unit]:
    """Return the images of a candidates folder, a Parquet file, or a folder of images, and say what is left out.

    Raises ConfigError as `find_candidates` does.
    """
    found = find_candidates(path, prompt_column)
    if found.left_out:
        say(f"left out of {path}: {describe(found.left_out)}")
    return found.units


def find_candidates(path: Path, prompt_column: str | None = None) -> Found:
    """Return the images of a path in a stable order, and what else lies there.

    Prompts of images that are not ours are in the `prompt_column` of Parquet or of a folder's metadata; null takes
    the first of columns.PROMPT that is there. Image files beside Parquet with images are not read. Raises
    ConfigError when there are no images.
    """
    if not path.exists():
        raise ConfigError(f"there is no file or folder {path}")
    listing = list_files(path) if path.is_dir() else _alone(path)
    names = listing.files if path.is_dir() else (path.name,)
    tables = [name for name in names if is_table(listing.root / name) and not is_own(name)]
    with_images = [name for name in tables if image_column(column_names(listing.root / name))]
    images = [name for name in names if splitext(name)[1].lower() in DECODED]
    if with_images:
        unit_names, root = _unit_names(with_images), listing.root
        units = [
            Unit(unit_names[name], root, (name,), num_rows(root / name), prompt_column=prompt_column)
            for name in with_images
        ]
        return Found(units, sort_out(listing, with_images, Captions(listing)) if path.is_dir() else {})
    captions = Captions(listing, prompt_column)
    grids = [name for name in images if _GRID.match(basename(name))] if path.is_dir() else []
    images = [name for name in images if name not in set(grids)]
    left_out = sort_out(listing, [*images, *grids], captions) if path.is_dir() else {}
    if grids:
        left_out["grids, each an overview of several images"] = grids
    if not images:
        raise ConfigError(_no_images(path, tables, left_out))
    if path.is_file():
        return Found([Unit(path.name, listing.root, tuple(images), 1, captions)], {})
    portions = [tuple(images[start : start + _FILES_PER_UNIT]) for start in range(0, len(images), _FILES_PER_UNIT)]
    units = [Unit(f"{i:05d}", listing.root, part, len(part), captions) for i, part in enumerate(portions)]
    return Found(units, left_out)


def _alone(path: Path) -> Listing:
    """Return one file and the captions beside it."""
    beside = (path.with_suffix(suffix) for suffix in (*CAPTION_SUFFIXES, ".json"))
    return Listing(path.parent, (path.name, *(it.name for it in beside if it.is_file())), ())


def image_column(names: Collection[str]) -> str | None:
    """Return which column of Parquet holds images to be judged, if any."""
    return next((name for name in _IMAGE_COLUMNS if name in names), None)


def _no_images(path: Path, tables: Sequence[str], left_out: Mapping[str, Sequence[str]]) -> str:
    if tables:
        file = path / tables[0] if path.is_dir() else path
        return f"{file} has no column 'image'. It has: {', '.join(column_names(file)) or 'none'}"
    held = f"; it holds {describe(left_out)}" if left_out else ""
    return f"{path} holds neither Parquet files nor images ({', '.join(DECODED)}){held}"


def _unit_names(files: list[str]) -> dict[str, str]:
    """Name each Parquet file's unit: `images-00003.parquet` is 00003, `b/train.parquet` is b-train.

    Of two that would have the same name (`a.parquet` beside `images-a.parquet`), each has a hash of its path in it.
    """
    names = {file: "-".join(Path(file).with_suffix("").parts).removeprefix("images-") for file in files}
    times = Counter(names.values())
    return {file: name if times[name] == 1 else f"{name}-{_hash(file)[:8]}" for file, name in names.items()}


def _read_parquet(file: Path, *, images: bool, prompt_column: str | None) -> Iterator[Candidate]:
    present = column_names(file)
    ours = set(present) >= set(CANDIDATES.names) - {"origin"}
    pixels = image_column(present) or "image"  # a file without is refused by the reader
    texts = "prompt" if ours and prompt_column is None else text_column(present, prompt_column)
    if prompt_column is not None and texts is None:
        raise ConfigError(f"{file} has no column {prompt_column!r}. It has: {', '.join(present)}; set prompt_column")
    other = [name for name in CANDIDATES.names if name in present and name not in ("image", "prompt")]
    columns = [*([pixels] if images or not ours else []), *([texts] if texts else []), *other]
    references: tuple[bytes, ...] = ()
    for where, row in located_rows(file, columns):
        found = tuple(_image(reference)[0] for reference in row.get("references") or ())
        references = references if found == references else found  # one object for all images of a prompt
        data, broken = _image(row[pixels]) if pixels in row else (b"", "")
        if texts:
            prompt, fault = prompt_value(row[texts])
            said = Embedded(prompt if not ours else row[texts] or "", fault=fault)
        else:
            said = read_embedded(data)
        origin = row.get("origin")
        yield Candidate(
            where=where,
            known_uid=_uid(where, row) if ours else _content_id(data or broken.encode()),
            prompt=said.prompt,
            prompt_id=str(row.get("prompt_id") or ""),
            data=data,
            references=references,
            broken=broken,
            no_prompt="" if said.prompt else said.fault or NO_PROMPT,
            made=Made(json.loads(origin) if origin else {}, row.get("seed")) if ours or origin else None,
            made_by=row.get("settings_hash") or "",
        )


def _uid(where: str, row: dict[str, Any]) -> str:
    if not isinstance(row["uid"], str) or not row["uid"]:
        raise ConfigError(
            f"{where} has no uid; make the candidates again, or remove the column uid to have it computed"
        )
    return row["uid"]


def _read_file(name: str, captions: Captions, *, images: bool) -> Candidate:
    """Return an image file; a caption beside it comes before what is inside it, which tells how it was made."""
    data, broken, inside = b"", "", Embedded()
    path = f"{captions.root}/{name}"
    if images:
        found = read_inside(captions.root, name)
        data, broken = (b"", found) if isinstance(found, str) else (found, "" if found else "an empty file")
        inside = read_embedded(data)
    else:
        try:
            inside = read_embedded(path)
        except OSError:
            broken = "the file cannot be read"
        except EOFError:
            broken = "an empty file"
    beside = captions.of(name)
    if beside is None:
        prompt, fault = inside.prompt, inside.fault
    else:
        prompt, fault = beside.prompt, beside.fault
    return Candidate(
        where=name,
        prompt=prompt,
        data=data,
        broken=broken,
        no_prompt="" if prompt else fault or NO_PROMPT,
        made=None if beside is None or beside.tell is Made else beside.tell(),
        file=path,
    )


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


@lru_cache(maxsize=256)
def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
