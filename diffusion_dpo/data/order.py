"""The order of samples and their randomness, without state: everything is a function of (seed, epoch, pair id).

A resumed run is therefore the same run (bit for bit on a CPU with as many threads), and neither the micro-batch size
nor where a run was stopped changes which pair meets which noise.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Visit:
    """One pair at one moment of training: its index in the data, and how often it was seen before."""

    index: int
    epoch: int


def global_batch(seed: int, num_pairs: int, global_batch_size: int, step: int) -> list[Visit]:
    """Return the visits of an optimizer step (from 0). Epochs follow one another without a gap or a short batch."""
    start = step * global_batch_size
    positions = range(start, start + global_batch_size)
    return [Visit(int(_order(seed, p // num_pairs, num_pairs)[p % num_pairs]), p // num_pairs) for p in positions]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_pairs: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


@dataclass(frozen=True)
class PairRandomness:
    """The random numbers of B visits. Drawn once per *pair*: its two images share all of them."""

    noise: "Tensor"
    """(B, C, h, w), float32."""
    timestep_uniform: "Tensor"
    """(B,), [0, 1); the model maps it to a timestep."""
    drop_prompt: "Tensor"
    """(B,), bool: train this visit with the empty prompt."""
    flip: "Tensor"
    """(B,), bool: mirror both images."""


def draw_randomness(
    seed: int,
    visits: Sequence[Visit],
    pair_ids: Sequence[str],
    latent_shape: tuple[int, int, int],
    *,
    prompt_dropout: float,
    random_flip: bool,
) -> PairRandomness:
    """Draw the randomness of some visits, on the CPU, each from its own generator keyed by (seed, epoch, pair id)."""
    import torch

    noise, uniform = [], []
    for visit in visits:
        key = json.dumps([seed, visit.epoch, pair_ids[visit.index]]).encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
        uniform.append(torch.rand(3, generator=generator))
        noise.append(torch.randn(latent_shape, generator=generator))
    timestep, dropout, flip = torch.stack(uniform).unbind(1)
    return PairRandomness(
        noise=torch.stack(noise),
        timestep_uniform=timestep,
        drop_prompt=dropout < prompt_dropout,
        flip=(flip < 0.5) & random_flip,
    )
