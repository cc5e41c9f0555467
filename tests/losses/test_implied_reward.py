"""The reward that a policy implies, computed by the code that trains, against the reward that it was made from.

The reference is a mixture of Gaussians p, the policy its exponential tilt p* = p exp(c x) / Z; both denoisers are
known. Summed over the noise levels with the weights of the evidence bound, and averaged over the noise, what the
policy's error is below the reference's is log p*(x) / p(x): noising, target, errors, weights and their signs enter.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.losses.weighting import PredictionType
from diffusion_dpo.settings import Regularizers, Weighting
from diffusion_dpo.training.errors import Batch, denoising_errors
from tests.losses.toy import AnalyticModel, Mixture

SLOPE = 1.1
REFERENCE = Mixture(*torch.tensor([[0.3, 0.5, 0.2], [-1.5, 0.4, 2.0], [0.2, 0.5, 0.1]], dtype=torch.float64))
TILTED = REFERENCE.tilt(SLOPE)
PAIRS = torch.tensor([[2.0, -2.0], [0.5, 0.0], [-1.5, 1.0], [1.0, 1.5]], dtype=torch.float64)
PARAMETERISATIONS = ("epsilon", "v_prediction", "sample")


def implied_rewards(model: AnalyticModel, pairs: Tensor) -> Tensor:
    """Return the rewards of pairs (P, 2), summed over the schedule and averaged over the noise by quadrature."""
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(64)
    noise, probability = torch.tensor(nodes), torch.tensor(node_weights / node_weights.sum())
    shape = (len(pairs), model.num_timesteps, len(noise))
    batch = Batch(
        latents=pairs[:, None, None].expand(*shape, 2).reshape(-1, 2, 1, 1, 1),
        noise=noise.expand(shape).reshape(-1, 1, 1, 1),
        timesteps=torch.arange(model.num_timesteps)[:, None].expand(shape).flatten(),
        conditioning={},
        labels=torch.tensor([1.0, 0.0], dtype=torch.float64).expand(math.prod(shape), 2),
        weights=torch.ones(math.prod(shape), dtype=torch.float64),
    )
    objective = Objective(
        loss=DPO(beta=2),
        weighting=Weighting(timesteps="elbo"),
        regularizers=Regularizers(),
        safeguard_mu=None,
        prediction_type=model.prediction_type,
    )
    assert objective.needs_reference
    errors = denoising_errors(model, batch, reference=model.reference)  # type: ignore[arg-type]
    _, result = objective(errors)
    assert result.rewards.dtype == torch.float64
    return (result.rewards.view(*shape, 2) * probability[:, None]).sum((1, 2))


def assert_implied(rewards: Tensor, tolerance: float) -> None:
    """Each image's reward is the log of the ratio of densities; of a pair the difference is that of c x."""
    margins = SLOPE * (PAIRS[:, 0] - PAIRS[:, 1])
    assert (rewards[:, 0] - rewards[:, 1] - margins).abs().max() <= tolerance
    ratio = (TILTED.log_density(PAIRS.flatten()) - REFERENCE.log_density(PAIRS.flatten())).view_as(PAIRS)
    torch.testing.assert_close(ratio[:, 0] - ratio[:, 1], margins, rtol=0, atol=1e-12)
    assert (rewards - ratio).abs().max() <= tolerance


@pytest.mark.parametrize("prediction_type", PARAMETERISATIONS)
def test_under_the_schedule_of_stable_diffusion(prediction_type: PredictionType):
    """The schedule ends at log SNRs of 7 and -5, and its steps are finite: 0.0055 of a range of 4.4."""
    model = AnalyticModel(TILTED, REFERENCE, prediction_type)
    assert_implied(implied_rewards(model, PAIRS), tolerance=0.01)


@pytest.mark.parametrize("prediction_type", PARAMETERISATIONS)
def test_under_a_schedule_that_is_fine_and_wide(prediction_type: PredictionType):
    """On an even grid the weight is (e^step - 1) / 2, not step / 2 as in the limit; that is a factor, and known."""
    grid = torch.linspace(14, -14, 800, dtype=torch.float64)
    step = (grid[0] - grid[1]).item()
    model = AnalyticModel(TILTED, REFERENCE, prediction_type, log_snr=grid)
    rewards = implied_rewards(model, PAIRS)
    assert_implied(rewards * step / np.expm1(step), tolerance=1e-4)
