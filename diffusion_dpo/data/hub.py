"""Any table of preferences by the names of its columns: Parquet, Arrow, tars or JSON, local or on the hub."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say, warn
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.by_column import SCORE, Columns, count_rows, named_files, read_labels_of, read_table
from diffusion_dpo.data.holding import Holding, look_into
from diffusion_dpo.data.labels import Labels, Meaning, read_labels
from diffusion_dpo.data.layout import find_settings
from diffusion_dpo.data.rows import Ties
from diffusion_dpo.data.splits import describe, select
from diffusion_dpo.data.stamps import stamp_of

Two = tuple[str, str]


class HubData(PairSource):
    """Rows with image columns, as Hugging Face `datasets` writes them and as people name them.

    Either `chosen_column` and `rejected_column`, or `image_0_column`, `image_1_column` and one of `label_column`,
    `votes_columns`, `share_columns` and `score_columns`.
    """

    noun: ClassVar[str] = "preference pairs by the names of their columns"

    path: str
    """A local Parquet file or folder, or the id of a data set on the hub, `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; `refs/convert/parquet` for a data set that is not stored as Parquet."""
    split: str | None = None
    """train, validation, test, or another that names of files and folders speak of; all; null: train of several."""
    max_rows: int | None = Field(None, ge=1)
    """Read only the first N rows, and download only the files that hold them; null reads all."""
    prompt_column: str = "prompt"
    """The prompts: texts, or chats of which the user's message is taken."""
    chosen_column: str = "chosen"
    """The better images; a row with a list of them makes a pair of each."""
    rejected_column: str = "rejected"
    """The worse images, or lists of them."""
    image_0_column: str | None = None
    """First images, where another column says which one is better."""
    image_1_column: str | None = None
    """Second images."""
    label_column: str | None = None
    """Which image is better: the probability that the first is (1, 0, or 0.5 for a tie), true and false, -1 and 1, 1
    and 2, left and right, first and second, a and b, image_0 and image_1, or the id or the model of the better one.
    For the index of the winner, 0 for the first image, set label_meaning=winner_index, or swap the image columns."""
    label_meaning: Meaning = "probability"
    """probability: a label of 1 means that the first image is better. winner_index: 0 does, or 1 where labels are 1
    and 2."""
    votes_columns: Two | None = None
    """Two columns with the numbers of votes for either image; the label probability is (votes + 1) / (all + 2)."""
    share_columns: Two | None = None
    """Two columns with the shares of votes, smoothed in the same way."""
    share_votes_column: str | None = None
    """A column that lists the votes behind the shares, as JSON; it is counted."""
    share_votes: int = Field(10, ge=1)
    """The number of votes behind a share where no column lists them."""
    score_columns: Two | None = None
    """Two columns with scores: the image with the higher one is better, by the difference; of chosen and rejected
    images they are kept, and decide nothing."""
    model_columns: Two | None = None
    """Two columns with the names of the models that drew the images."""
    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    @classmethod
    def recognise(cls, found: Holding) -> dict[str, Any] | None:
        """See PairSource."""
        settings = find_settings(found.columns, files=found.is_text) if found.table else None
        if settings is None:
            return None
        return settings | {"path": str(found.path)}

    @model_validator(mode="after")
    def _one_thing_decides(self) -> Self:
        images = ("image_0_column", "image_1_column")
        ways = ("label_column", "votes_columns", "share_columns", "score_columns")
        given = [name for name in ways if getattr(self, name) is not None]
        missing = [name for name in images if getattr(self, name) is None]
        if len(missing) == 1 or (missing and set(given) - {"score_columns"}) or (not missing and not given):
            missing += [] if given else ["label_column"]
            raise ValueError(
                f"image_0_column, image_1_column and label_column go together; missing: {', '.join(missing)} "
                f"(instead of label_column there may be {', '.join(ways[1:])})"
            )
        if len(set(given) - {"score_columns"}) > 1:
            raise ValueError(f"{' and '.join(given)} may say different things; keep one of them")
        return self

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield the rows of the split, file by file; ConfigError when the labels do not say which image is better."""
        return islice(self._read_all(), self.max_rows)

    def num_rows(self) -> int:
        """Return the number of rows, from the files' footers; downloads what `read` will need."""
        total = sum(count for _, count in self._needed_files())
        return total if self.max_rows is None else min(total, self.max_rows)

    def stamp(self) -> str:
        """Return the state of the files that `read` will need; the local path of a hub file names its commit."""
        files, columns = [file for file, _ in self._needed_files()], self._columns()
        return stamp_of([*files, *(named for file in files for named in named_files(file, columns))])

    def left_out(self) -> list[str]:
        """See PairSource; of what is on the hub, no file that is left out is downloaded to count its rows."""
        local = Path(self.path)
        if not local.is_dir():
            return []
        left, columns = select(self._every_file(local), self.split, local)[1], self._columns()
        return describe(left, (count_rows(file, columns) for files in left.values() for file in files), local)

    def _every_file(self, folder: Path) -> list[Path]:
        """Return the files of the first table in a folder that has the columns; without one, those that hold rows."""
        from diffusion_dpo.data import shards

        wanted = set(self._columns().required)
        table = next((table for table in look_into(folder).tables if wanted <= table.columns), None)
        return shards.parquet_files(folder) if table is None else list(table.files)

    def _needed_files(self) -> Iterator[tuple[Path, int]]:
        """Yield every file that holds one of the first `max_rows` rows, and its number of rows."""
        total, columns = 0, self._columns()
        for file in self._files():
            count = count_rows(file, columns)
            yield file, count
            total += count
            if self.max_rows is not None and total >= self.max_rows:
                return

    def _read_all(self) -> Iterator[PreferencePair | Dropped]:
        columns, labels = self._columns(), None
        if columns.decides == "label":
            files = tuple(file for file, _ in self._needed_files())
            labels = _labels_of(files, columns, stamp_of(files))
        elif columns.decides in ("votes", "shares"):
            _say_smoothing(self.path)
        for file in self._files():
            yield from read_table(file, columns, labels, ties=self.ties, source=self.path)

    def labelled_by(self) -> tuple[str, ...]:
        """Return the name of the scores where they decide; () for labels and votes, which people may have given."""
        return (SCORE,) if self._columns().decides == "scores" else ()

    def _columns(self) -> Columns:
        ways = {"label": self.label_column, "votes": self.votes_columns, "shares": self.share_columns}
        decides = next((name for name, value in ways.items() if value is not None), "scores")
        images = (self.image_0_column, self.image_1_column)
        first, second = (self.chosen_column, self.rejected_column) if None in images else images
        assert first is not None and second is not None
        return Columns(
            self.prompt_column,
            (first, second),
            "order" if None in images else decides,
            label=self.label_column,
            meaning=self.label_meaning,
            votes=self.votes_columns,
            shares=self.share_columns,
            votes_behind=self.share_votes_column,
            num_votes=self.share_votes,
            scores=self.score_columns,
            models=self.model_columns,
        )

    def _files(self) -> Iterator[Path]:
        local = Path(self.path)
        if local.is_file():
            yield local
        elif local.is_dir():
            yield from select(self._every_file(local), self.split, local)[0]
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            yield from _hub_files(self.path, self.revision, self.split)
        else:
            raise ConfigError(
                f"data.path: there is no file or folder {self.path}, and it is not a hub id (owner/name)"
            )


@lru_cache(maxsize=8)
def _labels_of(files: tuple[Path, ...], columns: Columns, stamp: str) -> Labels:
    """Read all labels of some files in the state `stamp`, and say once how they are understood."""
    assert columns.label is not None
    found = read_labels(columns.label, (it for file in files for it in read_labels_of(file, columns)), columns.meaning)
    if found.only:
        warn(f"{columns.label} is {found.only} in every row, so nothing shows that it means what is taken here:")
    say(f"{columns.label}: {found.summary.format(*columns.images)}")
    return found


@lru_cache(maxsize=8)
def _say_smoothing(path: str) -> None:
    say(f"{path}: the label probability of a pair is (votes for its better image + 1) / (all its votes + 2)")


def _hub_files(repo_id: str, revision: str | None, split: str | None) -> Iterator[Path]:
    """Yield the files of a data set on the hub, each one downloaded (or found in the cache) when it is asked for."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    try:
        try:
            names = [name for name in hub.list_repo_files(repo_id, **where) if name.endswith(".parquet")]
        except errors.OfflineModeIsEnabled:
            folder = Path(hub.snapshot_download(repo_id, local_files_only=True, **where))
            names = [file.relative_to(folder).as_posix() for file in folder.rglob("*.parquet")]
            say(f"offline: using the {len(names)} files of {repo_id} that are in the cache")
        if not names:
            raise ConfigError(f"{repo_id} holds no Parquet file; try data.revision=refs/convert/parquet")
        for file in select([Path(repo_id) / name for name in sorted(names)], split, Path(repo_id))[0]:
            yield Path(hub.hf_hub_download(repo_id, file.relative_to(repo_id).as_posix(), **where))
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise ConfigError(_explain(repo_id, revision, error)) from error


def _explain(repo_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}; see the branches at {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no local folder {repo_id} and no public data set {page}; is the name right?"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return f"{repo_id} is not in the cache, and the hub is out of reach; go online once, or give a local folder"
    return f"cannot reach {page} ({' '.join(str(error).split())[:120]}); check the network, or give a local folder"
