"""Every objective against its equation, in 40 digits and on random and extreme examples: value and gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusion_dpo import registry
from diffusion_dpo.losses import ImageErrors
from tests.losses.equations import BETA, CASES, PAIRWISE, Case, derivatives, for_case, gain, margin, to_examples

EXACT = {"rtol": 1e-12, "atol": 1e-12}
every_objective = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def of_numbers(numbers: list) -> Tensor:
    """Round numbers of 40 digits, or lists of them, to float64."""
    floats = [[float(x) for x in row] if isinstance(row, list) else float(row) for row in numbers]
    return torch.tensor(floats, dtype=torch.float64)


def gradients(case: Case, errors: ImageErrors) -> tuple[Tensor, Tensor]:
    """With respect to the policy's and the reference's errors, (B, K); 0 for what the loss does not see."""
    inputs = (errors.policy, errors.reference)
    found = torch.autograd.grad(case.loss.over_images(errors).loss.sum(), inputs, allow_unused=True)
    return tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True))


def test_every_registered_objective_has_its_equation_here():
    registered = {registry.resolve("losses", name) for name in registry.TABLES["losses"]}
    assert registered == {type(case.loss) for case in CASES}


@pytest.mark.parametrize("soft", [False, True], ids=["certain", "uncertain"])
@every_objective
def test_value_and_gradient_are_those_of_the_equation(case: Case, soft: bool):
    errors = for_case(case, soft=soft)
    examples = to_examples(errors)
    loss = case.loss.over_images(errors).loss
    torch.testing.assert_close(loss, of_numbers([case.formula(e, e) for e in examples]), **EXACT)
    for of, gradient in zip(("policy", "reference"), gradients(case, errors), strict=True):
        exact = of_numbers([derivatives(case.formula, e, of) for e in examples])
        torch.testing.assert_close(gradient, exact, **EXACT, msg=lambda text, of=of: f"{of}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_objective
def test_no_error_is_too_large_or_too_small(case: Case, dtype: torch.dtype):
    """Margins of +-1e4 and of 0, errors of 0: the equation still, in value and gradient."""
    errors = for_case(case, batch=12, dtype=dtype, choices=(0.0, 1e-8, 1e-4, 1e2))
    examples = to_examples(errors)
    # softplus is linear from 20 on in torch, which is off by 2e-9; float32 has 7 digits
    tolerance = {"rtol": 1e-9, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    loss = case.loss.over_images(errors).loss
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.double(), of_numbers([case.formula(e, e) for e in examples]), **tolerance)
    for of, gradient in zip(("policy", "reference"), gradients(case, errors), strict=True):
        exact = of_numbers([derivatives(case.formula, e, of) for e in examples])
        torch.testing.assert_close(gradient.double(), exact, **tolerance)


@every_objective
def test_value_where_policy_and_reference_agree(case: Case):
    errors = for_case(case)
    errors = replace(errors, reference=errors.policy.detach(), baseline=0.0)
    expected = of_numbers([case.at_start(e) for e in to_examples(errors)])
    torch.testing.assert_close(case.loss.over_images(errors).loss, expected, **EXACT)


@every_objective
def test_rewards_are_half_beta_times_the_gain_and_carry_no_gradient(case: Case):
    errors = for_case(case)
    rewards = case.loss.over_images(errors).rewards
    assert not rewards.requires_grad
    assert rewards.shape == errors.policy.shape
    if case.loss.needs_reference:
        examples = to_examples(errors)
        expected = [[BETA / 2 * gain(e, i) for i in range(len(e.policy))] for e in examples]
        torch.testing.assert_close(rewards, of_numbers(expected), **EXACT)
    else:  # of whatever scale, less error is more reward
        order = errors.policy.flatten().argsort(descending=True)
        assert rewards.flatten()[order].diff().gt(0).all()


@every_objective
def test_the_reference_is_needed_where_it_is_said_to_be(case: Case):
    errors = replace(for_case(case), reference=None, drift=None)
    if case.loss.needs_reference:
        with pytest.raises(AssertionError):
            case.loss.over_images(errors)
    else:
        assert case.loss.over_images(errors).loss.isfinite().all()


@every_objective
def test_scores_are_needed_where_they_are_said_to_be(case: Case):
    errors = for_case(case)
    without = replace(errors, scores=None)
    if case.loss.needs_scores and case.name != "plackett_luce":  # which needs them to rank the list, earlier
        with pytest.raises(AssertionError):
            case.loss.over_images(without)
    else:
        assert torch.equal(case.loss.over_images(without).loss, case.loss.over_images(errors).loss)


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: case.name)
def test_below_the_goal_chosen_errors_are_pulled_down_and_rejected_ones_pushed_up(case: Case):
    errors = for_case(case, batch=300)
    policy, reference = gradients(case, errors)
    pull = of_numbers([1.0 if margin(e) < case.goal(e) else -1.0 for e in to_examples(errors)])
    if case.name == "hinge":
        pull = pull.relu()
    assert (pull > 0).sum() > 100
    assert torch.equal(policy.sign(), torch.stack([pull, -pull], 1))
    if case.anchored:
        torch.testing.assert_close(reference, -policy, **EXACT)
    else:
        assert not reference.any()


@pytest.mark.parametrize("case", [case for case in CASES if case not in PAIRWISE], ids=lambda case: case.name)
def test_liked_and_best_images_are_pulled_and_disliked_and_worst_ones_pushed(case: Case):
    errors = for_case(case, batch=300)
    policy, reference = gradients(case, errors)
    if case.loss.unit == "list":
        assert (policy[:, 0] > 0).all()
        assert (policy[:, -1] < 0).all()
    elif case.loss.unit == "image":
        assert torch.equal(policy.sign(), 2 * errors.labels - 1)
    else:
        assert (policy > 0).all()
    torch.testing.assert_close(reference, -policy if case.anchored else torch.zeros_like(policy), **EXACT)


# --- invariances ---


def changed(errors: ImageErrors, policy: Tensor, reference: Tensor) -> ImageErrors:
    return replace(errors, policy=policy, reference=reference)


@every_objective
def test_errors_that_all_images_have_in_common_cancel_where_images_are_compared(case: Case):
    errors = for_case(case)
    moved = changed(errors, errors.policy + 0.1, errors.reference)
    equal = (case.loss.over_images(moved).loss - case.loss.over_images(errors).loss).abs() < 1e-12
    assert equal.all() if case.compares else not equal.any()


@every_objective
def test_what_policy_and_reference_have_in_common_cancels(case: Case):
    errors = for_case(case)
    common = torch.linspace(0.1, 0.5, errors.policy.numel(), dtype=torch.float64).view_as(errors.policy)
    moved = changed(errors, errors.policy + common, errors.reference + common)
    equal = (case.loss.over_images(moved).loss - case.loss.over_images(errors).loss).abs() < 1e-12
    assert equal.all() if case.anchored else not equal.any()


@every_objective
def test_an_example_knows_nothing_of_the_rest_of_the_batch(case: Case):
    """Hence any order of the batch and any division into micro-batches give the same mean."""
    errors = for_case(case)
    whole = case.loss.over_images(errors)
    for i in range(len(errors.policy)):
        fields = ("policy", "reference", "labels", "scores", "timesteps", "log_snr", "previous_log_snr")
        alone = case.loss.over_images(replace(errors, **{name: getattr(errors, name)[i : i + 1] for name in fields}))
        torch.testing.assert_close(alone.loss, whole.loss[i : i + 1], **EXACT)
        torch.testing.assert_close(alone.rewards, whole.rewards[i : i + 1], **EXACT)


@pytest.mark.parametrize("case", [case for case in CASES if case.anchored], ids=lambda case: case.name)
def test_beta_is_a_scale_of_the_errors(case: Case):
    errors = for_case(case)
    scaled = replace(changed(errors, 3 * errors.policy, 3 * errors.reference), baseline=3 * errors.baseline)
    stronger = case.loss.model_copy(update={"beta": 3.0 * BETA})
    torch.testing.assert_close(stronger.over_images(errors).loss, case.loss.over_images(scaled).loss, **EXACT)


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda case: case.name)
def test_swapping_the_images_and_the_label_changes_nothing(case: Case):
    errors = for_case(case, soft=True)
    names = ("policy", "reference", "labels", "scores")
    turned = replace(errors, **{name: getattr(errors, name).flip(1) for name in names})
    one, other = case.loss.over_images(errors), case.loss.over_images(turned)
    torch.testing.assert_close(one.loss, other.loss, **EXACT)
    torch.testing.assert_close(one.rewards, other.rewards.flip(1), **EXACT)
