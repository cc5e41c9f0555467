"""Diffusion-DPO against an independent formula in float64, and the invariants that any implementation must have."""

import math

import pytest
import torch

from diffusion_dpo.losses import PairErrors
from diffusion_dpo.losses.dpo import DPO, convert_beta


def make_errors(
    batch: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32, **changed: torch.Tensor
) -> PairErrors:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4, batch, generator=generator, dtype=torch.float64) * 0.3
    tensors = dict(
        zip(("chosen", "rejected", "reference_chosen", "reference_rejected"), values.to(dtype), strict=True)
    )
    zeros = torch.zeros(batch, dtype=dtype)
    defaults = {"timesteps": zeros.long(), "log_snr": zeros, "label_prob": zeros + 1}
    return PairErrors(**{**tensors, **defaults, **changed})


def formula(errors: PairErrors, beta: float) -> torch.Tensor:
    """-log sigmoid((beta / 2) [...]) written out with exponentials, in float64."""
    difference = (errors.reference_chosen - errors.chosen) - (errors.reference_rejected - errors.rejected)
    return torch.log1p(torch.exp(-beta / 2 * difference.double()))


def test_loss_and_gradient_equal_an_independent_formula_in_float64():
    beta, errors = 50.0, make_errors()
    leaves = {name: getattr(errors, name).clone().requires_grad_() for name in ("chosen", "rejected")}
    loss = DPO(beta=beta)(make_errors(**leaves)).loss
    loss.mean().backward()

    # the float64 twin starts from the same float32 errors, so that only the arithmetic is compared
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    exact = {name: getattr(errors, name).double().requires_grad_() for name in names}
    expected = formula(make_errors(**exact), beta)
    expected.mean().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), exact[name].grad, rtol=1e-6, atol=1e-6)


def test_loss_is_ln_2_where_policy_and_reference_agree():
    errors = make_errors()
    equal = make_errors(chosen=errors.reference_chosen, rejected=errors.reference_rejected)
    assert DPO(beta=5000)(equal).loss.sub(math.log(2)).abs().max() < 1e-7


def test_gradients_pull_the_chosen_error_down_and_the_rejected_error_up():
    chosen, rejected = (make_errors().chosen.requires_grad_(), make_errors(seed=1).rejected.requires_grad_())
    DPO(beta=100)(make_errors(chosen=chosen, rejected=rejected)).loss.sum().backward()
    assert (chosen.grad > 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad)


def test_gradient_is_half_beta_times_the_sigmoid_of_minus_the_logit():
    chosen = make_errors().chosen.requires_grad_()
    result = DPO(beta=100)(make_errors(chosen=chosen))
    result.loss.sum().backward()
    logit = result.chosen_reward - result.rejected_reward
    torch.testing.assert_close(chosen.grad, 50 * torch.sigmoid(-logit))


def test_swapping_chosen_and_rejected_flips_the_logit():
    errors = make_errors()
    swapped = make_errors(
        chosen=errors.rejected,
        rejected=errors.chosen,
        reference_chosen=errors.reference_rejected,
        reference_rejected=errors.reference_chosen,
    )
    forward, backward = DPO(beta=100)(errors), DPO(beta=100)(swapped)
    logit = forward.chosen_reward - forward.rejected_reward
    torch.testing.assert_close(backward.loss - forward.loss, logit, rtol=1e-5, atol=1e-5)


def test_beta_is_a_scale_of_the_errors():
    errors = make_errors()
    scaled = make_errors(
        **{k: 7 * getattr(errors, k) for k in ("chosen", "rejected", "reference_chosen", "reference_rejected")}
    )
    torch.testing.assert_close(DPO(beta=70)(errors).loss, DPO(beta=10)(scaled).loss)


@pytest.mark.parametrize("label_prob", [0.5, 0.7, 1.0])
def test_soft_labels_are_the_expectation_over_both_labels(label_prob: float):
    errors = make_errors()
    forward = DPO(beta=100)(errors)
    logit = forward.chosen_reward - forward.rejected_reward
    expected = label_prob * forward.loss + (1 - label_prob) * (forward.loss + logit)
    soft = DPO(beta=100)(make_errors(label_prob=torch.full((64,), label_prob)))
    torch.testing.assert_close(soft.loss, expected, rtol=1e-5, atol=1e-5)


def test_enormous_logits_stay_finite():
    huge = make_errors(chosen=torch.full((64,), 1e4, requires_grad=True))
    loss = DPO(beta=5000)(huge).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(huge.chosen.grad).all()


def test_published_betas_give_the_same_logit():
    errors, elements = make_errors(), 4 * 64 * 64
    ours = DPO(beta=5000)(errors)
    logit = ours.chosen_reward - ours.rejected_reward
    difference = (errors.reference_chosen - errors.chosen) - (errors.reference_rejected - errors.rejected)
    assert convert_beta(2500, "diffusers_sd", num_latent_elements=elements) == 5000
    torch.testing.assert_close(2500 * difference, logit)
    paper = 5000 / (2 * elements)
    assert convert_beta(paper, "paper", num_latent_elements=elements) == pytest.approx(5000)
    torch.testing.assert_close(paper * (difference * elements), logit)
    assert convert_beta(5000, "salesforce", num_latent_elements=elements) == 5000
