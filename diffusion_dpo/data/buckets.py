"""Shapes that images are trained in. A bucket is a size (width, height) in px; squares are the case of one bucket.

An image is scaled to cover its bucket, without distortion, and cropped in the middle. Both images of a pair are in one
bucket. The idea is NovelAI's aspect-ratio bucketing; the offsets are those that SDXL is conditioned on (arXiv
2307.01952, section 2.2), counted as in the training script of diffusers.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from diffusion_dpo.config import ConfigError

Size = tuple[int, int]
_MAX_ASPECT = 2


def make_buckets(resolution_px: int, step_px: int) -> list[Size]:
    """Return the sizes, by rising width, whose sides are multiples of `step_px` and that no other such size covers.

    Aspects are from 1/2 to 2, areas `resolution_px` squared at most; that square is one of them.

    Raises ConfigError when the resolution is no multiple of the step.
    """
    if resolution_px % step_px:
        raise ConfigError(
            f"resolution_px is {resolution_px}, and with aspect_ratio_buckets it must be a multiple of bucket_step_px "
            f"= {step_px}"
        )
    found: list[Size] = []
    for width in range(2 * resolution_px, 0, -step_px):
        height = min(resolution_px**2 // width, _MAX_ASPECT * width) // step_px * step_px
        if _MAX_ASPECT * height >= width and (not found or height > found[-1][1]):
            found.append((width, height))
    return found[::-1]


def choose_buckets(buckets: Sequence[Size], chosen_px: np.ndarray, rejected_px: np.ndarray) -> np.ndarray:
    """Return the number of every pair's bucket, int16 (N,): the nearest to the geometric mean of its images' aspects.

    `chosen_px` and `rejected_px` are (width, height), (N, 2); (0, 0) for a side that is not there, which has no say.
    Near is meant in log aspect, and a tie goes to the narrower bucket.
    """
    if len(buckets) == 1:
        return np.zeros(len(chosen_px), dtype=np.int16)
    product = np.ones(len(chosen_px))
    there = np.zeros(len(chosen_px))
    for sizes in (chosen_px, rejected_px):
        width, height = np.maximum(sizes, 1).T
        product *= width / height
        there += sizes[:, 0] > 0
    log_aspect = np.log(product) / np.maximum(there, 1)
    log_buckets = np.log([width / height for width, height in buckets])
    borders = (log_buckets[1:] + log_buckets[:-1]) / 2
    return np.searchsorted(borders, log_aspect).astype(np.int16)


def crop_box(size_px: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the largest part of an image's middle that has the bucket's shape."""
    width, height = size_px
    if width * bucket[1] > height * bucket[0]:
        part: tuple[float, float] = (height * bucket[0] / bucket[1], height)
    else:
        part = (width, width * bucket[1] / bucket[0])
    left, top = (width - part[0]) / 2, (height - part[1]) / 2
    return left, top, left + part[0], top + part[1]


def fit(image: Image.Image, bucket: Size) -> Image.Image:
    """Scale an image to cover a bucket and crop it in the middle: the one crop of every image."""
    if image.size == bucket:
        return image
    return image.resize(bucket, Image.Resampling.LANCZOS, box=crop_box(image.size, bucket))


def crop_offsets(sizes_px: np.ndarray, buckets_px: np.ndarray) -> np.ndarray:
    """Return (top, left) of the crop, int64 (N, 2), in px of the scaled image.

    `sizes_px` are (width, height) of images and `buckets_px` of their buckets, (N, 2).
    """
    sizes, buckets = sizes_px.astype(np.int64), buckets_px.astype(np.int64)
    # Integers, as the script has them: the side that decides the scale fits, the other one is rounded down.
    is_wide = sizes[:, 0] * buckets[:, 1] > sizes[:, 1] * buckets[:, 0]
    width = np.where(is_wide, sizes[:, 0] * buckets[:, 1] // np.maximum(sizes[:, 1], 1), buckets[:, 0])
    height = np.where(is_wide, buckets[:, 1], sizes[:, 1] * buckets[:, 0] // np.maximum(sizes[:, 0], 1))
    left, top = np.rint((width - buckets[:, 0]) / 2), np.rint((height - buckets[:, 1]) / 2)
    return np.stack([top, left], axis=1).astype(np.int64)
