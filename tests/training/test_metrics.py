"""The numbers of a step are plain means over its examples, however these were divided."""

import math
from collections.abc import Sequence

import pytest
import torch

from diffusion_dpo.losses import ImageErrors, ImageLoss
from diffusion_dpo.training.metrics import Totals

NUM = 12


def example_errors(num_images: int, *, labels: torch.Tensor | None = None, reference: bool = True) -> ImageErrors:
    generator = torch.Generator().manual_seed(num_images)
    policy, frozen, drift = torch.rand(3, NUM, num_images, generator=generator)
    if labels is None:
        labels = torch.tensor([[1.0, *[0.5] * (num_images - 2), 0.0]] * NUM)
    return ImageErrors(
        policy=policy,
        reference=frozen if reference else None,
        drift=drift if reference else None,
        cross=None,
        timesteps=torch.arange(NUM),
        log_snr=torch.zeros(NUM),
        previous_log_snr=torch.zeros(NUM),
        labels=labels,
        scores=None,
    )


def some(errors: ImageErrors, rows: slice) -> ImageErrors:
    parts = {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in vars(errors).items()}
    return ImageErrors(**parts)


def results(num_images: int) -> ImageLoss:
    generator = torch.Generator().manual_seed(100 + num_images)
    rewards = torch.randn(NUM, num_images, generator=generator)
    rewards[3] = rewards[3, 0]  # a tie
    return ImageLoss(torch.rand(NUM, generator=generator), rewards)


def weights() -> torch.Tensor:
    return torch.linspace(0.2, 1.8, NUM)


DIVISIONS = [[12], [6, 6], [4] * 3, [1] * 12, [5, 4, 3]]


def total(errors: ImageErrors, result: ImageLoss, sizes: Sequence[int]) -> tuple[dict[str, float], list[list[float]]]:
    totals, start = Totals(), 0
    for size in sizes:
        rows = slice(start, start + size)
        totals.add(some(errors, rows), ImageLoss(result.loss[rows], result.rewards[rows]), weights()[rows])
        start += size
    assert start == NUM
    return totals.fetch(torch.tensor(2.5))


def mean(values: torch.Tensor) -> float:
    return values.double().mean().item()


def expected(errors: ImageErrors, result: ImageLoss) -> dict[str, float]:
    """Of pairs and rankings, written out."""
    found = {"loss": mean(weights() * result.loss), "grad_norm": 2.5}
    for role, column in (("chosen", 0), ("rejected", errors.policy.shape[1] - 1)):
        found[f"rewards/{role}"] = mean(result.rewards[:, column])
        found[f"errors/{role}"] = mean(errors.policy[:, column])
        if errors.reference is not None:
            found[f"errors/reference_{role}"] = mean(errors.reference[:, column])
    margins = (result.rewards[:, 0] - result.rewards[:, -1]).tolist()
    found["rewards/margins"] = sum(margins) / NUM
    found["rewards/accuracies"] = sum(1.0 if it > 0 else 0.5 if it == 0 else 0.0 for it in margins) / NUM
    if errors.reference is not None and errors.drift is not None:
        found["errors/advantage"] = mean(errors.reference - errors.policy)
        found["errors/drift"] = mean(errors.drift)
    return found


@pytest.mark.parametrize("sizes", DIVISIONS, ids=str)
@pytest.mark.parametrize("num_images", [2, 4], ids=["pairs", "rankings"])
def test_means_do_not_depend_on_how_a_batch_is_divided(num_images: int, sizes: list[int]):
    errors, result = example_errors(num_images), results(num_images)
    metrics, _ = total(errors, result, sizes)
    assert metrics == pytest.approx(expected(errors, result), rel=1e-5)


def test_of_a_ranking_the_best_is_chosen_and_the_worst_rejected():
    errors, result = example_errors(4), results(4)
    metrics, _ = total(errors, result, [12])
    assert metrics["errors/chosen"] == pytest.approx(mean(errors.policy[:, 0]))
    assert metrics["errors/rejected"] == pytest.approx(mean(errors.policy[:, 3]))
    assert metrics["errors/advantage"] == pytest.approx(mean(errors.reference - errors.policy))  # of all four


LIKED = torch.tensor([1.0, 0, 0, 1, 0.5, 0.3, 0.7, 0, 0, 1, 1, 0])[:, None]


@pytest.mark.parametrize("sizes", DIVISIONS, ids=str)
def test_single_images_count_where_they_belong(sizes: list[int]):
    errors, result = example_errors(1, labels=LIKED), results(1)
    metrics, _ = total(errors, result, sizes)
    liked, disliked = LIKED[:, 0] > 0.5, LIKED[:, 0] < 0.5
    assert (liked.sum(), disliked.sum()) == (5, 6)  # and one that tied, which is neither
    found = {"loss": mean(weights() * result.loss), "grad_norm": 2.5}
    for role, where in (("chosen", liked), ("rejected", disliked)):
        found[f"rewards/{role}"] = mean(result.rewards[where])
        found[f"errors/{role}"] = mean(errors.policy[where])
        found[f"errors/reference_{role}"] = mean(errors.reference[where])
    found["errors/advantage"] = mean(errors.reference - errors.policy)
    found["errors/drift"] = mean(errors.drift)
    assert metrics == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("label, there, absent", [(1.0, "chosen", "rejected"), (0.0, "rejected", "chosen")])
def test_a_role_that_no_image_has_is_left_out(label: float, there: str, absent: str):
    metrics, _ = total(example_errors(1, labels=torch.full((NUM, 1), label)), results(1), [6, 6])
    assert not [name for name in metrics if name.endswith(absent)]
    assert {f"rewards/{there}", f"errors/{there}", f"errors/reference_{there}"} <= metrics.keys()
    assert not {"rewards/margins", "rewards/accuracies"} & metrics.keys()


@pytest.mark.parametrize("num_images", [1, 2])
def test_without_a_reference_nothing_is_said_of_it(num_images: int):
    labels = LIKED if num_images == 1 else None
    metrics, _ = total(example_errors(num_images, reference=False, labels=labels), results(num_images), [6, 6])
    assert not [name for name in metrics if "reference" in name or name in ("errors/advantage", "errors/drift")]
    assert {"errors/chosen", "errors/rejected", "rewards/chosen"} <= metrics.keys()


@pytest.mark.parametrize("sizes", DIVISIONS, ids=str)
def test_every_example_keeps_its_own_loss_and_error_in_the_order_of_the_batch(sizes: list[int]):
    errors, result = example_errors(2), results(2)
    errors.policy[7, 1] = math.nan
    result.loss[4] = math.inf
    metrics, examples = total(errors, result, sizes)
    assert [row[0] for row in examples] == pytest.approx(result.loss.tolist())
    assert [row[1] for row in examples] == pytest.approx(errors.policy.sum(1).tolist(), nan_ok=True)
    assert [i for i, row in enumerate(examples) if not all(map(math.isfinite, row))] == [4, 7]
    assert not math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["errors/rejected"])
    assert math.isfinite(metrics["errors/chosen"])


def test_no_gradient_is_kept():
    errors, result = example_errors(2), results(2)
    result.loss.requires_grad_()
    totals = Totals()
    totals.add(errors, result, weights())
    assert not any(tensor.requires_grad for tensor in (*totals._sums, *totals._examples))
    assert totals.fetch(torch.tensor(1.0, requires_grad=True))[0]["grad_norm"] == 1
