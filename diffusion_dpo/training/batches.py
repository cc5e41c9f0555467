"""Batches: which images, which noise, which timesteps. Everything is read from the latent cache.

What step k trains on is a function of the settings and k, so nothing has to be remembered, and any process can read
any batch.
"""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.cache import LatentCache
from diffusion_dpo.data.examples import Example
from diffusion_dpo.data.order import Randomness, Schedule, Visit, draw_randomness
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.errors import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_dpo.training.reference import CachedErrors


_BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1, to which the end of a range may round up."""


@dataclass(frozen=True)
class Reader:
    """Reads the micro-batches of a run, on the CPU: `reader[step, number]`, both from 0."""

    config: TrainConfig
    model: LoadedModel
    examples: Sequence[Example]
    cache: LatentCache
    first_pairs: np.ndarray
    """The pair that each example's first image is of, int64 (N,)."""
    processes: Processes = field(default_factory=Processes)
    cached: "CachedErrors | None" = None
    """The reference's errors, where they are computed beforehand."""

    @cached_property
    def group_of(self) -> np.ndarray:
        """The group of each example: those of one have latents of one shape, and can be in one batch."""
        if len(self.cache.shapes) == 1:
            return np.zeros(len(self.examples), np.int16)
        return self.cache.bucket_of[self.first_pairs]

    @cached_property
    def schedule(self) -> Schedule:
        """Which examples each optimizer step trains on."""
        config = self.config
        return Schedule(
            config.seed,
            [np.flatnonzero(self.group_of == group) for group in np.unique(self.group_of)],
            config.global_batch_size,
            num_stages=config.curriculum_stages if config.order == "curriculum" else 1,
            steps_per_stage=config.curriculum_steps,
        )

    @property
    def num_micro_batches(self) -> int:
        """How many of a step's micro-batches are this process's."""
        return self.config.global_batch_size // (self.config.per_device_batch_size * self.processes.count)

    def places(self, number: int) -> slice:
        """Return which of a step's examples the n-th micro-batch of this process holds."""
        size = self.config.per_device_batch_size
        start = (number * self.processes.count + self.processes.rank) * size
        return slice(start, start + size)

    def visits(self, step: int) -> tuple[Visit, ...]:
        """Return which examples an optimizer step trains on."""
        return self.schedule.visits(step)

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        """Return one of this process's micro-batches of a step."""
        step, number = place
        return self.read(self.visits(step)[self.places(number)])

    def read(self, visits: Sequence[Visit]) -> Batch:
        """Return some visits as a batch."""
        if self.cached is None:
            return self.draw(visits)
        import torch

        draws = [self.cached.draw_of(visit) for visit in visits]
        return replace(self.draw(draws), reference=torch.from_numpy(self.cached.of(draws)))

    def draw(self, visits: Sequence[Visit]) -> Batch:
        """Return some visits with their own noise, timesteps, dropout and flips."""
        config = self.config
        examples = [self.examples[visit.index] for visit in visits]
        random = draw_randomness(
            config.seed,
            visits,
            [example.key for example in examples],
            self.cache.shapes[self.group_of[visits[0].index]],
            prompt_dropout=config.prompt_dropout,
            random_flip=config.random_flip,
        )
        low, high = config.weighting.timestep_range
        uniform = (low + (high - low) * random.timestep_uniform).clamp(max=_BELOW_ONE)
        timesteps = self.model.sample_timesteps(uniform, config.weighting.num_timesteps)
        return gather(examples, random, timesteps, self.cache, self.model)

    def stream(self, first_step: int) -> Generator[Batch, None, None]:
        """Yield this process's micro-batches from a step on, read ahead by `dataloader_num_workers` processes."""
        from torch.utils.data import DataLoader

        config = self.config
        places = itertools.product(range(first_step, config.max_steps), range(self.num_micro_batches))
        workers = config.dataloader_num_workers
        for found in DataLoader(
            _Told(self),  # type: ignore[arg-type]
            batch_size=None,
            sampler=places,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=self.model.device.type == "cuda",
        ):
            if isinstance(found, ConfigError):
                raise found
            yield found


@dataclass(frozen=True)
class _Told:
    """Returns what the user has to be told instead of raising it, which a worker would wrap in its traceback."""

    reader: Reader

    def __getitem__(self, place: tuple[int, int]) -> Batch | ConfigError:
        try:
            return self.reader[place]
        except ConfigError as error:
            return error


def gather(
    examples: Sequence[Example], random: Randomness, timesteps: "Tensor", cache: LatentCache, model: LoadedModel
) -> Batch:
    """Return B examples of K images each, of one shape, with given randomness, as a batch."""
    import torch

    images = [image for example in examples for image in example.images]
    num_images = len(images) // len(examples)
    flip = random.flip.repeat_interleave(num_images)
    latents, masks = cache.latents(images, flip.tolist()), cache.masks(images, flip.tolist())
    per_image = model.image_conditioning(cache.sizes(images))

    def column(values: Sequence[object]) -> "Tensor":
        return torch.tensor(values, dtype=torch.float32)

    return Batch(
        latents=latents.view(len(examples), num_images, *latents.shape[1:]),
        noise=random.noise,
        timesteps=timesteps,
        conditioning=cache.conditioning([example.images[0][0] for example in examples], random.drop_prompt.tolist()),
        labels=column([example.labels for example in examples]),
        weights=column([example.weight for example in examples]),
        masks=None if masks is None else masks.view(len(examples), num_images, 1, *masks.shape[2:]),
        scores=column([example.scores for example in examples]) if examples[0].scores else None,
        per_image={name: value.view(len(examples), num_images, *value.shape[1:]) for name, value in per_image.items()},
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and `kill` reach a whole process group; it is the training process that stops in order."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
