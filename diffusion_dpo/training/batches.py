"""Batches: which images, which noise, which timesteps. Everything is read from the latent cache.

What step k trains on is a function of the settings and k, so nothing has to be remembered, and any process can read
any batch.
"""

import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_dpo.data.cache import LatentCache
from diffusion_dpo.data.examples import Example
from diffusion_dpo.data.order import Randomness, Visit, draw_randomness, global_batch
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.errors import Batch

if TYPE_CHECKING:
    from torch import Tensor


_BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1, to which the end of a range may round up."""


@dataclass(frozen=True)
class Reader:
    """Reads the micro-batches of a run, on the CPU: `reader[step, number]`, both from 0."""

    config: TrainConfig
    model: LoadedModel
    examples: Sequence[Example]
    cache: LatentCache
    latent_shape: tuple[int, int, int]

    def visits(self, step: int) -> tuple[Visit, ...]:
        """Return which examples an optimizer step trains on."""
        config = self.config
        num_stages = config.curriculum_stages if config.order == "curriculum" else 1
        return global_batch(
            config.seed,
            len(self.examples),
            config.global_batch_size,
            step,
            num_stages=num_stages,
            steps_per_stage=config.curriculum_steps,
        )

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        """Return a micro-batch of a step."""
        step, number = place
        size = self.config.per_device_batch_size
        return self.read(self.visits(step)[number * size : (number + 1) * size])

    def read(self, visits: Sequence[Visit]) -> Batch:
        """Return some visits as a batch, with their noise, timesteps, dropout and flips."""
        config = self.config
        random = draw_randomness(
            config.seed,
            visits,
            [self.examples[visit.index].key for visit in visits],
            self.latent_shape,
            prompt_dropout=config.prompt_dropout,
            random_flip=config.random_flip,
        )
        low, high = config.weighting.timestep_range
        uniform = (low + (high - low) * random.timestep_uniform).clamp(max=_BELOW_ONE)
        timesteps = self.model.sample_timesteps(uniform, config.weighting.num_timesteps)
        return gather([self.examples[visit.index] for visit in visits], random, timesteps, self.cache)

    def stream(self, first_step: int) -> Generator[Batch, None, None]:
        """Yield the micro-batches from a step on, read ahead by `dataloader_num_workers` processes."""
        from torch.utils.data import DataLoader

        config = self.config
        places = itertools.product(range(first_step, config.max_steps), range(config.gradient_accumulation_steps))
        workers = config.dataloader_num_workers
        yield from DataLoader(
            self,  # type: ignore[arg-type]
            batch_size=None,
            sampler=places,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
        )


def gather(examples: Sequence[Example], random: Randomness, timesteps: "Tensor", cache: LatentCache) -> Batch:
    """Return B examples of K images each, with given randomness, as a batch."""
    import torch

    images = [image for example in examples for image in example.images]
    num_images = len(images) // len(examples)
    flip = random.flip.repeat_interleave(num_images)
    latents, masks = cache.latents(images, flip.tolist()), cache.masks(images, flip.tolist())

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
    )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and `kill` reach a whole process group; it is the training process that stops in order."""
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
