"""A diffusion model whose optimal denoiser is known: mixtures of Gaussians in one dimension, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion_dpo.losses.weighting import PredictionType


@dataclass(frozen=True)
class Mixture:
    """Weights (need not add up to 1), means and variances, each (components,)."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def tilt(self, slope: float) -> "Mixture":
        """The mixture whose density is proportional to this one's times exp(slope x)."""
        factor = torch.exp(slope * self.means + slope**2 * self.variances / 2)
        return Mixture(self.weights * factor, self.means + slope * self.variances, self.variances)

    def log_density(self, x: Tensor) -> Tensor:
        return self._log_terms(x, torch.ones_like(x), torch.zeros_like(x)).logsumexp(-1)

    def denoise(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The mean of x_0 given x_t; all arguments (N,)."""
        share = self._log_terms(noisy, alpha, sigma).softmax(-1)
        noisy, alpha, sigma = noisy[:, None], alpha[:, None], sigma[:, None]
        pull = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        return (share * (self.means + pull * (noisy - alpha * self.means))).sum(-1)

    def _log_terms(self, noisy: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Logarithms of weight times density of x_t, for every component: (N, components)."""
        variance = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        square = (noisy[:, None] - alpha[:, None] * self.means) ** 2 / variance
        return (self.weights / self.weights.sum()).log() - (square + (2 * torch.pi * variance).log()) / 2


class AnalyticModel:
    """As much of a LoadedModel as errors need: optimal denoisers of two mixtures, on latents of shape (N, 1, 1, 1)."""

    def __init__(
        self,
        policy: Mixture,
        reference: Mixture,
        prediction_type: PredictionType = "epsilon",
        log_snr: Tensor | None = None,
    ) -> None:
        """`log_snr` is the schedule, falling; null takes Stable Diffusion's."""
        self.scheduler = DDPMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=prediction_type
        )
        if log_snr is not None:
            self.scheduler.alphas_cumprod = log_snr.sigmoid()
        self.prediction_type = prediction_type
        self.policy, self.other = policy, reference

    @property
    def num_timesteps(self) -> int:
        return len(self.scheduler.alphas_cumprod)

    def log_snr(self, timesteps: Tensor) -> Tensor:
        alpha_squared = self.scheduler.alphas_cumprod.double()[timesteps]
        return (alpha_squared / (1 - alpha_squared)).log()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "sample":
            return latents
        return noise if self.prediction_type == "epsilon" else self.scheduler.get_velocity(latents, noise, timesteps)

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        alpha_squared = self.scheduler.alphas_cumprod.double()[timesteps]
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noisy = noisy_latents.flatten()
        clean = self.policy.denoise(noisy, alpha, sigma)
        epsilon = (noisy - alpha * clean) / sigma
        predictions = {"sample": clean, "epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * clean}
        return predictions[self.prediction_type].view_as(noisy_latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.policy, self.other = self.other, self.policy
        with torch.no_grad():
            yield
        self.policy, self.other = self.other, self.policy
