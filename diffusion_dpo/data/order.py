"""The order of samples and their randomness, without state: everything is a function of (seed, epoch, example).

A resumed run is therefore the same run (bit for bit on a CPU with as many threads), and neither the micro-batch size
nor where a run was stopped changes which image meets which noise.
"""

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Visit:
    """One example at one moment of training: its index, and how often the data was gone through before."""

    index: int
    epoch: int


@dataclass(frozen=True, eq=False)
class Schedule:
    """Which examples every optimizer step trains on. Epochs follow one another without a gap or a short batch.

    With `num_stages` above 1, stage k of n draws from the first k / n of the examples only, which is a curriculum if
    they are sorted; the last stage has all of them and no end.

    With several `groups` (images of one shape each), every step takes its examples from one of them, each group gets
    its turn as often as its size says, evenly spread, and has epochs of its own.
    """

    seed: int
    groups: Sequence[np.ndarray]
    """The indices of the examples, by group; together all of them."""
    global_batch_size: int
    num_stages: int = 1
    steps_per_stage: int = 1
    _orders: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)
    """The last permutations that were needed: by group, then by epoch."""

    def visits(self, step: int) -> tuple[Visit, ...]:
        """Return the visits of an optimizer step (from 0)."""
        indices, epochs = self.batch(step)
        return tuple(Visit(int(index), int(epoch)) for index, epoch in zip(indices, epochs, strict=True))

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the same as arrays: indices of examples, and the epoch of each."""
        group, turn = (0, step) if len(self.groups) == 1 else _turn(self.seed, tuple(map(len, self.groups)), step)
        members = self.groups[group]
        first_turn = first_epoch = 0
        pool = len(members)
        for stage in range(1, self.num_stages):
            pool = -(-len(members) * stage // self.num_stages)
            if turn < first_turn + self.steps_per_stage:
                break
            first_turn += self.steps_per_stage
            first_epoch += -(-self.steps_per_stage * self.global_batch_size // pool)
            pool = len(members)
        start = (turn - first_turn) * self.global_batch_size
        epochs, places = np.divmod(np.arange(start, start + self.global_batch_size), pool)
        epochs += first_epoch
        indices = np.empty(self.global_batch_size, np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            indices[of_epoch] = members[self._order(group, int(epoch), pool)[places[of_epoch]]]
        return indices, epochs

    def _order(self, group: int, epoch: int, num_examples: int) -> np.ndarray:
        known = self._orders.setdefault(group, {})
        if epoch not in known:
            for old in [other for other in known if other < epoch - 1]:
                del known[old]
            key = [self.seed, epoch, group] if group else [self.seed, epoch]
            known[epoch] = np.random.default_rng(key).permutation(np.arange(num_examples, dtype=np.int32))
        return known[epoch]


def _turn(seed: int, sizes: tuple[int, ...], step: int) -> tuple[int, int]:
    """Return which group has a step, and how many steps it had before."""
    groups, turns = _turns(seed, sizes, 1 << (step + len(sizes) + 1).bit_length())
    return int(groups[step]), int(turns[step])


@functools.lru_cache(maxsize=2)
def _turns(seed: int, sizes: tuple[int, ...], horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the groups of the first steps, `horizon` - len(sizes) of them at least, and the count of each so far.

    The k-th turn of a group with the share w of the examples is at the time (k + phase) / w; turns are taken in the
    order of their times. A longer horizon has the same beginning.
    """
    phases = np.random.default_rng([seed, len(sizes)]).random(len(sizes))
    times, groups, turns = [], [], []
    for group, (size, phase) in enumerate(zip(sizes, phases, strict=True)):
        share = size / sum(sizes)
        number = np.arange(max(0, math.ceil(horizon * share - phase)))
        times.append((number + phase) / share)
        groups.append(np.full(len(number), group))
        turns.append(number)
    order = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(groups)[order], np.concatenate(turns)[order]


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
