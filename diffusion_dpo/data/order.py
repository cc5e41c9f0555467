"""The order of samples and their randomness, without state: everything is a function of (seed, epoch, example).

A resumed run is therefore the same run (bit for bit on a CPU with as many threads), and neither the micro-batch size
nor where a run was stopped changes which image meets which noise.
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
    """One example at one moment of training: its index, and how often the data was gone through before."""

    index: int
    epoch: int


@functools.lru_cache(maxsize=2)
def global_batch(
    seed: int,
    num_examples: int,
    global_batch_size: int,
    step: int,
    *,
    num_stages: int = 1,
    steps_per_stage: int = 1,
) -> tuple[Visit, ...]:
    """Return the visits of an optimizer step (from 0). Epochs follow one another without a gap or a short batch.

    With `num_stages` above 1, stage k of n draws from the first k / n of the examples only, which is a curriculum if
    they are sorted; the last stage has all of them and no end.
    """
    first_step = first_epoch = 0
    pool = num_examples
    for stage in range(1, num_stages):
        pool = -(-num_examples * stage // num_stages)
        if step < first_step + steps_per_stage:
            break
        first_step += steps_per_stage
        first_epoch += -(-steps_per_stage * global_batch_size // pool)
        pool = num_examples
    start = (step - first_step) * global_batch_size
    visits = []
    for position in range(start, start + global_batch_size):
        epoch = first_epoch + position // pool
        visits.append(Visit(int(_order(seed, epoch, pool)[position % pool]), epoch))
    return tuple(visits)


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


@dataclass(frozen=True)
class Randomness:
    """The random numbers of B visits. Drawn once per *example*: the two images of a pair share all of them."""

    noise: "Tensor"
    """(B, C, h, w), float32."""
    timestep_uniform: "Tensor"
    """(B,), [0, 1); the model maps it to a timestep."""
    drop_prompt: "Tensor"
    """(B,), bool: train this visit with the empty prompt."""
    flip: "Tensor"
    """(B,), bool: mirror all images of the example."""


def draw_randomness(
    seed: int,
    visits: Sequence[Visit],
    keys: Sequence[str],
    latent_shape: tuple[int, int, int],
    *,
    prompt_dropout: float,
    random_flip: bool,
) -> Randomness:
    """Draw the randomness of some visits, on the CPU, each from its own generator keyed by (seed, epoch, key).

    `keys[i]` names the example of `visits[i]`: the pair id, for pairs.
    """
    import torch

    noise, uniform = [], []
    for visit, name in zip(visits, keys, strict=True):
        key = json.dumps([seed, visit.epoch, name]).encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
        uniform.append(torch.rand(3, generator=generator))
        noise.append(torch.randn(latent_shape, generator=generator))
    timestep, dropout, flip = torch.stack(uniform).unbind(1)
    return Randomness(
        noise=torch.stack(noise),
        timestep_uniform=timestep,
        drop_prompt=dropout < prompt_dropout,
        flip=(flip < 0.5) & random_flip,
    )
