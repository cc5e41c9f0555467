"""From images and masks to the tensors of one file of the latent cache; prompts likewise."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.buckets import Size, crop_box, fit
from diffusion_dpo.data.images import decode_rgb

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SIDES = ("chosen", "rejected")
_PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class Encoders:
    """What turns images and prompts into what the denoiser sees; the model's own methods."""

    images: "Callable[[Tensor, Tensor], Tensor]"
    """(B, 3, H, W) in [-1, 1] and posterior noise (B, C, h, w) -> latents (B, C, h, w), float32."""
    prompts: "Callable[[Sequence[str]], dict[str, Tensor]]"
    """Prompts -> named tensors with leading dimension len(prompts), float32."""
    fingerprint: str
    latent_channels: int
    downscale: int
    """Pixels per latent element along one side."""
    resolution_px: int
    dtype: "torch.dtype"
    """Storage format: float32, or float16 where the frozen parts are half precision."""
    batch_size: int = 8
    """Pairs that are encoded at once."""

    def latent_shape(self, size_px: Size) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image of (width, height)."""
        return self.latent_channels, size_px[1] // self.downscale, size_px[0] // self.downscale


def encode_pairs(
    rows: Iterable[tuple[PreferencePair, int]],
    encoders: Encoders,
    buckets: Sequence[Size],
    *,
    random_flip: bool,
    masked: bool,
    advance: Callable[[int], None],
) -> "dict[str, Tensor]":
    """Return the tensors of one file: per bucket the latents, and masks, of its pairs in their order."""
    import torch

    waiting: dict[int, list[PreferencePair]] = defaultdict(list)
    parts: dict[str, list[Tensor]] = defaultdict(list)

    def encode(bucket: int) -> None:
        batch, size = waiting.pop(bucket), buckets[bucket]
        parts[tensor_name("latents", size)].append(_encode_batch(batch, size, encoders, random_flip=random_flip))
        if masked:
            masks = [_encode_mask(pair, size, encoders, random_flip=random_flip) for pair in batch]
            parts[tensor_name("masks", size)].append(torch.stack(masks))
        advance(len(batch))

    for pair, bucket in rows:
        waiting[bucket].append(pair)
        if len(waiting[bucket]) == encoders.batch_size:
            encode(bucket)
    for bucket in list(waiting):
        encode(bucket)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def encode_prompts(texts: Sequence[str], encoders: Encoders) -> "dict[str, Tensor]":
    """Return the conditioning of prompts in the storage format, by name, each with a leading dimension len(texts)."""
    import torch

    starts = range(0, len(texts), _PROMPTS_AT_ONCE)
    parts = [encoders.prompts(texts[start : start + _PROMPTS_AT_ONCE]) for start in starts]
    return {name: torch.cat([part[name].cpu() for part in parts]).to(encoders.dtype) for name in parts[0]}


def tensor_name(what: str, size: Size) -> str:
    """Return the name, in a file, of the latents or masks of one bucket."""
    return f"{what} {size[0]}x{size[1]}"


def _encode_batch(batch: Sequence[PreferencePair], size: Size, encoders: Encoders, *, random_flip: bool) -> "Tensor":
    """Return latents (B, 1 or 2 mirrored, 2 sides, C, h, w) in the storage format; zeros for a side not there."""
    import torch

    shape = encoders.latent_shape(size)
    noise = torch.stack([posterior_noise(pair.pair_id, shape) for pair in batch])
    sides = []
    for side in SIDES:
        there = [i for i, pair in enumerate(batch) if getattr(pair, side)]
        encoded = torch.zeros(len(batch), 1 + random_flip, *shape)
        if there:
            images = [fit(decode_rgb(getattr(batch[i], side)), size) for i in there]
            array = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            pixels = array.permute(0, 3, 1, 2).float() / 127.5 - 1
            views = [pixels, pixels.flip(3)] if random_flip else [pixels]
            encoded[there] = torch.stack([encoders.images(view, noise[there]).cpu() for view in views], dim=1)
        sides.append(encoded)
    return torch.stack(sides, dim=2).to(encoders.dtype)


def _encode_mask(pair: PreferencePair, size: Size, encoders: Encoders, *, random_flip: bool) -> "Tensor":
    """Return (1 or 2 mirrored, h, w), float32, mean 1: white over each position; ones where there is no mask."""
    import torch

    height, width = encoders.latent_shape(size)[1:]
    mask = torch.ones(height, width)
    if pair.mask:
        image = decode_rgb(pair.mask).convert("F")
        small = image.resize((width, height), Image.Resampling.BOX, box=crop_box(image.size, size))
        mask = torch.from_numpy(np.array(small))
        if not mask.any():  # in a square it is a broken row; which bucket a pair gets depends on the settings
            raise ConfigError(
                f"{pair.where or pair.pair_id}: the mask is all black in the part of {size[0]} x {size[1]} px that is "
                "trained on; fix it, remove the pair, or set aspect_ratio_buckets=false"
            )
        mask = mask / mask.mean()
    return torch.stack([mask, mask.flip(1)] if random_flip else [mask])


def posterior_noise(pair_id: str, shape: tuple[int, int, int]) -> "Tensor":
    """The noise that samples the VAE's posterior: one for both images of a pair, so equal images stay equal."""
    import torch

    seed = int.from_bytes(hashlib.sha256(pair_id.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
