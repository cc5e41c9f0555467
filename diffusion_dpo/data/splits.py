"""Which files of a data set are train, validation and test, by their names; train alone is read unless told otherwise.

The words are those that Hugging Face `datasets` knows. A name that only contains one (a folder `test_run`, a file
`train-images.parquet`) speaks of a split only where its counterpart lies beside it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PairSource
from diffusion_dpo.data.listing import some
from diffusion_dpo.data.stamps import stamp_of

TRAIN, ALL = "train", "all"
_WORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation", "holdout", "heldout"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}
_SHARD = re.compile(r"(.+?)[-_.]\d{3,}[-_.]of[-_.]\d{3,}([-_.][0-9a-f]+)?", re.IGNORECASE)
_NUMBERED = re.compile(rf"({'|'.join(_SPLIT_OF)})\d+")
_SEPARATORS = re.compile(r"[-_. ]+")

Tokens = tuple[str, ...]


def split_names(files: Sequence[PurePosixPath]) -> list[str]:
    """Return the split that each file is of, by its name or that of the nearest folder that speaks of one; else "".

    `val`, `valid`, `dev` and `validation` are one split, and so on. Of shards, `NAME-00000-of-00004.parquet`, a name
    that begins with one of the words is a split of its own: `test_unique`.
    """
    beside: dict[PurePosixPath, set[Tokens]] = defaultdict(set)
    for file in files:
        for path in (file, *file.parents[:-1]):
            beside[path.parent].add(_tokens(path))
    return [
        next((name for path in (file, *file.parents[:-1]) if (name := _split(path, beside[path.parent]))), "")
        for file in files
    ]


def select(files: Sequence[Path], split: str | None, root: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """Return the files of a split, in their order, and the others by the names of theirs.

    Null takes all where no split but train is named; else train, or what names none where nothing names train. Raises
    ConfigError, naming those that are there, when there is no such split.
    """
    by_split: dict[str, list[Path]] = defaultdict(list)
    for file, name in zip(files, split_names([_inside(file, root) for file in files]), strict=True):
        by_split[name].append(file)
    there = sorted(name for name in by_split if name)
    if split == ALL or (len(by_split) == 1 and split is None) or (not set(there) - {TRAIN} and split in (None, TRAIN)):
        return list(files), {}
    wanted = _SPLIT_OF.get(split.lower(), split) if split else TRAIN
    if wanted == TRAIN and TRAIN not in by_split and "" in by_split:
        wanted = ""
    if wanted not in by_split:
        names = some([it.name for it in files])
        known = f"those there are {', '.join(there)}" if there else f"its files name none: {names}"
        asked = f"no split {split!r}" if split else "several splits, and none of them is train"
        raise ConfigError(f"{root} has {asked}; {known}; set data.split to one of them, or to all")
    return by_split.pop(wanted), dict(by_split)


def describe(left: Mapping[str, Sequence[Path]], counts: Iterable[int], root: Path) -> list[str]:
    """Return one line on the files of other splits, [] when none is left out; `counts` are their numbers of rows."""
    if not left:
        return []
    rows = iter(counts)
    parts = [
        f"{counted(sum(next(rows) for _ in files), 'row')} of {f'the split {name}' if name else 'no named split'} "
        f"({_inside(files[0], root)}{', ...' if len(files) > 1 else ''})"
        for name, files in left.items()
    ]
    settings = " or ".join(f"data.split={name or ALL}" for name in left)
    return [f"{', '.join(parts)}; {settings} reads them"]


def counted(number: int, noun: str) -> str:
    """Return `1 row`, `2 rows`, for a message."""
    return f"{number} {noun}{'s'[: number != 1]}"


def _inside(file: Path, root: Path) -> PurePosixPath:
    inside = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
    return PurePosixPath(inside.as_posix())


def _tokens(path: PurePosixPath) -> Tokens:
    """The words of a name, in lower case, without its suffix and the numbers of a shard; other numbers are alike."""
    stem = path.name.removesuffix(path.suffix) if path.suffix[1:].isalpha() else path.name
    shard = _SHARD.fullmatch(stem)
    words = (_NUMBERED.sub(r"\1", word) for word in _SEPARATORS.split((shard[1] if shard else stem).lower()) if word)
    return tuple("#" if word.isdigit() else word for word in words)


def _split(path: PurePosixPath, beside: set[Tokens]) -> str:
    tokens = _tokens(path)
    words = [token for token in tokens if token not in ("#", "partial")]
    if len(words) == 1 and words[0] in _SPLIT_OF:
        return _SPLIT_OF[words[0]]
    shard = _SHARD.fullmatch(path.stem)
    if shard and words and words[0] in _SPLIT_OF:
        return shard[1]
    for i, token in enumerate(tokens):
        split = _SPLIT_OF.get(token)
        if split is None:
            continue
        others = {
            _SPLIT_OF.get(it[i])
            for it in beside
            if len(it) == len(tokens) and it[:i] + it[i + 1 :] == tokens[:i] + tokens[i + 1 :]
        }
        without = i == len(tokens) - 1 and tokens[:i] in beside
        if without or others - {None, split}:
            return split
    return ""


class FileData(PairSource):
    """A source that reads files with rows, some of which may be another split."""

    path: Path
    """A file, or a folder of them."""
    split: str | None = None
    """train, validation, test, or another that names of files and folders speak of; all; null: train of several."""

    def every_file(self) -> list[Path]:
        """Return the files of all splits, in a stable order; raises ConfigError when there are none."""
        from diffusion_dpo.data import shards

        return shards.parquet_files(self.path)

    def rows_in(self, file: Path) -> int:
        """Return the number of rows of a file, without looking at images."""
        from diffusion_dpo.data import shards

        return shards.num_rows(file)

    def files(self) -> list[Path]:
        """Return the files of the split, in a stable order."""
        return self._select()[0]

    def left_out(self) -> list[str]:
        """See PairSource."""
        left = self._select()[1]
        return describe(left, (self.rows_in(file) for files in left.values() for file in files), self._root)

    def num_rows(self) -> int:
        """Return the number of rows, of Parquet from the files' footers."""
        return sum(self.rows_in(file) for file in self.files())

    def stamp(self) -> str:
        """Return the state of the files."""
        return stamp_of(self.files())

    def _select(self) -> tuple[list[Path], dict[str, list[Path]]]:
        return select(self.every_file(), self.split, self._root)

    @property
    def _root(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent
