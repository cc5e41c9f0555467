"""Weights of timesteps: which noise levels count, and in which space an error is measured.

With SNR = alpha_t^2 / sigma_t^2 and alpha_t^2 + sigma_t^2 = 1, for the same noisy latents,

    e_epsilon = alpha_t^2 e_v = SNR e_x0

so that to measure an error elsewhere than where the model predicts is itself a weight of timesteps. Weights multiply
the errors of policy and reference alike, and so beta: they decide how strongly each noise level is held to the
reference, not only how often it is heard.
"""

from typing import TYPE_CHECKING

from diffusion_dpo.settings import PredictionType, Weighting

if TYPE_CHECKING:
    from torch import Tensor


def error_weights(
    weighting: Weighting, prediction_type: PredictionType, log_snr: "Tensor", previous_log_snr: "Tensor"
) -> "Tensor":
    """Return what the errors of a model with this `prediction_type` are multiplied with, (B,), of log_snr's dtype.

    `previous_log_snr` is that of timestep t - 1, and of t itself for t = 0.
    """
    import torch

    snr, sigma_squared = log_snr.exp(), (-log_snr).sigmoid()
    # By way of x_0, so that a v-model whose last timestep is pure noise, SNR = 0, gets finite weights there too.
    to_x0 = {"epsilon": 1 / snr, "v_prediction": sigma_squared, "sample": torch.ones_like(snr)}[prediction_type]
    if weighting.timesteps == "min_snr":  # Hang et al. 2023 (2303.09556): min(SNR, gamma) on the error of x_0
        return to_x0 * snr.clamp(max=weighting.min_snr_gamma)
    if weighting.timesteps == "elbo":  # Kingma et al. 2021 (2107.00630), eq. 13; t = 0 is not a term of that sum
        return to_x0 * (previous_log_snr.exp() - snr) / 2
    if weighting.timesteps == "inv_alpha_sigma":  # 1 / (alpha_t^2 sigma_t^2) on the error of epsilon
        return to_x0 / sigma_squared.square()
    if weighting.error_space == "native":
        return torch.ones_like(snr)
    return to_x0 * snr if weighting.error_space == "epsilon" else to_x0
