"""Any Parquet data set by the names of its columns, local or on the Hugging Face hub."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

from pydantic import Field, model_validator

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.rows import Ties, make_labelled_pair, make_pair
from diffusion_dpo.data.stamps import stamp_of

_SPLITS = ("train", "test", "validation", "val", "dev")


class HubData(PairSource):
    """Parquet with image columns, as Hugging Face `datasets` writes it.

    Either `chosen_column` and `rejected_column`, or `image_0_column`, `image_1_column` and `label_column`.
    """

    path: str
    """A local Parquet file or folder, or the id of a data set on the hub, `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit on the hub; `refs/convert/parquet` for a data set that is not stored as Parquet."""
    split: str = "train"
    """Which files to read, by their names: train-00000-of-00002.parquet, train/0000.parquet."""
    max_rows: int | None = Field(None, ge=1)
    """Read only the first so many rows, and download only the files that hold them; null reads all."""
    prompt_column: str = "prompt"
    """The prompts."""
    chosen_column: str = "chosen"
    """The better images."""
    rejected_column: str = "rejected"
    """The worse images."""
    image_0_column: str | None = None
    """First images, where a label says which one is better."""
    image_1_column: str | None = None
    """Second images."""
    label_column: str | None = None
    """Probability that the first image is better: 1, 0, or 0.5 for a tie."""
    ties: Ties = "drop"
    """keep trains on ties too, as pairs with label probability 0.5."""

    @model_validator(mode="after")
    def _labels_are_whole(self) -> Self:
        names = {name: getattr(self, name) for name in ("image_0_column", "image_1_column", "label_column")}
        missing = [name for name, value in names.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"image_0_column, image_1_column and label_column go together; missing: {', '.join(missing)}"
            )
        return self

    def read(self) -> Iterator[PreferencePair | Dropped]:
        """Yield the rows of the split, file by file; hub files are downloaded when their turn comes."""
        return islice(self._read_all(), self.max_rows)

    def num_rows(self) -> int:
        """Return the number of rows, from the files' footers; downloads what `read` will need."""
        total = sum(count for _, count in self._needed_files())
        return total if self.max_rows is None else min(total, self.max_rows)

    def stamp(self) -> str:
        """Return the state of the files that `read` will need; the local path of a hub file names its commit."""
        return stamp_of(file for file, _ in self._needed_files())

    def _needed_files(self) -> Iterator[tuple[Path, int]]:
        """Yield every file that holds one of the first `max_rows` rows, and its number of rows."""
        from diffusion_dpo.data import shards

        total = 0
        for file in self._files():
            count = shards.num_rows(file)
            yield file, count
            total += count
            if self.max_rows is not None and total >= self.max_rows:
                return

    def _read_all(self) -> Iterator[PreferencePair | Dropped]:
        from diffusion_dpo.data import shards

        labelled = self.label_column is not None
        images = (self.image_0_column, self.image_1_column) if labelled else (self.chosen_column, self.rejected_column)
        columns = [name for name in (self.prompt_column, *images, self.label_column) if name is not None]
        for file in self._files():
            for where, row in shards.located_rows(file, columns):
                prompt, first, second, *label = (row[name] for name in columns)
                if labelled:
                    yield make_labelled_pair(
                        where, prompt, (first, second), label[0], ties=self.ties, source=self.path
                    )
                else:
                    yield make_pair(where, prompt, first, second, source=self.path)

    def _files(self) -> Iterator[Path]:
        from diffusion_dpo.data import shards

        local = Path(self.path)
        if local.is_file():
            yield local
        elif local.is_dir():
            names = [file.relative_to(local).as_posix() for file in shards.parquet_files(local)]
            yield from (local / name for name in _of_split(names, self.split, self.path))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.path):
            yield from _hub_files(self.path, self.revision, self.split)
        else:
            raise ConfigError(
                f"data.path: there is no file or folder {self.path}, and it is not a hub id (owner/name)"
            )


def _of_split(names: list[str], split: str, data_set: str) -> list[str]:
    """Return the files of a split; all of them when no file name speaks of a split."""

    def splits(name: str) -> set[str]:
        return {word for part in PurePosixPath(name).parts for word in re.split(r"[-_.]", part)}

    chosen = [name for name in names if split in splits(name)]
    if chosen or not any(splits(name) & set(_SPLITS) for name in names):
        return chosen or names
    raise ConfigError(f"{data_set} has no Parquet file of the split {split!r}; its files: {', '.join(names[:5])}")


def _hub_files(repo_id: str, revision: str | None, split: str) -> Iterator[Path]:
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
        for name in _of_split(sorted(names), split, repo_id):
            yield Path(hub.hf_hub_download(repo_id, name, **where))
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
