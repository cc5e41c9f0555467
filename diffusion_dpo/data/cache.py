"""The latent cache: training steps read nothing else, and no step decodes or encodes an image.

VAE latents of both sides of every pair, its mask, and the text embedding of every distinct prompt, in safetensors
files that are memory-mapped. Each file is written whole or not at all, so an interrupted build goes on where it
stopped. The folder's name is a hash of everything that decides the content.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffusion_dpo.console import progress, say, warn
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import decode_rgb, middle_square
from diffusion_dpo.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PAIRS_PER_FILE = 256
PROMPTS_PER_FILE = 1024
_VERSION = 1


@dataclass(frozen=True)
class Encoders:
    """What turns images and prompts into what the denoiser sees; the model's own methods."""

    images: "Callable[[Tensor, Tensor], Tensor]"
    """(B, 3, H, W) in [-1, 1] and posterior noise (B, C, h, w) -> latents (B, C, h, w), float32."""
    prompts: "Callable[[Sequence[str]], dict[str, Tensor]]"
    """Prompts -> named tensors with leading dimension len(prompts), float32."""
    fingerprint: str
    latent_shape: tuple[int, int, int]
    resolution_px: int
    dtype: "torch.dtype"
    """Storage format: float32, or float16 where the frozen parts are half precision."""
    batch_size: int = 8
    """Pairs that are encoded at once."""


class LatentCache:
    """Read access: latents of pairs and conditioning of prompts, by index."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        """Open a built cache; `prompts[i]` is the prompt of pair i."""
        self._folder = folder
        self._prompt_index = {text: i for i, text in enumerate(_distinct(prompts))}
        self._prompts = list(prompts)
        self._open: dict[str, Any] = {}
        self._is_masked = "masks" in self._file("pairs-00000").keys()  # noqa: SIM118 - a safetensors handle, no dict

    @property
    def name(self) -> str:
        """A hash of everything that decides the content."""
        return self._folder.name

    def latents(self, images: Sequence[tuple[int, int]], flip: Sequence[bool]) -> "Tensor":
        """Return the latents (N, C, h, w), float32, of images, each named by its pair and its side: 0 is chosen."""
        import torch

        rows = [
            self._row(f"pairs-{pair // PAIRS_PER_FILE:05d}", "latents", pair % PAIRS_PER_FILE)[int(mirrored), side]
            for (pair, side), mirrored in zip(images, flip, strict=True)
        ]
        return torch.stack(rows).float()

    def masks(self, images: Sequence[tuple[int, int]], flip: Sequence[bool]) -> "Tensor | None":
        """Return how much each latent position counts, (N, 1, h, w), mean 1 each; None where no pair has a mask."""
        import torch

        if not self._is_masked:
            return None
        rows = [
            self._row(f"pairs-{pair // PAIRS_PER_FILE:05d}", "masks", pair % PAIRS_PER_FILE)[int(mirrored)]
            for (pair, _), mirrored in zip(images, flip, strict=True)
        ]
        return torch.stack(rows)[:, None]

    def conditioning(self, indices: Sequence[int], drop: Sequence[bool]) -> "dict[str, Tensor]":
        """Return the conditioning of the pairs' prompts, float32; of the empty prompt where `drop` is true."""
        import torch

        wanted = [
            self._prompt_index["" if dropped else self._prompts[i]] for i, dropped in zip(indices, drop, strict=True)
        ]
        file = f"prompts-{wanted[0] // PROMPTS_PER_FILE:05d}"
        return {
            name: torch.stack(
                [self._row(f"prompts-{i // PROMPTS_PER_FILE:05d}", name, i % PROMPTS_PER_FILE) for i in wanted]
            ).float()
            for name in self._file(file).keys()  # noqa: SIM118 - a safetensors handle, not a dict
        }

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self._open:
            self._open[name] = safe_open(self._folder / f"{name}.safetensors", "pt")
        return self._open[name]

    def _row(self, file: str, tensor: str, row: int) -> "Tensor":
        return self._file(file).get_slice(tensor)[row : row + 1][0]


def build(
    root: Path,
    pairs: Iterable[PreferencePair],
    pair_ids: Sequence[str],
    prompts: Sequence[str],
    encoders: Encoders,
    *,
    random_flip: bool,
    masked: bool = False,
) -> LatentCache:
    """Encode what is not cached yet under `root` and return the open cache.

    `pairs` yields the pairs of `pair_ids`, in that order; it is read only when something is missing. `masked` says
    whether any of them has a mask.
    """
    folder = root / _key(pair_ids, prompts, encoders, random_flip=random_flip)
    folder.mkdir(parents=True, exist_ok=True)
    texts = _distinct(prompts)
    num_files = -(-len(pair_ids) // PAIRS_PER_FILE)
    missing = {number for number in range(num_files) if not _whole(folder / f"pairs-{number:05d}.safetensors")}
    if missing:
        todo = sum(min(PAIRS_PER_FILE, len(pair_ids) - number * PAIRS_PER_FILE) for number in missing)
        say(f"cache: encoding {todo} pairs and {len(texts)} prompts at {encoders.resolution_px} px into {folder}")
        _encode_pairs(folder, pairs, missing, todo, encoders, random_flip=random_flip, masked=masked)
    else:
        say(f"cache: {len(pair_ids)} pairs at {encoders.resolution_px} px are encoded already in {folder}")
    for number in range(-(-len(texts) // PROMPTS_PER_FILE)):
        path = folder / f"prompts-{number:05d}.safetensors"
        if not _whole(path):
            _encode_prompts(path, texts[number * PROMPTS_PER_FILE : (number + 1) * PROMPTS_PER_FILE], encoders)
    return LatentCache(folder, prompts)


def to_square(image: Image.Image, side_px: int) -> Image.Image:
    """Cut out the largest square in the middle and scale it to `side_px`: the one crop of every image."""
    if image.size == (side_px, side_px):
        return image
    return image.resize((side_px, side_px), Image.Resampling.LANCZOS, box=middle_square(image.size))


def _encode_pairs(
    folder: Path,
    pairs: Iterable[PreferencePair],
    missing: set[int],
    todo: int,
    encoders: Encoders,
    *,
    random_flip: bool,
    masked: bool,
) -> None:
    import torch
    from safetensors.torch import save_file

    stream = iter(pairs)
    with progress("cache", todo, "pairs") as advance:
        for number in range(max(missing) + 1):
            file_pairs = list(islice(stream, PAIRS_PER_FILE))
            if number not in missing:
                continue
            latents = []
            for start in range(0, len(file_pairs), encoders.batch_size):
                batch = file_pairs[start : start + encoders.batch_size]
                latents.append(_encode_batch(batch, encoders, random_flip=random_flip))
                advance(len(batch))
            tensors = {"latents": torch.cat(latents)}
            if masked:
                masks = [_encode_mask(pair.mask, encoders, random_flip=random_flip) for pair in file_pairs]
                tensors["masks"] = torch.stack(masks)
            with atomic_path(folder / f"pairs-{number:05d}.safetensors") as partial:
                save_file(tensors, partial)


def _encode_batch(batch: Sequence[PreferencePair], encoders: Encoders, *, random_flip: bool) -> "Tensor":
    """Return latents (B, 1 or 2 mirrored, 2 sides, C, h, w) in the storage format; zeros for a side not there."""
    import torch

    noise = torch.stack([_posterior_noise(pair, encoders.latent_shape) for pair in batch])
    sides = []
    for side in ("chosen", "rejected"):
        there = [i for i, pair in enumerate(batch) if getattr(pair, side)]
        encoded = torch.zeros(len(batch), 1 + random_flip, *encoders.latent_shape)
        if there:
            images = [to_square(decode_rgb(getattr(batch[i], side)), encoders.resolution_px) for i in there]
            array = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            pixels = array.permute(0, 3, 1, 2).float() / 127.5 - 1
            views = [pixels, pixels.flip(3)] if random_flip else [pixels]
            encoded[there] = torch.stack([encoders.images(view, noise[there]).cpu() for view in views], dim=1)
        sides.append(encoded)
    return torch.stack(sides, dim=2).to(encoders.dtype)


def _encode_mask(data: bytes, encoders: Encoders, *, random_flip: bool) -> "Tensor":
    """Return (1 or 2 mirrored, h, w), float32, mean 1: white over each position; ones where there is no mask."""
    import torch

    height, width = encoders.latent_shape[1:]
    mask = torch.ones(height, width)
    if data:
        image = decode_rgb(data).convert("F")
        small = image.resize((width, height), Image.Resampling.BOX, box=middle_square(image.size))
        mask = torch.from_numpy(np.array(small))
        mask = mask / mask.mean()
    return torch.stack([mask, mask.flip(1)] if random_flip else [mask])


def _posterior_noise(pair: PreferencePair, shape: tuple[int, int, int]) -> "Tensor":
    """The noise that samples the VAE's posterior: one for both images of a pair, so equal images stay equal."""
    import torch

    seed = int.from_bytes(hashlib.sha256(pair.pair_id.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _encode_prompts(path: Path, texts: Sequence[str], encoders: Encoders) -> None:
    import torch
    from safetensors.torch import save_file

    size = 32
    parts = [encoders.prompts(texts[start : start + size]) for start in range(0, len(texts), size)]
    joined = {name: torch.cat([part[name].cpu() for part in parts]).to(encoders.dtype) for name in parts[0]}
    with atomic_path(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in joined.items()}, partial)


def _distinct(prompts: Sequence[str]) -> list[str]:
    """The empty prompt first (for prompt dropout), then every prompt once, in order of appearance."""
    return list(dict.fromkeys(["", *prompts]))


def _whole(path: Path) -> bool:
    """Whether a file of the cache is there and complete; a damaged one is named and made again."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return False
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError as error:
        warn(f"{path} is damaged ({error}) and is encoded again")
        return False


def _key(pair_ids: Sequence[str], prompts: Sequence[str], encoders: Encoders, *, random_flip: bool) -> str:
    facts = [
        _VERSION,
        encoders.fingerprint,
        encoders.resolution_px,
        str(encoders.dtype),
        encoders.latent_shape,
        random_flip,
        list(pair_ids),
        list(prompts),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
