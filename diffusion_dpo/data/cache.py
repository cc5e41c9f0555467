"""The latent cache: training steps read nothing else, and no step decodes or encodes an image.

VAE latents of both sides of every pair, its mask, and the text embedding of every distinct prompt, in safetensors
files. Each file is written whole or not at all, so an interrupted build goes on where it stopped, and says itself what
it was made of. The folder's name is a hash of everything that decides the content; `facts.json` says it in words.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data.buckets import Size, choose_buckets, crop_offsets, make_buckets
from diffusion_dpo.data.encode import SIDES, Encoders, encode_pairs, encode_prompts, tensor_name
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.tensor_files import DamagedFile, TensorFile, write
from diffusion_dpo.files import atomic_path, refuse_others, settle
from diffusion_dpo.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_PER_FILE = 256
PROMPTS_PER_FILE = 1024
_MAX_OPEN_FILES = 128
"""Of the 1024 that a process usually may open; the workers of a DataLoader have their own."""
_VERSION = 2
_WORDS = {
    "format": "format",
    "encoders": "VAE or text encoders",
    "dtype": "precision",
    "resolution_px": "resolution",
    "buckets_px": "buckets",
    "latents": "shape of latents",
    "mirrored": "random_flip",
    "data": "data",
    "file": "part of the cache",
}
"""What a fact is about, for a message."""


class LatentCache:
    """Read access: latents of pairs and conditioning of prompts, by index. Keeps a few files open, and no tensors."""

    def __init__(
        self, folder: Path, facts: dict[str, str], data: Collected, buckets: Sequence[Size], encoders: Encoders
    ) -> None:
        """Open a built cache."""
        self._folder, self._facts, self._data = folder, facts, data
        self._buckets = list(buckets)
        self._codes = data.prompt_codes
        self._has_masks = data.has_masks
        self._open: OrderedDict[str, TensorFile] = OrderedDict()
        self.bucket_of = bucket_of(data, self._buckets)
        """The number of every pair's bucket, int16 (N,)."""
        self.shapes = [encoders.latent_shape(size) for size in self._buckets]
        """The latents' shape (C, h, w) in every bucket."""

    @property
    def name(self) -> str:
        """A hash of everything that decides the content."""
        return self._folder.name

    def latents(self, images: Sequence[tuple[int, int]], flip: Sequence[bool]) -> "Tensor":
        """Return the latents (N, C, h, w), float32, of images of one bucket, each named by its pair and its side.

        Side 0 is chosen. Raises ConfigError when a file is damaged.
        """
        import torch

        rows = [
            self._of_pair("latents", pair, int(mirrored), side)
            for (pair, side), mirrored in zip(images, flip, strict=True)
        ]
        return torch.stack(rows).float()

    def masks(self, images: Sequence[tuple[int, int]], flip: Sequence[bool]) -> "Tensor | None":
        """Return how much each latent position counts, (N, 1, h, w), mean 1 each; None where no pair has a mask."""
        import torch

        if not self._has_masks:
            return None
        rows = [self._of_pair("masks", pair, int(mirrored)) for (pair, _), mirrored in zip(images, flip, strict=True)]
        return torch.stack(rows)[:, None]

    def conditioning(self, indices: Sequence[int], drop: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the conditioning of the pairs' prompts, float32; of the empty prompt where `drop` is true."""
        import torch

        wanted = [0 if dropped else 1 + int(self._codes[i]) for i, dropped in zip(indices, drop, strict=True)]
        rows = [self._of_prompt(number) for number in wanted]
        return {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}

    def sizes(self, images: Sequence[tuple[int, int]]) -> "Tensor":
        """Return what SDXL is told of the sizes of images, int64 (N, 6), in px.

        Original height and width of each image, top and left of its crop in the scaled image, height and width of its
        bucket.
        """
        import torch

        pairs, sides = np.array(images, dtype=np.int64).reshape(-1, 2).T
        chosen, rejected = (self._data.sizes_px(side, pairs) for side in SIDES)
        original = np.where(sides[:, None] == 0, chosen, rejected)
        target = np.array(self._buckets)[self.bucket_of[pairs]]
        columns = (original[:, ::-1], crop_offsets(original, target), target[:, ::-1])
        return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.int64))

    def _of_pair(self, name: str, pair: int, *index: int) -> "Tensor":
        number, bucket = pair // PAIRS_PER_FILE, self.bucket_of[pair]
        row = int(np.count_nonzero(self.bucket_of[number * PAIRS_PER_FILE : pair] == bucket))
        file = pairs_file(number)
        try:
            return self._file(file).item(tensor_name(name, self._buckets[bucket]), row, *index)
        except (DamagedFile, OSError) as error:
            record = self._data.records[pair]
            raise self._given_up(file, f"pair {record.pair_id} ({record.where})", error) from error

    def _of_prompt(self, number: int) -> "dict[str, Tensor]":
        file = prompts_file(number // PROMPTS_PER_FILE)
        try:
            opened = self._file(file)
            return {name: opened.item(name, number % PROMPTS_PER_FILE) for name in opened.names}
        except (DamagedFile, OSError) as error:
            text = self._data.prompts[number - 1] if number else ""
            raise self._given_up(file, f"prompt {text!r}", error) from error

    def _file(self, name: str) -> TensorFile:
        """Return a file, from the few that are kept open."""
        if name not in self._open:
            self._open[name] = _open(self._folder / name, self._facts)
            if len(self._open) > _MAX_OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def _given_up(self, file: str, what: str, error: Exception) -> ConfigError:
        """Remove a damaged file, which the next build makes again, and return what to tell."""
        self._open.pop(file, None)
        (self._folder / file).unlink(missing_ok=True)
        return ConfigError(
            f"{self._folder / file} is damaged at {what}: {error}; it was removed, and the same command encodes it "
            "again and goes on"
        )


def build(
    root: Path,
    data: Collected,
    encoders: Encoders,
    *,
    random_flip: bool,
    bucket_step_px: int | None = None,
    processes: Processes = Processes(),  # noqa: B008 - frozen
) -> LatentCache:
    """Encode what is not cached yet under `root` and return the open cache.

    Images are squares, or in buckets whose sides are multiples of `bucket_step_px`. Every missing file is made by
    exactly one of the processes, all of which call this. The data is read only when something is missing. Raises
    ConfigError when a file is of other encoders, another resolution or other data than its name says.
    """
    square = encoders.resolution_px, encoders.resolution_px
    buckets = [square] if bucket_step_px is None else make_buckets(encoders.resolution_px, bucket_step_px)
    facts = facts_of(data, encoders, buckets, random_flip=random_flip)
    folder = folder_of(root, facts)
    missing = processes.from_main(_missing(folder, facts, data) if processes.is_main else None)
    pair_files, prompt_files = (processes.share(numbers) for numbers in missing)
    if pair_files:
        _encode_pairs(folder, facts, data, pair_files, encoders, buckets, random_flip=random_flip)
    for number in prompt_files:
        _encode_prompts(folder, facts, data, number, encoders)
    processes.wait()
    return LatentCache(folder, facts, data, buckets, encoders)


def bucket_of(data: Collected, buckets: Sequence[Size]) -> np.ndarray:
    """Return the number of every pair's bucket, int16 (N,)."""
    return choose_buckets(buckets, data.sizes_px("chosen"), data.sizes_px("rejected"))


def facts_of(data: Collected, encoders: Encoders, buckets: Sequence[Size], *, random_flip: bool) -> dict[str, str]:
    """Return what decides the content of a cache, in words."""
    return {
        "format": str(_VERSION),
        "encoders": encoders.fingerprint,
        "dtype": str(encoders.dtype).removeprefix("torch."),
        "resolution_px": str(encoders.resolution_px),
        "buckets_px": " ".join(f"{width}x{height}" for width, height in buckets),
        "latents": f"{encoders.latent_channels} channels, 1/{encoders.downscale} of the side",
        "mirrored": "both ways" if random_flip else "as they are",
        "data": data.fingerprint,
    }


def folder_of(root: Path, facts: dict[str, str]) -> Path:
    """Return the folder of the cache with these facts."""
    return root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _missing(folder: Path, facts: dict[str, str], data: Collected) -> tuple[list[int], list[int]]:
    """Return the numbers of the files of pairs and of prompts that have to be made, and say so."""
    settle(folder, facts, _WORDS)
    num_prompts = 1 + len(data.prompts)
    pair_files = [i for i in range(-(-len(data) // PAIRS_PER_FILE)) if not _whole(folder / pairs_file(i), facts)]
    prompt_files = [
        i for i in range(-(-num_prompts // PROMPTS_PER_FILE)) if not _whole(folder / prompts_file(i), facts)
    ]
    if pair_files or prompt_files:
        num_pairs = _num_rows(pair_files, PAIRS_PER_FILE, len(data))
        num_texts = _num_rows(prompt_files, PROMPTS_PER_FILE, num_prompts)
        say(f"cache: encoding {num_pairs} pairs and {num_texts} prompts at {facts['resolution_px']} px into {folder}")
    else:
        say(f"cache: {len(data)} pairs at {facts['resolution_px']} px are encoded already in {folder}")
    return pair_files, prompt_files


def _encode_pairs(
    folder: Path,
    facts: dict[str, str],
    data: Collected,
    numbers: Sequence[int],
    encoders: Encoders,
    buckets: Sequence[Size],
    *,
    random_flip: bool,
) -> None:
    wanted = set(numbers)
    places = bucket_of(data, buckets)
    stream = iter(data)
    with progress("cache", _num_rows(numbers, PAIRS_PER_FILE, len(data)), "pairs") as advance:
        for number in range(max(wanted) + 1):
            rows = islice(stream, PAIRS_PER_FILE)
            if number not in wanted:
                for _ in rows:  # passed over one by one: a file of pairs may be gigabytes of images
                    pass
                continue
            start = number * PAIRS_PER_FILE
            with atomic_path(folder / pairs_file(number)) as partial:
                tensors = encode_pairs(
                    zip(rows, places[start : start + PAIRS_PER_FILE].tolist(), strict=True),
                    encoders,
                    buckets,
                    random_flip=random_flip,
                    masked=data.has_masks,
                    advance=advance,
                )
                index_dims = {name: 2 if name.startswith("masks") else 3 for name in tensors}
                write(partial, tensors, index_dims, facts | {"file": pairs_file(number)})


def _encode_prompts(folder: Path, facts: dict[str, str], data: Collected, number: int, encoders: Encoders) -> None:
    """Write one file of prompts. The empty one (for prompt dropout) is the first of all, then come the data's."""
    end = min((number + 1) * PROMPTS_PER_FILE, 1 + len(data.prompts))
    texts = [data.prompts[i - 1] if i else "" for i in range(number * PROMPTS_PER_FILE, end)]
    tensors = encode_prompts(texts, encoders)
    with atomic_path(folder / prompts_file(number)) as partial:
        write(partial, tensors, dict.fromkeys(tensors, 1), facts | {"file": prompts_file(number)})


def pairs_file(number: int) -> str:
    """Return the name of the file with pairs [256 number, 256 (number + 1)) in the order of the data."""
    return f"pairs-{number:05d}.safetensors"


def prompts_file(number: int) -> str:
    """Return the name of the file with prompts [1024 number, 1024 (number + 1)), of which 0 is the empty one."""
    return f"prompts-{number:05d}.safetensors"


def _num_rows(numbers: Sequence[int], size: int, total: int) -> int:
    """Return how many of `total` rows are in the files of these numbers, of `size` rows each."""
    return sum(min(size, total - number * size) for number in numbers)


def _whole(path: Path, facts: dict[str, str]) -> bool:
    """Whether a file of the cache is there and complete; a damaged one is named and made again."""
    if not path.exists():
        return False
    try:
        _open(path, facts)
    except DamagedFile as error:
        warn(f"{path} is damaged ({error}) and is encoded again")
        return False
    return True


def _open(path: Path, facts: dict[str, str]) -> TensorFile:
    """Open a file of the cache; raises DamagedFile, and ConfigError when it holds something else than it should."""
    file = TensorFile(path)
    refuse_others(path, file.facts, facts | {"file": path.name}, _WORDS)
    return file
