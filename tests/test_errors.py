"""Every error belongs to its image, its model and its noise: against a model whose errors are known in advance."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffusion_dpo.errors import PairBatch, pair_errors
from diffusion_dpo.losses.dpo import DPO

SHAPE = (4, 8, 8)


class KnownModel:
    """Predicts a multiple of the noisy latents, plus the conditioning; the reference uses another multiple."""

    def __init__(self) -> None:
        self.factor = torch.tensor(0.7, requires_grad=True)
        self.calls: list[str] = []
        self._frozen = False

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return latents + timesteps.view(-1, 1, 1, 1) / 1000 * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - 2 * latents

    def predict(self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning) -> torch.Tensor:
        self.calls.append("reference" if self._frozen else "policy")
        factor = 0.3 if self._frozen else self.factor
        return factor * noisy_latents + conditioning["text"].view(-1, 1, 1, 1)

    def log_snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        return -timesteps.float()

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._frozen = True
        with torch.no_grad():
            yield
        self._frozen = False


@pytest.fixture
def batch() -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, noise = torch.randn(3, 5, *SHAPE, generator=generator)
    return PairBatch(
        chosen=chosen,
        rejected=rejected,
        noise=noise,
        timesteps=torch.tensor([1, 250, 500, 750, 999]),
        conditioning={"text": torch.linspace(-1, 1, 5)[:, None]},
        label_prob=torch.ones(5),
    )


def expected_error(batch: PairBatch, latents: torch.Tensor, pair: int, factor: float) -> float:
    """The error of one image, written out in float64 with the pair's own noise, timestep and prompt."""
    x, noise = latents[pair].double(), batch.noise[pair].double()
    noisy = x + batch.timesteps[pair].item() / 1000 * noise
    prediction = factor * noisy + batch.conditioning["text"][pair].item()
    return (prediction - (noise - 2 * x)).square().mean().item()


def test_every_error_is_that_of_its_own_image(batch: PairBatch):
    errors = pair_errors(KnownModel(), batch, needs_reference=True)
    for pair in range(5):
        for side in ("chosen", "rejected"):
            latents = getattr(batch, side)
            assert getattr(errors, side)[pair].item() == pytest.approx(
                expected_error(batch, latents, pair, 0.7), rel=1e-5
            )
            reference = getattr(errors, f"reference_{side}")[pair].item()
            assert reference == pytest.approx(expected_error(batch, latents, pair, 0.3), rel=1e-5)
    assert torch.equal(errors.log_snr, -batch.timesteps.float())


def test_gradients_reach_the_policy_and_not_the_reference(batch: PairBatch):
    model = KnownModel()
    errors = pair_errors(model, batch, needs_reference=True)
    assert model.calls == ["reference", "policy"]
    assert errors.reference_chosen is not None
    assert not errors.reference_chosen.requires_grad
    DPO(beta=10)(errors).loss.mean().backward()
    assert model.factor.grad is not None
    assert model.factor.grad.abs() > 0


def test_a_step_along_the_gradient_prefers_the_chosen_images(batch: PairBatch):
    model = KnownModel()
    model.factor = torch.tensor(0.3, requires_grad=True)  # where policy and reference agree
    DPO(beta=10)(pair_errors(model, batch, needs_reference=True)).loss.mean().backward()
    with torch.no_grad():
        model.factor -= 0.01 * model.factor.grad
    after = DPO(beta=10)(pair_errors(model, batch, needs_reference=True))
    assert (after.chosen_reward - after.rejected_reward).mean() > 0


def test_the_reference_is_skipped_where_nobody_needs_it(batch: PairBatch):
    model = KnownModel()
    errors = pair_errors(model, batch, needs_reference=False)
    assert model.calls == ["policy"]
    assert errors.reference_chosen is None
