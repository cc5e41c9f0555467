"""What the objectives are to each other, where their optima lie, and what their settings do."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from mpmath import exp, mp, mpf
from torch import Tensor

from diffusion_dpo.losses import ImageErrors, Loss, PairErrors
from diffusion_dpo.losses.capo import CaPO
from diffusion_dpo.losses.dco import DCO
from diffusion_dpo.losses.dmpo import DMPO
from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.losses.dpo_shift import DPOShift
from diffusion_dpo.losses.hinge import Hinge
from diffusion_dpo.losses.ipo import IPO
from diffusion_dpo.losses.kto import KTO
from diffusion_dpo.losses.linear_dpo import LinearDPO
from diffusion_dpo.losses.mapo import MaPO, phi
from diffusion_dpo.losses.plackett_luce import PlackettLuce
from diffusion_dpo.losses.rank_dpo import RankDPO
from diffusion_dpo.losses.robust_dpo import RobustDPO
from tests.losses.equations import make_errors

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MARGINS = torch.linspace(-9.75, 9.75, 40, dtype=torch.float64)


def at_margins(margins: Tensor, beta: float = 2.0, label_prob: float = 1.0) -> PairErrors:
    """Pairs with these margins u under this beta, half of each margin on either side."""
    zeros = torch.zeros_like(margins)
    half = margins / beta  # (beta / 2) (half + half) = u
    probability = torch.full_like(margins, label_prob)
    return PairErrors(-half, half, zeros, zeros, zeros.long(), zeros, probability)


def value(loss: Loss, margins: Tensor = MARGINS, **settings: float) -> Tensor:
    return loss(at_margins(margins, **settings)).loss


def slope(loss: Loss, margins: Tensor = MARGINS, **settings: float) -> Tensor:
    """The derivative with respect to u."""
    margins = margins.clone().requires_grad_()
    return torch.autograd.grad(value(loss, margins, **settings).sum(), margins)[0]


def one(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float64)


# --- the family of DPO ---


def test_dpo_has_the_gradient_that_every_text_book_has():
    """With respect to e(chosen) it is (beta / 2) sigmoid(-u), to e(rejected) minus that."""
    chosen, rejected, reference = torch.rand(3, 50, dtype=torch.float64, generator=torch.manual_seed(0))
    logit = -4 * (chosen - rejected)
    chosen.requires_grad_()
    rejected.requires_grad_()
    errors = PairErrors(chosen, rejected, reference, reference, reference.long(), reference, torch.ones_like(chosen))
    DPO(beta=8)(errors).loss.sum().backward()
    expected = [4 / (1 + math.exp(u)) for u in logit.tolist()]
    torch.testing.assert_close(chosen.grad, torch.tensor(expected, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(rejected.grad, -chosen.grad, **EXACT)


@pytest.mark.parametrize("label_prob", [0.5, 0.8, 1.0])
@pytest.mark.parametrize(
    "same",
    [DPO(beta=2, label_smoothing=0), RobustDPO(beta=2, flip_rate=0), DPOShift(beta=2, rejected_weight=1)],
    ids=["conservative_0", "robust_0", "shift_1"],
)
def test_special_cases_are_dpo(same: Loss, label_prob: float):
    torch.testing.assert_close(value(same, label_prob=label_prob), value(DPO(beta=2), label_prob=label_prob), **EXACT)


def test_rankings_of_two_are_dpo():
    errors = make_errors(2, batch=50)
    dpo = DPO(beta=200).over_images(errors)
    luce = PlackettLuce(beta=200).over_images(errors)
    torch.testing.assert_close(luce.loss, dpo.loss, **EXACT)
    torch.testing.assert_close(luce.rewards, dpo.rewards, **EXACT)
    scores = torch.exp2(errors.scores)
    cost = (scores[:, 0] - scores[:, 1]) * (1 - math.log(2) / math.log(3))
    torch.testing.assert_close(RankDPO(beta=200).over_images(errors).loss, cost * dpo.loss, **EXACT)


def test_dco_is_dpo_with_a_rejected_image_that_stays_where_it_was():
    errors = make_errors(2, batch=50)
    held = replace(errors, policy=torch.stack([errors.policy[:, 0], errors.reference[:, 1]], 1))
    single = replace(errors, policy=errors.policy[:, :1], reference=errors.reference[:, :1])
    dco, dpo = DCO(beta=200).over_images(single), DPO(beta=200).over_images(held)
    torch.testing.assert_close(dco.loss, dpo.loss, **EXACT)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.49])
def test_robust_dpo_has_in_expectation_over_flips_the_loss_of_the_true_label(rate: float):
    robust = RobustDPO(beta=2, flip_rate=rate)
    expectation = (1 - rate) * value(robust) + rate * value(robust, -MARGINS)
    torch.testing.assert_close(expectation, value(DPO(beta=2)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_smoothing_is_an_uncertain_label(rate: float):
    smoothed = DPO(beta=2, label_smoothing=min(rate, 0.4999999999999))
    torch.testing.assert_close(value(smoothed), value(DPO(beta=2), label_prob=1 - rate), **EXACT)


@pytest.mark.parametrize(
    "loss",
    [DPO(beta=2, label_smoothing=0.1), RobustDPO(beta=2), IPO(beta=2), Hinge(beta=2), DMPO(beta=2)],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("label_prob", [0.0, 0.3, 0.5, 0.9])
def test_an_uncertain_label_is_a_mixture_of_the_two_labels(loss: Loss, label_prob: float):
    mixture = label_prob * value(loss) + (1 - label_prob) * value(loss, -MARGINS)
    torch.testing.assert_close(value(loss, label_prob=label_prob), mixture, **EXACT)


def test_a_tie_pulls_dpo_towards_no_margin():
    assert torch.equal(slope(DPO(beta=2), label_prob=0.5).sign(), MARGINS.sign())


# --- optima ---

LOG_7 = math.log(7)


@pytest.mark.parametrize(
    ("loss", "label_prob", "optimum"),
    [
        (DPO(beta=2, label_smoothing=0.125), 1.0, LOG_7),
        (DPO(beta=2), 0.875, LOG_7),
        (DMPO(beta=2, smoothing=0.125), 1.0, LOG_7),
        (IPO(beta=2), 1.0, 0.5),
        (IPO(beta=2), 0.75, 0.25),
    ],
)
def test_the_margin_has_a_finite_optimum(loss: Loss, label_prob: float, optimum: float):
    assert slope(loss, one(optimum), label_prob=label_prob).abs() < 1e-12
    assert slope(loss, one(optimum - 0.1), label_prob=label_prob) < -1e-3
    assert slope(loss, one(optimum + 0.1), label_prob=label_prob) > 1e-3


def test_at_the_optimum_nothing_is_left_of_a_distance():
    assert value(IPO(beta=2), one(0.5)) == 0
    assert value(DMPO(beta=2, smoothing=0.125), one(LOG_7)).abs() < 1e-15


def test_dmpo_gives_up_hopeless_pairs():
    """The slope is p (1 - p) (u - logit(1 - a))."""
    expected = [(u - math.log(99)) / ((1 + math.exp(-u)) * (1 + math.exp(u))) for u in MARGINS.tolist()]
    torch.testing.assert_close(slope(DMPO(beta=2)), torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert value(DMPO(beta=2), one(0.0)).item() == pytest.approx(1.61446, abs=1e-5)
    assert slope(DMPO(beta=2), one(-30.0)).abs() < 1e-10


def test_hinge_pushes_equally_up_to_a_margin_of_one_and_not_beyond():
    expected = torch.where(MARGINS < 1, -1.0, 0.0).double()
    assert torch.equal(slope(Hinge(beta=2)), expected)
    assert value(Hinge(beta=2), one(1.0)) == 0
    assert value(Hinge(beta=2), one(0.0)) == 1


# --- CaPO ---


def scored(margins: Tensor, difference: float) -> PairErrors:
    full = torch.full_like(margins, 0.25)
    return replace(at_margins(margins), chosen_score=full + difference, rejected_score=full)


def test_capo_with_a_constant_difference_of_one_half_is_ipo():
    torch.testing.assert_close(CaPO(beta=2)(scored(MARGINS, 0.5)).loss, value(IPO(beta=2)), **EXACT)
    assert CaPO(beta=2)(scored(one(0.3), 0.3)).loss < 1e-30


def test_calibration_is_the_mean_chance_to_win_against_the_others():
    scores = [0.9, 0.1, 0.4, 0.4]
    logistic = [[1 / (1 + math.exp(-(a - b) / 0.2)) for b in scores] for a in scores]
    expected = [(sum(row) - row[i]) / 3 for i, row in enumerate(logistic)]
    calibrated = CaPO(temperature=0.2).calibrate(scores)
    assert calibrated == pytest.approx(expected, abs=1e-12)
    assert sum(calibrated) == pytest.approx(2, abs=1e-12)  # one of every two wins
    assert calibrated[2] == calibrated[3]


def test_calibration_of_edge_cases():
    assert CaPO().calibrate([0.7]) == [0.0]
    assert CaPO().calibrate([0.7, 0.7]) == [0.5, 0.5]
    assert CaPO(temperature=1e-4).calibrate([1.0, 0.0]) == [1.0, 0.0]
    assert DPO().calibrate([0.3, 0.7]) == [0.3, 0.7]


# --- Linear-DPO ---


@pytest.mark.parametrize(
    ("margin", "weight"), [(0.0, 0.5), (0.5, 0.3), (-0.5, 0.7), (3.0, 0.01), (-3.0, 0.9), (1.0, 0.1), (-1.0, 0.9)]
)
def test_linear_dpo_is_a_weight_times_the_difference(margin: float, weight: float):
    """0.2 beta h is 0.4 of u; the weight is a constant to the gradient."""
    errors = at_margins(one(margin), beta=200)
    chosen, rejected = (error.clone().requires_grad_() for error in (errors.chosen, errors.rejected))
    loss = LinearDPO(beta=200, eta=0.01, maximum=0.9)(replace(errors, chosen=chosen, rejected=rejected)).loss
    loss.backward()
    assert loss.item() == pytest.approx(weight * (errors.chosen - errors.rejected).item(), abs=1e-12)
    assert chosen.grad.item() == pytest.approx(weight, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(-weight, abs=1e-12)


def test_linear_dpo_starts_like_dpo_without_its_factor_of_half_beta():
    """There the weight, 1/2 - 0.2 beta h, is sigmoid(-u) = 1/2 - (beta / 8) h + ...; beside it, it falls faster."""
    errors = make_errors(2)
    start = replace(errors, policy=errors.reference.detach().clone().requires_grad_())
    linear, dpo = (
        torch.autograd.grad(loss.over_images(start).loss.sum(), start.policy)[0]
        for loss in (LinearDPO(beta=200), DPO(beta=200))
    )
    torch.testing.assert_close(dpo, 100 * linear, **EXACT)


# --- MaPO ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, 1e-8, 1e-6, 1e-4, 1e-2, 0.0999, 0.1, 0.1001, 0.5, 3.0, 20.0, 80.0])
def test_phi_and_its_gradient_have_all_digits(x: float, dtype: torch.dtype):
    point = torch.tensor(x, dtype=dtype, requires_grad=True)
    phi(point).backward()
    exact = mpf(point.item())
    relative = 1e-12 if dtype == torch.float64 else 3e-6
    expected = exact / (exp(exact) - 1) if x else mpf(1)
    assert phi(point).item() == pytest.approx(float(expected), rel=relative, abs=0)
    gradient = mp.diff(lambda y: y / (exp(y) - 1), exact) if x else mpf(-0.5)
    assert point.grad.item() == pytest.approx(float(gradient), rel=relative, abs=0)


@pytest.mark.parametrize("x", [1e2, 1e4, 1e30])
def test_phi_of_huge_errors_is_zero_and_its_gradient_finite(x: float):
    point = torch.tensor(x, requires_grad=True)
    phi(point).backward()
    assert 0 <= phi(point) < 1e-30
    assert point.grad.abs() < 1e-30


def test_the_two_published_forms_of_mapo_pull_with_very_different_strength():
    """Slope of the margin term in the chosen error, small errors: w T s phi'(0) l'(0) = w T s / 4."""
    errors = make_errors(2)
    zeros = replace(errors, policy=torch.zeros_like(errors.policy).requires_grad_())

    def pull(loss: MaPO) -> float:
        gradient = torch.autograd.grad(loss.over_images(zeros).loss.sum(), zeros.policy)[0]
        assert (gradient[:, 0] - gradient[:, 0].mean()).abs().max() < 1e-12
        torch.testing.assert_close(gradient[:, 1], 1 - gradient[:, 0], **EXACT)
        return gradient[0, 0].item() - 1

    assert pull(MaPO()) == pytest.approx(0.1 * 1000 * 0.5 / 4, abs=1e-12)
    assert pull(MaPO(beta=8)) == pytest.approx(0.25, abs=1e-12)


# --- KTO ---


def of_gain(gain: float, label: float, baseline: float = 0.0) -> ImageErrors:
    errors = make_errors(1, batch=1)
    return replace(
        errors,
        policy=(errors.reference.detach() - gain).requires_grad_(),
        labels=torch.full_like(errors.labels, label),
        baseline=baseline,
    )


def test_kto_measures_the_gain_from_the_baseline():
    moved, plain = (KTO(beta=200).over_images(of_gain(*args)) for args in ((0.03, 1.0, 0.02), (0.01, 1.0)))
    torch.testing.assert_close(moved.loss, plain.loss, **EXACT)
    assert moved.rewards.item() == pytest.approx(100 * 0.03, abs=1e-12)


def test_before_the_first_step_nothing_is_gained():
    assert ImageErrors.__dataclass_fields__["baseline"].default == 0


def test_kto_takes_a_falling_baseline_for_none():
    falling, none = (KTO(beta=200).over_images(of_gain(0.01, 0.0, z)).loss for z in (-0.02, 0.0))
    assert torch.equal(falling, none)


def test_kto_saturates_for_good_winners_and_hopeless_losers_alike():
    for label in (0.0, 1.0):
        pulls = []
        for gain in (-0.1, 0.0, 0.1):
            errors = of_gain(gain, label)
            pulls.append(torch.autograd.grad(KTO(beta=200).over_images(errors).loss.sum(), errors.policy)[0].abs())
        assert pulls[1].item() == pytest.approx(100 / 4, abs=1e-9)
        assert max(pulls[0], pulls[2]) < 1e-2


def test_kto_ignores_images_of_which_nothing_is_known():
    errors = of_gain(0.01, 0.5)
    assert not torch.autograd.grad(KTO(beta=200).over_images(errors).loss.sum(), errors.policy)[0].any()


# --- rankings ---


def test_plackett_luce_is_the_probability_of_the_order():
    """Over all orders of a list the probabilities add up to one."""
    errors = make_errors(4, batch=5)
    total = torch.zeros(5, dtype=torch.float64)
    for order in itertools.permutations(range(4)):
        turned = replace(errors, policy=errors.policy[:, order], reference=errors.reference[:, order])
        total += torch.exp(-PlackettLuce(beta=200).over_images(turned).loss)
    torch.testing.assert_close(total, torch.ones_like(total), **EXACT)


def test_rank_dpo_does_not_depend_on_the_order_in_which_a_list_is_given():
    errors = make_errors(4, batch=20)
    order = [2, 0, 3, 1]
    turned = replace(errors, **{n: getattr(errors, n)[:, order] for n in ("policy", "reference", "scores")})
    one_way, other = (RankDPO(beta=200).over_images(e) for e in (errors, turned))
    torch.testing.assert_close(one_way.loss, other.loss, **EXACT)
    torch.testing.assert_close(one_way.rewards[:, order], other.rewards, **EXACT)


def test_rank_dpo_ignores_images_of_equal_score():
    errors = make_errors(4)
    equal = replace(errors, scores=torch.full_like(errors.scores, 0.5))
    assert not RankDPO(beta=200).over_images(equal).loss.any()


def test_rank_dpo_ranks_by_the_policy_and_costs_the_top_of_the_list_most():
    """A ranking that the policy has exactly upside down: its ranks, not the scores', make the discounts."""
    errors = make_errors(3, batch=1)
    policy = torch.tensor([[0.03, 0.02, 0.01]], dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    upside_down = replace(errors, policy=policy, reference=torch.zeros_like(policy), scores=scores)
    discount = [1 / math.log2(4), 1 / math.log2(3), 1 / math.log2(2)]
    gain = [2.0, math.sqrt(2), 1.0]
    expected = sum(
        (gain[i] - gain[j]) * (discount[j] - discount[i]) * math.log1p(math.exp(j - i))
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    assert RankDPO(beta=200).over_images(upside_down).loss.item() == pytest.approx(expected, abs=1e-12)


# --- images and pairs ---


def test_columns_become_the_sides_of_a_pair():
    errors = make_errors(2, soft=True)
    pairs = errors.as_pairs()
    for column, side in enumerate(("chosen", "rejected")):
        assert torch.equal(getattr(pairs, side), errors.policy[:, column])
        assert torch.equal(getattr(pairs, f"reference_{side}"), errors.reference[:, column])
        assert torch.equal(getattr(pairs, f"{side}_score"), errors.scores[:, column])
    assert torch.equal(pairs.label_prob, errors.labels[:, 0])
    assert torch.equal(pairs.timesteps, errors.timesteps)
    assert torch.equal(pairs.log_snr, errors.log_snr)
    assert replace(errors, reference=None, scores=None).as_pairs().reference_chosen is None


@pytest.mark.parametrize("num_images", [1, 3])
def test_an_objective_over_pairs_refuses_anything_else(num_images: int):
    with pytest.raises(AssertionError):
        DPO().over_images(make_errors(num_images))
