"""What is added to an objective: weights of timesteps, the safeguard of the chosen image, regularisers."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion_dpo.losses import ImageErrors, Loss
from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.losses.kto import KTO
from diffusion_dpo.losses.mapo import MaPO
from diffusion_dpo.losses.objective import Objective, safeguard
from diffusion_dpo.losses.plackett_luce import PlackettLuce
from diffusion_dpo.losses.sft import SFT
from diffusion_dpo.losses.weighting import PredictionType
from diffusion_dpo.settings import Regularizers, Weighting
from tests.losses.equations import NUM_IMAGES, make_errors

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LOSSES = [DPO(beta=200), MaPO(), KTO(beta=200), SFT(), PlackettLuce(beta=200)]
every_unit = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)


def objective(
    loss: Loss = LOSSES[0],
    *,
    weighting: Weighting = Weighting(),  # noqa: B008
    regularizers: Regularizers = Regularizers(),  # noqa: B008
    safeguard_mu: float | None = None,
    prediction_type: PredictionType = "epsilon",
) -> Objective:
    return Objective(loss, weighting, regularizers, safeguard_mu, prediction_type)


def errors_for(loss: Loss, **settings: object) -> ImageErrors:
    return make_errors(NUM_IMAGES[loss.unit], **settings)  # type: ignore[arg-type]


def gradient(of: Objective, errors: ImageErrors) -> Tensor:
    return torch.autograd.grad(of(errors)[1].loss.sum(), errors.policy)[0]


@every_unit
def test_with_nothing_added_it_is_the_loss(loss: Loss):
    errors = errors_for(loss)
    weighted, result = objective(loss)(errors)
    plain = loss.over_images(errors)
    assert torch.equal(result.loss, plain.loss)
    assert torch.equal(result.rewards, plain.rewards)
    assert torch.equal(weighted.policy, errors.policy)


# --- weights of timesteps ---


@every_unit
def test_weights_multiply_the_errors_of_policy_and_reference_alike(loss: Loss):
    errors = errors_for(loss)
    weighted, result = objective(loss, weighting=Weighting(timesteps="min_snr"), prediction_type="sample")(errors)
    weights = errors.log_snr.exp().clamp(max=5)
    assert weights.unique().numel() > 2
    for name in ("policy", "reference", "drift"):
        expected = getattr(errors, name) * weights[:, None]
        torch.testing.assert_close(getattr(weighted, name), expected, **EXACT)
    torch.testing.assert_close(weighted.cross, errors.cross * weights, **EXACT)
    assert torch.equal(result.loss, loss.over_images(weighted).loss)
    assert weighted.baseline == errors.baseline


def test_what_is_not_there_is_not_weighted():
    errors = replace(errors_for(SFT()), reference=None, drift=None, cross=None)
    weighted, _ = objective(SFT(), weighting=Weighting(timesteps="min_snr"))(errors)
    assert weighted.reference is None and weighted.drift is None and weighted.cross is None


def test_a_weight_is_a_factor_of_beta():
    errors = errors_for(DPO())
    same_noise = replace(errors, log_snr=torch.zeros_like(errors.log_snr))  # SNR 1, 1 / (alpha sigma)^2 = 4
    weighted = objective(weighting=Weighting(timesteps="inv_alpha_sigma"))(same_noise)[1]
    torch.testing.assert_close(weighted.loss, DPO(beta=800).over_images(errors).loss, **EXACT)


# --- regularisers ---


def regularized(loss: Loss, errors: ImageErrors, **weights: float) -> Tensor:
    """What is added to the loss, (B,)."""
    return objective(loss, regularizers=Regularizers(**weights))(errors)[1].loss - loss.over_images(errors).loss


def test_sft_adds_the_error_of_the_chosen_image():
    errors = errors_for(DPO())
    torch.testing.assert_close(regularized(DPO(), errors, sft=3.0), 3 * errors.policy[:, 0], **EXACT)


def test_chosen_hinge_adds_what_the_chosen_error_is_above_the_reference():
    errors = errors_for(DPO(), batch=50)
    expected = [
        4 * max(0.0, w - r) for w, r in zip(errors.policy[:, 0].tolist(), errors.reference[:, 0].tolist(), strict=True)
    ]
    added = regularized(DPO(), errors, chosen_hinge=4.0)
    torch.testing.assert_close(added, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert 10 < (added > 0).sum() < 40


def test_drift_adds_the_mean_distance_from_the_reference_on_both_sides():
    errors = errors_for(DPO())
    torch.testing.assert_close(regularized(DPO(), errors, drift=2.0), errors.drift[:, 0] + errors.drift[:, 1], **EXACT)


def test_regularizers_add_up():
    errors = errors_for(DPO())
    weights = {"sft": 0.5, "chosen_hinge": 2.0, "drift": 3.0}
    single = sum(regularized(DPO(), errors, **{name: weight}) for name, weight in weights.items())
    torch.testing.assert_close(regularized(DPO(), errors, **weights), single, **EXACT)


@pytest.mark.parametrize("name", ["sft", "chosen_hinge"])
def test_only_desirable_images_are_anchored(name: str):
    errors = errors_for(KTO(), batch=40)  # one image each, every second one desirable
    added = regularized(KTO(), errors, **{name: 1.0})
    assert (added[0::2] > 0).sum() > 5
    assert not added[1::2].any()
    tie = replace(make_errors(2), labels=torch.full((6, 2), 0.5, dtype=torch.float64))
    assert not regularized(DPO(), tie, **{name: 1.0}).any(), "of a tie nobody knows which image is desirable"


@pytest.mark.parametrize("name", ["sft", "chosen_hinge", "drift"])
def test_regularizers_pull_the_chosen_image_and_see_the_weights_of_timesteps(name: str):
    errors = errors_for(SFT(), batch=40)
    drift = errors.drift.requires_grad_()
    one = Regularizers(**{name: 1.0})
    weighting = Weighting(timesteps="min_snr")
    plain = objective(SFT(), weighting=weighting)(errors)[1].loss
    added = objective(SFT(), weighting=weighting, regularizers=one)(errors)[1].loss - plain
    slope = torch.autograd.grad(added.sum(), drift if name == "drift" else errors.policy)[0][:, 0]
    weights = (5 / errors.log_snr.exp()).clamp(max=1) * (errors.labels[:, 0] if name != "drift" else 1)
    if name == "chosen_hinge":
        weights = weights * (errors.policy > errors.reference)[:, 0]
    torch.testing.assert_close(slope, weights, **EXACT)


# --- whether the reference is needed ---


@every_unit
@pytest.mark.parametrize("names", [c for n in range(4) for c in itertools.combinations(Regularizers.model_fields, n)])
def test_the_reference_is_needed_by_some_losses_and_some_regularizers(loss: Loss, names: tuple[str, ...]):
    needed = type(loss) not in (MaPO, SFT) or "chosen_hinge" in names or "drift" in names
    configured = objective(loss, regularizers=Regularizers(**{name: 1.0 for name in names}))
    assert configured.needs_reference == needed
    if not needed:  # then it works without, safeguard included
        errors = replace(errors_for(loss), reference=None, drift=None)
        assert replace(configured, safeguard_mu=0.5 if loss.unit == "pair" else None)(errors)[1].loss.isfinite().all()


# --- the safeguard ---


def residual_errors(residuals: Tensor) -> ImageErrors:
    """The errors of pairs with these residuals, (B, 2, elements)."""
    reference = residuals.detach().square().mean(2).flip(0)
    cross = residuals.detach().prod(1).mean(1)
    errors = make_errors(2, batch=len(residuals))
    return replace(errors, policy=residuals.square().mean(2), reference=reference, cross=cross)


def random_residuals(num_pairs: int = 500) -> Tensor:
    """Of every correlation and relative size."""
    generator = torch.Generator().manual_seed(0)
    common, chosen, rejected = torch.randn(3, num_pairs, 16, generator=generator, dtype=torch.float64)
    share = torch.linspace(-2, 3, num_pairs, dtype=torch.float64)[:, None]
    size = 10 ** torch.empty(num_pairs, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    return torch.stack([chosen + share.abs() * common, size * (rejected + share * common)], 1)


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.6, 0.9, 1.0])
def test_the_safeguard_lowers_the_chosen_error_to_first_order(mu: float):
    """(-r_w + s r_l) . r_w <= -mu |r_w|^2, with the scale s that the rejected error's gradient has got."""
    errors = residual_errors(random_residuals())
    policy = errors.policy.detach().requires_grad_()
    safe = safeguard(replace(errors, policy=policy), mu).policy
    scale = torch.autograd.grad(safe[:, 1].sum(), policy)[0][:, 1]
    chosen, rejected = random_residuals().unbind(1)
    change = ((-chosen + scale[:, None] * rejected) * chosen).sum(1)
    assert (change <= -mu * chosen.square().sum(1) * (1 - 1e-12) + 1e-12).all()
    harmful = (chosen * rejected).sum(1) > (1 - mu) * chosen.square().sum(1)
    assert harmful.sum() > 100 and (~harmful).sum() > 100
    assert torch.equal(scale < 1, harmful)
    assert (scale >= 0).all()
    # no gentler than it has to be
    torch.testing.assert_close(change[harmful], -mu * chosen.square().sum(1)[harmful], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_the_safeguard_scales_the_rejected_gradient_and_nothing_else(mu: float):
    errors = residual_errors(random_residuals())
    errors = replace(errors, policy=errors.policy.detach().requires_grad_())
    plain, safe = (objective(DPO(beta=0.1), safeguard_mu=chosen_mu) for chosen_mu in (None, mu))
    assert torch.equal(safe(errors)[1].loss, plain(errors)[1].loss)
    assert torch.equal(safe(errors)[1].rewards, plain(errors)[1].rewards)
    assert torch.equal(safe(errors)[0].policy, errors.policy)
    free, held = gradient(plain, errors), gradient(safe, errors)
    assert torch.equal(held[:, 0], free[:, 0])
    chosen, cross = errors.policy[:, 0], errors.cross
    expected = [
        min(1.0, (1 - mu) * c / x) if x > 0 else 1.0 for c, x in zip(chosen.tolist(), cross.tolist(), strict=True)
    ]
    scale = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(held[:, 1], scale * free[:, 1], **EXACT)
    assert (scale == 1).sum() > 100 and (scale < 1).sum() > 100
    assert torch.equal(held[scale == 1], free[scale == 1])


def test_with_the_safeguard_a_shared_parameter_never_raises_the_chosen_error():
    """One offset moves the predictions for both images: the case that the safeguard was made for."""
    rises = {}
    for mu in (None, 0.5):
        residuals = random_residuals()
        offset = torch.zeros(len(residuals), 1, residuals.shape[2], dtype=torch.float64, requires_grad=True)
        errors = residual_errors(residuals + offset)
        step = -torch.autograd.grad(objective(DPO(beta=0.1), safeguard_mu=mu)(errors)[1].loss.sum(), offset)[0]
        rises[mu] = ((step * residuals[:, :1]).sum((1, 2)) > 0).sum().item()
    assert rises[None] > 100
    assert rises[0.5] == 0


def test_weights_of_timesteps_leave_the_scale_alone():
    errors = residual_errors(random_residuals())
    errors = replace(errors, policy=errors.policy.detach().requires_grad_())
    scales = []
    for weighting in (Weighting(), Weighting(timesteps="min_snr")):
        plain, safe = (
            gradient(objective(DPO(beta=0.1), weighting=weighting, safeguard_mu=mu), errors)[:, 1]
            for mu in (None, 0.6)
        )
        scales.append(safe / plain)
    torch.testing.assert_close(*scales, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_safeguard_survives_errors_of_zero(dtype: torch.dtype):
    errors = make_errors(2, dtype=dtype, choices=(0.0, 1e-30))
    for cross in (0.0, 1e-40, -1e-40):
        zeros = replace(errors, cross=torch.full_like(errors.cross, cross))
        assert gradient(objective(safeguard_mu=0.9), zeros).isfinite().all()


@pytest.mark.parametrize("loss", [KTO(), PlackettLuce()], ids=lambda loss: type(loss).__name__)
def test_only_pairs_have_a_safeguard(loss: Loss):
    with pytest.raises(AssertionError):
        objective(loss, safeguard_mu=0.5)(replace(errors_for(loss), cross=None))
