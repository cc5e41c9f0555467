"""Two folders, chosen/ and rejected/, with the same file names, and captions beside them: pairs sorted by hand."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from posixpath import splitext
from typing import Any

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.folder import read_inside
from diffusion_dpo.data.holding import Holding
from diffusion_dpo.data.records import read_records
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.stamps import stamp_of

CAPTIONS = "captions.jsonl"
_SIDES = ("chosen", "rejected")

Names = dict[str, list[str]]
"""The files that share a name without its suffix, relative to the folder of pairs."""


class TwoFoldersData(PairSource):
    """`chosen/cat.png` is better than `rejected/cat.png` (or .jpg) for the caption in a `cat.txt` beside either.

    Captions may also be the lines of a `captions.jsonl`: {"file_name": "cat.png", "prompt": "a cat"}.
    """

    path: Path
    """The folder that holds chosen/ and rejected/; what is in folders below them is paired as well."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        return {} if found.table is None and found.folders >= set(_SIDES) else None

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield every name once, in their order, then the lines of captions.jsonl that cannot be read."""
        captions, broken = self._captions()
        for item in self._matches():
            if isinstance(item, Dropped):
                yield item
                continue
            name, files = item
            prompt, fault = self._caption(name, captions[name])
            images = [read_inside(self.path, file) for file in files]
            wrong = next((f"{side}: {it}" for side, it in zip(_SIDES, images, strict=True) if isinstance(it, str)), "")
            if fault or wrong:
                yield Dropped(files[0], fault or wrong)
            else:
                yield make_pair(files[0], prompt, *images, source="two_folders")
        yield from broken

    def num_rows(self) -> int:
        """Return the number of names and of captions that cannot be read, without looking at images."""
        return sum(1 for _ in self._matches()) + len(self._captions()[1])

    def stamp(self) -> str:
        """Return the state of all files in both folders, and of captions.jsonl."""
        files = (file for side in _SIDES for file in sorted((self.path / side).rglob("*")) if not file.is_dir())
        return stamp_of(file for group in ([self.path / CAPTIONS], files) for file in group)

    def _matches(self) -> Iterator[tuple[str, tuple[str, str]] | Dropped]:
        """Yield the two files of every name, or why there are not two."""
        found = [self._names(side) for side in _SIDES]
        for name in sorted({name for names in found for name in names}):
            files = [names.get(name, []) for names in found]
            several = next((group for group in files if len(group) > 1), None)
            if several:
                yield Dropped(several[0], "several files of this name")
            elif not all(files):
                missing = _SIDES[files.index([])]
                yield Dropped(next(group[0] for group in files if group), f"no file of this name in {missing}/")
            else:
                yield name, (files[0][0], files[1][0])

    def _names(self, side: str) -> Names:
        from diffusion_dpo.data.candidates import IMAGE_SUFFIXES

        folder = self.path / side
        if not folder.is_dir():
            raise ConfigError(f"{self.path} holds no folder {side}/; it must hold chosen/ and rejected/")
        names: Names = defaultdict(list)
        for file in sorted(folder.rglob("*")):
            inside = file.relative_to(folder)
            hidden = any(part.startswith(".") for part in inside.parts)
            if file.suffix.lower() in IMAGE_SUFFIXES and not hidden and not file.is_dir():
                names[splitext(inside.as_posix())[0]].append(f"{side}/{inside.as_posix()}")
        return names

    def _captions(self) -> tuple[dict[str, list[str]], list[Dropped]]:
        """Return the prompts of captions.jsonl by name, and the lines that cannot be read."""
        captions: dict[str, list[str]] = defaultdict(list)
        broken = []
        if (self.path / CAPTIONS).is_file():
            for where, entry in read_records(self.path / CAPTIONS, ("file_name", "prompt")):
                if isinstance(entry, str):
                    broken.append(Dropped(where, entry))
                elif not isinstance(entry["file_name"], str) or not isinstance(entry["prompt"], str):
                    broken.append(Dropped(where, "file_name and prompt must be text"))
                else:
                    captions[splitext(entry["file_name"])[0]].append(entry["prompt"])
        return captions, broken

    def _caption(self, name: str, listed: list[str]) -> tuple[str, str]:
        """Return the one caption that a name has in all the places, and what is wrong with it, "" when nothing is."""
        found = {text.strip() for text in listed}
        for side in _SIDES:
            data = read_inside(self.path, f"{side}/{name}.txt")
            if data == "no such file":
                continue
            if isinstance(data, str):
                return "", f"caption: {data}"
            try:
                found.add(data.decode("utf-8-sig").strip())
            except UnicodeDecodeError:
                return "", "caption: not UTF-8 text"
        if len(found) != 1:
            return "", "different captions" if found else "no caption"
        return found.pop(), ""
