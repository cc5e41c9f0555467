"""What a run will need of memory, before anything is loaded: exact where it can be, and said where it is assumed.

Weights, gradients and optimizer state are counted from shapes. What a step, the VAE and the previews hold at most is
the peak of a simulation on fake tensors (skeleton.py). A run needs the most of its phases: it encodes the images, then
it trains, and in between it draws previews. `scripts/bench_memory_estimate.py` compares with what is measured.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from diffusion_dpo.losses import ListLoss, Loss
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.skeleton import Skeleton, StepBytes, read_skeleton

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GIB = 2**30
CUDA_BYTES = 0.7 * GIB
"""Assumed: what the driver's context, its kernels and the workspaces of cuBLAS and cuDNN take on a card."""
CUDA_FRAGMENTATION = 0.05
"""Assumed: the share of what tensors hold that the caching allocator keeps beside it and cannot use."""
CPU_HELD_BACK = 0.9
"""Measured with glibc (docs/performance.md): what its allocator keeps of freed blocks that lie between used ones, over
what a step holds without checkpointing. With checkpointing it keeps as much: the same blocks come and go."""
_FAR = 16
"""A peak is the largest of several that grow with the micro-batch, each along a line: between 1 and this size the
line through both is never too low."""
_FROM_THE_START = ("weights of the denoiser", "VAE and text encoders", "weight files that stay mapped")
_BLOCK = 256
"""bitsandbytes' block of 8-bit state, with one float32 for each."""
_SMALLEST_8BIT = 4096
"""Elements of the smallest tensor whose state bitsandbytes keeps in 8 bits."""


@dataclass(frozen=True)
class Estimate:
    """Bytes by part. `total` is the most of the phases, and not the sum of the parts."""

    parts: dict[str, float]
    """What is held while training, and at the peak of a step."""
    phases: dict[str, float]
    """What is held at most in each phase, all included."""

    @property
    def total(self) -> float:
        """Bytes that the run needs."""
        return max(self.phases.values())

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=self.phases.__getitem__)


@dataclass(frozen=True)
class Estimator:
    """Estimates for one model in one number format, whatever the settings that are not the model's."""

    skeleton: Skeleton
    process_bytes: float
    """What the process, or on a GPU its context, takes before any tensor."""
    counts: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """What was simulated already."""

    def estimate(self, config: TrainConfig, *, exact: bool = True) -> Estimate:
        """Return what a run with these settings needs; `config.model` is that of the estimator."""
        step, held = self.step(config, exact=exact), self.held(config)
        gradients = sum(map(_bytes, self.skeleton.trained()))
        counted = 0 if config.gradient_accumulation_steps > 1 else gradients
        beyond = step.peak - counted
        activations = min(step.saved, beyond)
        parts = {
            "the process itself": self.process_bytes,
            **held,
            "gradients": gradients,
            "saved activations": activations,
            "temporary workspace": beyond - activations,
        }
        if not self.skeleton.on_cuda:
            plain = self.step(config.model_copy(update={"gradient_checkpointing": False}), exact=exact)
            parts["freed, but held back"] = CPU_HELD_BACK * (plain.peak - counted)
        phases = {
            "training": sum(parts.values()) - self.process_bytes,
            "saving": sum(held.values()) + gradients + self._copies_to_save(config),
            "encoding": sum(held[name] for name in _FROM_THE_START) + self._encoding(config.per_device_batch_size),
        }
        if config.preview is not None:
            phases["drawing previews"] = sum(held.values()) + gradients + self._previews(config)
        slack = 1 + (CUDA_FRAGMENTATION if self.skeleton.on_cuda else 0)
        return Estimate(parts, {name: self.process_bytes + slack * value for name, value in phases.items()})

    def held(self, config: TrainConfig) -> dict[str, float]:
        """Return what is there all the time that a run trains, by part."""
        skeleton = self.skeleton
        trained = skeleton.trained()
        frozen = [*skeleton.vae.parameters(), *(p for text in skeleton.text_encoders for p in text.parameters())]
        files = [] if skeleton.on_cuda else [*skeleton.unet.parameters(), *skeleton.vae.parameters()]
        averages = (config.reference.type == "ema") + (config.ema_decay is not None)
        return {
            "weights of the denoiser": sum(map(_bytes, skeleton.unet.parameters())),
            "VAE and text encoders": sum(map(_bytes, frozen)),
            "weight files that stay mapped": sum(map(_bytes, filter(_is_kernel, files))),
            "frozen copy for the reference": _copy_bytes(config, skeleton),
            "optimizer state": OPTIMIZER_BYTES[config.optimizer](trained),
            "running averages": averages * sum(map(_bytes, trained)),
        }

    def largest_batch(self, config: TrainConfig, budget: float) -> int:
        """Return the largest per_device_batch_size of a run that fits `budget` bytes, 0 when none does.

        Of the sizes that divide global_batch_size.
        """
        sizes = [n for n in range(config.global_batch_size, 0, -1) if config.global_batch_size % n == 0]
        for size in sizes:
            changed = config.model_copy(update={"per_device_batch_size": size})
            if self.estimate(changed, exact=False).total <= budget:
                return size
        return 0

    def step(self, config: TrainConfig, *, exact: bool = True) -> StepBytes:
        """Return what a micro-batch holds; not `exact`: by two sizes that are counted once, and no less than it is."""
        num_images, size = images_per_example(config), config.per_device_batch_size

        def count(number: int) -> StepBytes:
            how, accumulates = config.gradient_checkpointing, config.gradient_accumulation_steps > 1
            found = self._counted("step", number * num_images, checkpointing=how, accumulates=accumulates)
            return cast(StepBytes, found)

        if exact or size == 1:
            return count(size)
        near, far = count(1), count(_FAR)
        share = (size - 1) / (_FAR - 1)
        return StepBytes(
            round(near.saved + share * (far.saved - near.saved)), round(near.peak + share * (far.peak - near.peak))
        )

    def _encoding(self, size: int) -> float:
        """The VAE holds as much for every image."""
        return float(min(8, size) * self._counted("encoding", 1, self.skeleton.resolution_px))

    def _copies_to_save(self, config: TrainConfig) -> float:
        """Files have kernels in another layout than channels_last, and AdamW two moments of each in one file."""
        kernels = sum(map(_bytes, filter(_is_kernel, self.skeleton.trained())))
        return 0 if self.skeleton.on_cuda else kernels * (2 if config.optimizer == "adamw" else 1)

    def _previews(self, config: TrainConfig) -> float:
        assert config.preview is not None
        sampling = config.preview.sampling
        num_images = min(sampling.batch_size, len(config.preview.prompts) or 4)
        side = sampling.resolution_px or self.skeleton.resolution_px
        guided = num_images * (2 if sampling.guidance_scale > 1 else 1)
        return float(max(self._counted("denoising", guided, side), num_images * self._counted("decoding", 1, side)))

    def _counted(self, what: str, *place: int, **settings: Any) -> Any:
        key = (what, *place, *settings.items())
        if key not in self.counts:
            self.counts[key] = getattr(self.skeleton, what)(*place, **settings)
        return self.counts[key]


def make_estimator(config: TrainConfig, device_type: str, dtype: "torch.dtype") -> Estimator:
    """Read the settings of a run's model; raises as `read_skeleton`."""
    on_cuda = device_type == "cuda"
    skeleton = read_skeleton(config, dtype, on_cuda=on_cuda)
    return Estimator(skeleton, CUDA_BYTES if on_cuda else _process_bytes())


def images_per_example(config: TrainConfig) -> int:
    """Return how many images one example of the objective has."""
    loss = cast(Loss, config.loss)
    if isinstance(loss, ListLoss):
        return loss.list_size
    return 2 if loss.unit == "pair" else 1


# --- what the optimizers keep ----------------------------------------------------------------------------------------


def _adamw(parameters: "Iterable[Tensor]") -> float:
    """Two float32 moments, and a step count per tensor."""
    return sum(8 * parameter.numel() + 4 for parameter in parameters)


def _adamw_8bit(parameters: "Iterable[Tensor]") -> float:
    """Two moments of a byte and their blocks' scales; small tensors stay in float32 (bitsandbytes)."""
    total = 0.0
    for parameter in parameters:
        size = parameter.numel()
        total += 8 * size if size < _SMALLEST_8BIT else 2 * (size + 4 * -(-size // _BLOCK))
    return total


def _adafactor(parameters: "Iterable[Tensor]") -> float:
    """Of two or more dimensions the means over either of the last two (arXiv 1804.04235), else one float32 moment.

    And a scale per tensor (transformers). A kernel of 3 x 3 is factored along its 3 x 3 and saves a third only.
    """
    total = 0
    for parameter in parameters:
        shape = parameter.shape
        rows, columns = shape[:-1].numel(), (*shape[:-2], *shape[-1:])
        total += 4 + 4 * (rows + math.prod(columns) if len(shape) >= 2 else parameter.numel())
    return total


OPTIMIZER_BYTES: "dict[str, Callable[[Iterable[Tensor]], float]]" = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adafactor": _adafactor,
}


# --- details ---------------------------------------------------------------------------------------------------------


def _needs_reference(config: TrainConfig) -> bool:
    return cast(Loss, config.loss).needs_reference or config.regularizers.needs_reference


def _copy_bytes(config: TrainConfig, skeleton: Skeleton) -> float:
    """The frozen copy of a whole UNet; layers that autocast rounds anyway are kept in its precision."""
    import torch

    model: Any = config.model
    if model.lora is not None or config.reference.type in ("cached", "ema") or not _needs_reference(config):
        return 0
    total = 0
    for module in skeleton.unet.modules():
        rounded = isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for parameter in module.parameters(recurse=False):
            total += parameter.numel() * (skeleton.dtype.itemsize if rounded else parameter.element_size())
    return total


def _is_kernel(tensor: "Tensor") -> bool:
    """Whether channels_last is another layout, so that a weight is a copy of what its file, still mapped, has."""
    return tensor.ndim == 4 and tensor.shape[2:].numel() > 1


def _bytes(tensor: "Tensor") -> int:
    return tensor.numel() * tensor.element_size()


def _process_bytes() -> float:
    """What this process takes now, with the libraries that training imports, and without a model."""
    import resource
    import sys

    # what training imports counts
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    from diffusers import StableDiffusionPipeline  # noqa: F401

    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
