"""Two folders, chosen/ and rejected/, with the same file names, and captions beside them: pairs sorted by hand."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from posixpath import splitext
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.captions import CAPTION_SUFFIXES
from diffusion_dpo.data.columns import BETTER, WORSE, spelling
from diffusion_dpo.data.embedded import read_caption, read_embedded
from diffusion_dpo.data.holding import Holding, walk
from diffusion_dpo.data.image_kinds import IMAGE_SUFFIXES
from diffusion_dpo.data.inside import MISSING, advise, read_inside
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.records import read_file
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.splits import counted, describe, select
from diffusion_dpo.data.stamps import stamp_of
from diffusion_dpo.data.text import decode_text

CAPTIONS = "captions.jsonl"
_SIDES = ("chosen", "rejected")
_SHOWN = 3
_NO_CAPTION = "no caption"
_FOLDER_NAME = r"^[^/\\]+$"


class Place(NamedTuple):
    """Where an image of a pair lies: the folder that holds both sides, and its name within its side, no suffix."""

    above: str
    name: str


class Files(NamedTuple):
    """What lies in a folder of pairs: the images of each side by their place, captions, and what is neither."""

    sides: dict[str, dict[Place, list[str]]]
    captions: frozenset[str]
    others: tuple[str, ...]

    @property
    def stems(self) -> set[str]:
        """The names of all images, without their suffixes."""
        return {splitext(name)[0] for images in self.sides.values() for names in images.values() for name in names}

    @property
    def places(self) -> list[Place]:
        """Every place of an image once, in order."""
        return sorted({place for images in self.sides.values() for place in images})


class TwoFoldersData(PairSource):
    """`chosen/cat.png` is better than `rejected/cat.png` (or .jpg) for the caption in a `cat.txt` beside either.

    Captions may also be the lines of a `captions.jsonl`: {"file_name": "cat.png", "prompt": "a cat"}. Without any, the
    prompt that A1111, ComfyUI and others leave inside the images counts.
    """

    path: Path
    """The folder that holds chosen/ and rejected/, or folders that do; what is below them is paired as well."""
    chosen_dir: str = Field("chosen", pattern=_FOLDER_NAME)
    """Name of the folders with the better images."""
    rejected_dir: str = Field("rejected", pattern=_FOLDER_NAME)
    """Name of the folders with the worse images."""
    caption_suffix: str | None = Field(None, pattern=r"^\.[^/\\]+$")
    """Suffix of the captions beside the images; null: .txt or .caption."""
    images_dir: Path | None = None
    """A folder outside that links in the two folders may lead into."""
    split: str | None = None
    """train, validation, test, or another that names of folders speak of; all; null: train of several."""

    @model_validator(mode="after")
    def _two_names(self) -> Self:
        if self.chosen_dir == self.rejected_dir:
            raise ValueError(f"chosen_dir and rejected_dir are both {self.chosen_dir!r}; name two folders")
        return self

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource: two folders beside each other whose names say which one is better.

        Raises ConfigError where they say it under several names.
        """
        stems: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for file in found.files if found.table is None else ():
            if file.suffix.lower() in IMAGE_SUFFIXES:
                for i, folder in enumerate(file.parts[:-1]):
                    stems["/".join(file.parts[:i])][folder].add(splitext("/".join(file.parts[i + 1 :]))[0])
        names = {both for folders in stems.values() if (both := _two_sides(folders))}
        if not names:
            return None
        if len(names) > 1:
            listed = " and ".join(f"{chosen}/ with {rejected}/" for chosen, rejected in sorted(names))
            raise ConfigError(
                f"{found.path} holds folders of better and worse images under several names: {listed}; rename them "
                "alike, or name two with data.type=two_folders data.chosen_dir=... data.rejected_dir=..."
            )
        chosen, rejected = names.pop()
        return {} if (chosen, rejected) == _SIDES else {"chosen_dir": chosen, "rejected_dir": rejected}

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every name once, in their order, then the lines of captions.jsonl that cannot be read."""
        found = self._files()
        listed, broken = self._listed(found)
        for place in self._places(found):
            files = [found.sides[side].get(place, []) for side in _SIDES]
            several = next((group for group in files if len(group) > 1), None)
            if several:
                yield Dropped(several[0], "several files of this name")
            elif not all(files):
                missing = (self.chosen_dir, self.rejected_dir)[files.index([])]
                yield Dropped(next(group[0] for group in files if group), f"no file of this name in {missing}/")
            else:
                yield self._pair(place, files[0][0], files[1][0], listed[place], found.captions)
        yield from broken

    def num_rows(self) -> int:
        """Return the number of names and of captions that cannot be read, without looking at images."""
        found = self._files()
        return len(self._places(found)) + len(self._listed(found)[1])

    def stamp(self) -> str:
        """Return the state of all images and captions."""
        found = self._files()
        images = (name for side in _SIDES for names in found.sides[side].values() for name in names)
        listed = (name for name in found.others if PurePosixPath(name).name == CAPTIONS)
        return stamp_of(self.path / name for name in sorted([*images, *found.captions, *listed]))

    def left_out(self) -> list[str]:
        """See PairSource."""
        found = self._files()
        others = [name for name in found.others if PurePosixPath(name).name not in (CAPTIONS, "manifest.json")]
        images = [name for name in others if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
        rest = [name for name in others if name not in set(images)]
        alone = sorted(name for name in found.captions if splitext(name)[0] not in found.stems)
        counts = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in rest).most_common()
        lines = [
            f"{counted(len(alone), 'caption')} without an image ({some(alone)})",
            f"{counted(len(images), 'image')} in neither {self.chosen_dir}/ nor {self.rejected_dir}/ ({some(images)})",
            f"{counted(len(rest), 'other file')}: {', '.join(f'{n} x {it}' for it, n in counts)} ({some(rest)})",
        ]
        rows = Counter(self._folder(place) for place in found.places)
        left = self._select(found)[1]
        of_splits = describe(left, (rows[folder] for folders in left.values() for folder in folders), self.path)
        return of_splits + [line for line, it in zip(lines, (alone, images, rest), strict=True) if it]

    def _pair(
        self, place: Place, chosen: str, rejected: str, listed: list[str], captions: frozenset[str]
    ) -> PreferencePair | Dropped:
        prompt, fault = self._caption(place, listed, captions)
        also = [] if self.images_dir is None else [self.images_dir]
        images = [read_inside(self.path, file, also=also) for file in (chosen, rejected)]
        faults = [f"{side}: {advise(it)}" for side, it in zip(_SIDES, images, strict=True) if isinstance(it, str)]
        if fault == _NO_CAPTION and not faults:
            prompt, fault = _inside([it for it in images if isinstance(it, bytes)])
        if fault or faults:
            return Dropped(chosen, fault or faults[0])
        return make_pair(chosen, prompt, *images, source="two_folders")

    # --- files -------------------------------------------------------------------------------------------------------

    def _files(self) -> Files:
        """Walk the folder once; raises ConfigError when a side is missing."""
        suffixes = CAPTION_SUFFIXES if self.caption_suffix is None else (self.caption_suffix,)
        sides: dict[str, dict[Place, list[str]]] = {side: defaultdict(list) for side in _SIDES}
        captions, others = set(), []
        for file in walk(self.path):
            place = self._place(file)
            if file.name.endswith(suffixes) and place is not None:
                captions.add(str(file))
            elif file.suffix.lower() in IMAGE_SUFFIXES and place is not None:
                sides[place[0]][place[1]].append(str(file))
            else:
                others.append(str(file))
        names = dict(zip((self.chosen_dir, self.rejected_dir), _SIDES, strict=True))
        missing = [name for name, side in names.items() if not sides[side]]
        if missing:
            raise ConfigError(self._missing(min(missing, key=lambda name: (self.path / name).is_dir())))
        return Files(sides, frozenset(captions), tuple(others))

    def _place(self, file: PurePosixPath) -> tuple[str, Place] | None:
        """Return the side of a file and its place; None of what lies in neither folder."""
        names = (self.chosen_dir, self.rejected_dir)
        i = next((i for i, part in enumerate(file.parts[:-1]) if part in names), None)
        if i is None:
            return None
        side = _SIDES[names.index(file.parts[i])]
        return side, Place("/".join(file.parts[:i]), splitext("/".join(file.parts[i + 1 :]))[0])

    def _missing(self, name: str) -> str:
        if not self.path.is_dir():
            return f"there is no folder {self.path}"
        if (self.path / name).is_symlink():
            return (
                f"{self.path / name} is a link out of the folder, which is not followed; give the folder it leads to"
            )
        there = sorted(it.name for it in self.path.iterdir() if it.is_dir())[:_SHOWN]
        held = f"; it has {', '.join(f'{it}/' for it in there)}" if there else ""
        what = "no images in" if (self.path / name).is_dir() else "no folder"
        return (
            f"{self.path} holds {what} {name}/; it must hold {self.chosen_dir}/ and {self.rejected_dir}/{held} "
            "(data.chosen_dir and data.rejected_dir name other folders)"
        )

    def _folder(self, place: Place) -> Path:
        return self.path / place.above / self.chosen_dir

    def _select(self, found: Files) -> tuple[list[Path], dict[str, list[Path]]]:
        folders = list(dict.fromkeys(self._folder(place) for place in found.places))
        return select(folders, self.split, self.path)

    def _places(self, found: Files) -> list[Place]:
        """Return the places of the split, in order."""
        kept = set(self._select(found)[0])
        return [place for place in found.places if self._folder(place) in kept]

    # --- captions ----------------------------------------------------------------------------------------------------

    def _listed(self, found: Files) -> tuple[dict[Place, list[str]], list[Dropped]]:
        """Return the prompts of captions.jsonl by place, and the lines that cannot be read."""
        captions: dict[Place, list[str]] = defaultdict(list)
        broken = []
        for file in (PurePosixPath(name) for name in found.others if PurePosixPath(name).name == CAPTIONS):
            for where, entry in read_file(self.path / file):
                if isinstance(entry, str):
                    broken.append(Dropped(where, entry))
                    continue
                name, prompt = entry.get("file_name"), entry.get(spelling("prompt", entry) or "prompt")
                missing = next((key for key, it in (("file_name", name), ("prompt", prompt)) if it is None), None)
                if missing:
                    broken.append(Dropped(where, f"no {missing!r}"))
                elif not isinstance(name, str) or not isinstance(prompt, str):
                    broken.append(Dropped(where, "file_name and prompt must be text"))
                else:
                    above = "" if str(file.parent) == "." else str(file.parent)
                    captions[Place(above, splitext(name)[0])].append(prompt)
        return captions, broken

    def _caption(self, place: Place, listed: list[str], captions: frozenset[str]) -> tuple[str, str]:
        """Return the one caption that a place has, and what is wrong with it, "" when nothing is."""
        found = {text.strip() for text in listed}
        suffixes = CAPTION_SUFFIXES if self.caption_suffix is None else (self.caption_suffix,)
        for side in (self.chosen_dir, self.rejected_dir):
            for suffix in suffixes:
                name = f"{place.above}/{side}/{place.name}{suffix}".removeprefix("/")
                data = read_inside(self.path, name) if name in captions else MISSING
                if data == MISSING:
                    continue
                if isinstance(data, str):
                    return "", f"caption: {data}"
                try:
                    found.add(read_caption(decode_text(data)).prompt)
                except UnicodeDecodeError:
                    return "", "caption: neither UTF-8 nor UTF-16 text"
        found = found - {""} or found
        if len(found) != 1:
            return "", "different captions" if found else _NO_CAPTION
        return found.pop(), ""


def _inside(images: Sequence[bytes]) -> tuple[str, str]:
    """Return the one prompt that a generator left inside two images, or what is wrong with it."""
    said = [read_embedded(data) for data in images]
    prompts = {it.prompt for it in said} - {""}
    if len(prompts) > 1:
        return "", "no caption, and different prompts inside the two images"
    fault = next((f": {it.fault}" for it in said if it.fault), "")
    return (prompts.pop(), "") if prompts else ("", f"{_NO_CAPTION}{fault}")


def _two_sides(folders: Mapping[str, set[str]]) -> tuple[str, str] | None:
    """Return which of the folders beside each other holds the better images and which the worse; None when unclear.

    `folders` are the names of their images. Where only the names of the folders speak, the images must have partners.
    """
    if folders.keys() >= set(_SIDES):
        return _SIDES
    better, worse = ([name for name in folders if name.lower() in known] for known in (BETTER, WORSE))
    if len(better) != 1 or len(worse) != 1 or not folders[better[0]] & folders[worse[0]]:
        return None
    return better[0], worse[0]
