"""A diffusion model whose optimum under DPO is known: Gaussian data, linear rewards, a denoiser that can only shift.

The reference is the exact denoiser of N(0, I). The policy is that of N(s delta, I) with trained shifts delta, one for
each part of the schedule, and s = +1 or -1 by the prompt. Pairs are drawn from the reference and labelled by a
Bradley-Terry judge of reward s a g.x, with the unit vector g of equal parts, so the best shift points along g.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from diffusion_dpo.data import PairSource, PreferencePair
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.models import DiffusionModel, LoadedModel
from diffusion_dpo.settings import PredictionType

PROMPTS = ("towards", "away")
_IMAGE_SIDE = 32
_SPAN = 6.0
"""Latents lie in [-6, 6): three bytes a number."""


class ShiftPairs(PairSource):
    """Pairs of side^2 Gaussian numbers, each stored in the three bytes of a pixel; the other pixels are black."""

    num_pairs: int = 16384
    side: int = 8
    slope: float = 1.0
    flip_share: float = 0.0

    def read(self) -> Iterator[PreferencePair]:
        rng = np.random.default_rng(0)
        size = self.side**2
        for number in range(self.num_pairs):
            first, second = rng.standard_normal((2, size))
            sign = 1 - 2 * (number % 2)
            reward = sign * self.slope * (first - second).sum() / size**0.5
            prefers_first = rng.random() < 1 / (1 + np.exp(-reward))
            flipped = rng.random() < self.flip_share
            images = (first, second) if prefers_first != flipped else (second, first)
            chosen, rejected = (_encode(values, self.side) for values in images)
            pair = make_pair(f"pair {number}", PROMPTS[number % 2], chosen, rejected, source="shift")
            assert isinstance(pair, PreferencePair)
            yield pair

    def num_rows(self) -> int:
        return self.num_pairs

    def stamp(self) -> str:
        """The settings decide every number, so that runs with one cache look at the pairs once."""
        return "seed 0"


def _encode(values: np.ndarray, side: int) -> bytes:
    levels = ((values + _SPAN) / (2 * _SPAN) * 2**24).clip(0, 2**24 - 1).astype(np.uint32)
    pixels = np.stack([levels >> 16, (levels >> 8) & 255, levels & 255], -1).astype(np.uint8)
    image = np.zeros((_IMAGE_SIDE, _IMAGE_SIDE, 3), np.uint8)
    image[:: _IMAGE_SIDE // side, :: _IMAGE_SIDE // side] = pixels.reshape(side, side, 3)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="BMP")  # a third of PNG's time
    return buffer.getvalue()


class ShiftDenoiser(DiffusionModel):
    """The model's settings."""

    side: int = 8
    prediction: PredictionType = "epsilon"
    num_parts: int = 1
    """Equal parts of the schedule, each with its own shift."""

    def load(self, *, device: torch.device, dtype: torch.dtype, seed: int) -> "LoadedShift":
        return LoadedShift(self)


class LoadedShift(LoadedModel):
    """The live model; in float32, on the CPU."""

    latent_channels = 1
    resolution_px = _IMAGE_SIDE
    pipeline: Any = None

    def __init__(self, settings: ShiftDenoiser) -> None:
        self.device = torch.device("cpu")
        self._side = settings.side
        self.prediction_type = settings.prediction
        self.base_hash = self.encoder_hash = "N(0, I)"
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.shift = torch.nn.Parameter(torch.zeros(settings.num_parts, 1, settings.side, settings.side))
        self._is_reference = False

    @property
    def downscale(self) -> int:
        return _IMAGE_SIDE // self._side

    def encode_images(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        images = images[:, :, :: self.downscale, :: self.downscale]
        levels = ((images + 1) * 127.5).round() * torch.tensor([65536.0, 256.0, 1.0]).view(1, 3, 1, 1)
        return levels.sum(1, keepdim=True) / 2**24 * 2 * _SPAN - _SPAN

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        signs = {PROMPTS[0]: 1.0, PROMPTS[1]: -1.0}
        return {"sign": torch.tensor([[signs.get(prompt, 0.0)] for prompt in prompts])}

    def image_conditioning(self, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def sample_timesteps(self, uniform: torch.Tensor, num_timesteps: int | None = None) -> torch.Tensor:
        assert num_timesteps is None
        return (uniform * len(self.scheduler)).long()

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.logit(self.scheduler.alphas_cumprod[timesteps])

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return noise
        return latents if self.prediction_type == "sample" else self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        squared = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        part = timesteps * len(self.shift) // len(self.scheduler)
        mean = conditioning["sign"].view(-1, 1, 1, 1) * self.shift[part] * (not self._is_reference)
        epsilon = sigma * (noisy_latents - alpha * mean)
        clean = (noisy_latents - sigma * epsilon) / alpha
        return {"epsilon": epsilon, "sample": clean, "v_prediction": alpha * epsilon - sigma * clean}[
            self.prediction_type
        ]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._is_reference = True
        with torch.no_grad():
            yield
        self._is_reference = False

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {"shift": self.shift}

    def freeze_copy(self) -> None:
        """The reference is frozen anyway."""

    def wrap_policy(self, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
        raise NotImplementedError

    def compile(self) -> None:
        raise NotImplementedError

    def enable_gradient_checkpointing(self, *, selective: bool) -> None:
        raise NotImplementedError

    def save(self, run_dir: Path) -> Path:
        (run_dir / "shift").mkdir()
        save_file({"shift": self.shift.detach()}, run_dir / "shift" / "shift.safetensors")
        return run_dir / "shift"
