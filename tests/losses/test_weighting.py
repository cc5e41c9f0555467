"""Weights of timesteps: their formulas, and that they mean the same whatever the model predicts."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion_dpo.losses.weighting import PredictionType, error_weights
from diffusion_dpo.settings import Weighting
from diffusion_dpo.training.errors import Batch, denoising_errors
from tests.losses.toy import AnalyticModel, Mixture

PARAMETERISATIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
CONVERTED = [
    Weighting(error_space="epsilon"),
    Weighting(error_space="x0"),
    Weighting(timesteps="min_snr"),
    Weighting(timesteps="min_snr", min_snr_gamma=1.5),
    Weighting(timesteps="elbo"),
    Weighting(timesteps="inv_alpha_sigma"),
]
"""All but where errors count as they are."""


def name_of(weighting: Weighting) -> str:
    return f"{weighting.timesteps} {weighting.error_space} {weighting.min_snr_gamma:g}"


# of SNR, that of the step before, and gamma: as the literature has them, for epsilon, v and x_0
FORMULAS = {
    ("constant", "native"): (lambda s, p, g: 1.0, lambda s, p, g: 1.0, lambda s, p, g: 1.0),
    ("constant", "epsilon"): (lambda s, p, g: 1.0, lambda s, p, g: s / (1 + s), lambda s, p, g: s),
    ("constant", "x0"): (lambda s, p, g: 1 / s, lambda s, p, g: 1 / (1 + s), lambda s, p, g: 1.0),
    ("min_snr", "native"): (
        lambda s, p, g: min(s, g) / s,
        lambda s, p, g: min(s, g) / (s + 1),
        lambda s, p, g: min(s, g),
    ),
    ("elbo", "native"): (
        lambda s, p, g: (p / s - 1) / 2,
        lambda s, p, g: s / (1 + s) * (p / s - 1) / 2,
        lambda s, p, g: (p - s) / 2,
    ),
    # alpha^2 = s / (1 + s), sigma^2 = 1 / (1 + s)
    ("inv_alpha_sigma", "native"): (
        lambda s, p, g: (1 + s) ** 2 / s,
        lambda s, p, g: 1 + s,
        lambda s, p, g: (1 + s) ** 2,
    ),
}


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction_type", PARAMETERISATIONS)
@pytest.mark.parametrize(("timesteps", "space"), FORMULAS)
def test_weights_are_those_of_the_literature(timesteps, space, prediction_type: PredictionType, gamma: float):
    log_snr = torch.linspace(-6, 8, 29, dtype=torch.float64)
    weighting = Weighting(timesteps=timesteps, error_space=space, min_snr_gamma=gamma)
    weights = error_weights(weighting, prediction_type, log_snr, log_snr + 0.1)
    formula = FORMULAS[timesteps, space][PARAMETERISATIONS.index(prediction_type)]
    expected = [formula(math.exp(value), math.exp(value + 0.1), gamma) for value in log_snr.tolist()]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def errors_of(prediction_type: PredictionType, *first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Errors (B, 2) of one denoiser that errs, in this parameterisation, with log SNRs of t and t - 1.

    Timesteps are random, except for the first ones where they are given.
    """
    generator = torch.Generator().manual_seed(0)
    normal = Mixture(*torch.tensor([[0.6, 0.4], [-1.0, 1.0], [0.3, 0.1]], dtype=torch.float64))
    model = AnalyticModel(normal.tilt(2.0), normal, prediction_type)
    timesteps = torch.cat([torch.tensor(first).long(), torch.randint(1000, (200 - len(first),), generator=generator)])
    latents = torch.randn(200, 2, 1, 1, 1, dtype=torch.float64, generator=generator)
    batch = Batch(
        latents=latents,
        noise=torch.randn(200, 1, 1, 1, dtype=torch.float64, generator=generator),
        timesteps=timesteps,
        conditioning={},
        labels=torch.tensor([[1.0, 0.0]]).expand(200, 2),
        weights=torch.ones(200),
    )
    errors = denoising_errors(model, batch, reference=None)  # type: ignore[arg-type]
    assert errors.policy.dtype == torch.float64
    return errors.policy, errors.log_snr, errors.previous_log_snr


@pytest.mark.parametrize("weighting", CONVERTED, ids=name_of)
def test_a_weighted_error_does_not_depend_on_what_the_model_predicts(weighting: Weighting):
    """One denoiser, put three ways, through the noising and the targets of training."""
    weighted = []
    for prediction_type in PARAMETERISATIONS:
        policy, log_snr, previous = errors_of(prediction_type)
        weighted.append(policy * error_weights(weighting, prediction_type, log_snr, previous)[:, None])
    # atol: the residual of x_0 comes from numbers of order 1, and is squared and multiplied by SNRs up to 1200
    torch.testing.assert_close(weighted[1], weighted[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weighted[2], weighted[0], rtol=1e-6, atol=1e-9)


def test_errors_convert_as_the_identity_says():
    """The error of epsilon is alpha^2 that of v and SNR that of x_0."""
    (epsilon, log_snr, _), (velocity, _, _), (clean, _, _) = (errors_of(kind) for kind in PARAMETERISATIONS)
    torch.testing.assert_close(epsilon, log_snr.sigmoid()[:, None] * velocity, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(epsilon, log_snr.exp()[:, None] * clean, rtol=1e-6, atol=1e-12)


def stable_diffusion_schedule() -> tuple[Tensor, Tensor]:
    alpha_squared = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    log_snr = (alpha_squared.double() / (1 - alpha_squared.double())).log()
    return log_snr, torch.cat([log_snr[:1], log_snr[:-1]])


def test_errors_come_with_the_noise_of_the_step_before():
    """Step 0 has none: its own, not that of the last step, under which its weight would be negative."""
    _, log_snr, previous = errors_of("epsilon", 0, 1, 999)
    schedule, shifted = stable_diffusion_schedule()
    assert torch.equal(log_snr[:3], schedule[[0, 1, 999]])
    assert torch.equal(previous[:3], shifted[[0, 1, 999]])
    assert torch.equal(previous[:3], schedule[[0, 0, 998]])


def test_the_evidence_bound_telescopes_and_starts_at_the_first_step():
    """On errors of x_0 the weights add up to half of what the SNR falls by; t = 0 is not a term."""
    log_snr, previous = stable_diffusion_schedule()
    weights = error_weights(Weighting(timesteps="elbo"), "sample", log_snr, previous)
    assert weights[0] == 0
    assert (weights[1:] > 0).all()
    snr = log_snr.exp()
    torch.testing.assert_close(weights.sum(), (snr[0] - snr[-1]) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", [Weighting(), *CONVERTED], ids=name_of)
@pytest.mark.parametrize("prediction_type", PARAMETERISATIONS)
def test_float32_is_enough(weighting: Weighting, prediction_type: PredictionType):
    exact = error_weights(weighting, prediction_type, *stable_diffusion_schedule())
    single = error_weights(weighting, prediction_type, *(x.float() for x in stable_diffusion_schedule()))
    assert single.dtype == torch.float32
    assert single.shape == (1000,)
    torch.testing.assert_close(single.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", [Weighting(), *CONVERTED], ids=name_of)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_last_timestep_of_pure_noise_has_a_finite_weight(weighting: Weighting, prediction_type: PredictionType):
    """Schedules with zero terminal SNR (2305.08891) need a model of v or x_0, and have one."""
    log_snr, previous = torch.tensor([-math.inf]), torch.tensor([-8.0])
    assert error_weights(weighting, prediction_type, log_snr, previous).isfinite().all()
