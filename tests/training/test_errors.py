"""Every error belongs to its image, its model and its noise: against a model whose errors are known in advance."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from diffusion_dpo.losses import PairErrors
from diffusion_dpo.losses.dpo import DPO
from diffusion_dpo.training.errors import Batch, add_shared_noise, denoising_errors, errors_of, reference_errors

SHAPE = (4, 8, 8)


class KnownModel:
    """Predicts a multiple of the noisy latents, plus the conditioning; the reference uses another multiple."""

    downscale = 8

    def __init__(self) -> None:
        self.factor = torch.tensor(0.7, requires_grad=True)
        self.calls: list[str] = []
        self._frozen = False

    def image_conditioning(self, sizes: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

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
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, noise = torch.randn(3, 5, *SHAPE, generator=generator)
    return Batch(
        latents=torch.stack([chosen, rejected], 1),
        noise=noise,
        timesteps=torch.tensor([1, 250, 500, 750, 999]),
        conditioning={"text": torch.linspace(-1, 1, 5)[:, None]},
        labels=torch.tensor([[1.0, 0.0]] * 5),
        weights=torch.ones(5),
    )


def pair_errors(model: KnownModel, batch: Batch) -> PairErrors:
    return denoising_errors(model, batch, reference=model.reference).as_pairs()


def residual(batch: Batch, latents: torch.Tensor, pair: int, factor: float) -> torch.Tensor:
    """Prediction minus target of one image, in float64, with the pair's own noise, timestep and prompt."""
    x, noise = latents[pair].double(), batch.noise[pair].double()
    noisy = x + batch.timesteps[pair].item() / 1000 * noise
    return factor * noisy + batch.conditioning["text"][pair].item() - (noise - 2 * x)


def expected_error(batch: Batch, latents: torch.Tensor, pair: int, factor: float) -> float:
    """The error of one image, written out."""
    return residual(batch, latents, pair, factor).square().mean().item()


def test_every_error_is_that_of_its_own_image(batch: Batch):
    errors = pair_errors(KnownModel(), batch)
    for pair in range(5):
        for column, side in enumerate(("chosen", "rejected")):
            latents = batch.latents[:, column]
            assert getattr(errors, side)[pair].item() == pytest.approx(
                expected_error(batch, latents, pair, 0.7), rel=1e-5
            )
            reference = getattr(errors, f"reference_{side}")[pair].item()
            assert reference == pytest.approx(expected_error(batch, latents, pair, 0.3), rel=1e-5)
    assert torch.equal(errors.log_snr, -batch.timesteps.float())


def test_gradients_reach_the_policy_and_not_the_reference(batch: Batch):
    model = KnownModel()
    errors = pair_errors(model, batch)
    assert model.calls == ["reference", "policy"]
    assert errors.reference_chosen is not None
    assert not errors.reference_chosen.requires_grad
    DPO(beta=10)(errors).loss.mean().backward()
    assert model.factor.grad is not None
    assert model.factor.grad.abs() > 0


def test_a_step_along_the_gradient_prefers_the_chosen_images(batch: Batch):
    model = KnownModel()
    model.factor = torch.tensor(0.3, requires_grad=True)  # where policy and reference agree
    DPO(beta=10)(pair_errors(model, batch)).loss.mean().backward()
    with torch.no_grad():
        model.factor -= 0.01 * model.factor.grad
    after = DPO(beta=10)(pair_errors(model, batch))
    assert (after.chosen_reward - after.rejected_reward).mean() > 0


def test_the_reference_is_skipped_where_nobody_needs_it(batch: Batch):
    model = KnownModel()
    errors = denoising_errors(model, batch, reference=None)
    assert model.calls == ["policy"]
    assert errors.reference is errors.drift is None


def test_known_reference_predictions_give_the_same_errors(batch: Batch):
    model = KnownModel()
    noisy_latents, timesteps, conditioning, target = add_shared_noise(model, batch)
    with model.reference():
        reference = model.predict(noisy_latents, timesteps, conditioning)
    known = errors_of(model, batch, model.predict(noisy_latents, timesteps, conditioning), target, reference)
    fresh = denoising_errors(model, batch, reference=model.reference)
    assert known.reference is not None and fresh.reference is not None
    assert torch.equal(known.reference, fresh.reference) and torch.equal(known.policy, fresh.policy)


def test_drift_and_cross_are_those_of_the_predictions(batch: Batch):
    model = KnownModel()
    errors = denoising_errors(model, batch, reference=model.reference)
    noisy_latents, *_, target = add_shared_noise(model, batch)
    drift = ((0.7 - 0.3) * noisy_latents).square().flatten(1).mean(1)
    assert errors.drift is not None and errors.cross is not None
    torch.testing.assert_close(errors.drift, drift.view(2, 5).T)
    text = batch.conditioning["text"].view(-1, 1, 1, 1).repeat(2, 1, 1, 1)
    chosen, rejected = (0.7 * noisy_latents + text - target).chunk(2)
    torch.testing.assert_close(errors.cross, (chosen * rejected).flatten(1).mean(1))


@pytest.mark.parametrize("num_images", [1, 2, 4])
def test_images_of_an_example_share_its_noise_and_prompt(batch: Batch, num_images: int):
    latents = torch.randn(5, num_images, *SHAPE, generator=torch.Generator().manual_seed(1))
    errors = denoising_errors(KnownModel(), replace(batch, latents=latents), reference=None)
    for pair in range(5):
        for column in range(num_images):
            expected = expected_error(batch, latents[:, column], pair, 0.7)
            assert errors.policy[pair, column].item() == pytest.approx(expected, rel=1e-5)


def test_masked_errors_are_those_of_the_white_part_and_a_white_mask_changes_nothing(batch: Batch):
    model = KnownModel()
    plain = denoising_errors(model, batch, reference=model.reference)
    white = denoising_errors(model, replace(batch, masks=torch.ones(5, 2, 1, 8, 8)), reference=model.reference)
    for name in ("policy", "reference", "drift", "cross"):
        torch.testing.assert_close(getattr(white, name), getattr(plain, name))
    left = torch.zeros(5, 2, 1, 8, 8)
    left[..., :4] = 2.0
    masked = denoising_errors(model, replace(batch, masks=left), reference=model.reference)
    half = replace(batch, latents=batch.latents[..., :4], noise=batch.noise[..., :4])
    expected = denoising_errors(model, half, reference=model.reference)
    for name in ("policy", "reference", "cross"):
        torch.testing.assert_close(getattr(masked, name), getattr(expected, name))
    torch.testing.assert_close(masked.drift, plain.drift)  # how far the policy has gone is a matter of the whole image


@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_every_image_is_weighed_by_its_own_mask(batch: Batch, num_images: int):
    """A mask of the same pair's other image, or of another pair's image, would give another number."""
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(5, num_images, 1, 8, 8, generator=generator)
    masks = masks / masks.mean((2, 3, 4), keepdim=True)
    latents = torch.randn(5, num_images, *SHAPE, generator=generator)
    masked = replace(batch, latents=latents, masks=masks)
    model = KnownModel()
    errors = denoising_errors(model, masked, reference=model.reference)
    for pair in range(5):
        for column in range(num_images):
            for found, factor in ((errors.policy, 0.7), (errors.reference, 0.3)):
                square = residual(batch, latents[:, column], pair, factor).square()
                expected = (masks[pair, column].double() * square).mean().item()
                assert found[pair, column].item() == pytest.approx(expected, rel=1e-5)
        if num_images == 2:
            chosen, rejected = (residual(batch, latents[:, column], pair, 0.7) for column in (0, 1))
            expected = (masks[pair, 0].double() * chosen * rejected).mean().item()  # where the chosen image counts
            assert errors.cross[pair].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert (errors.cross is None) == (num_images != 2)


def test_the_references_errors_can_be_had_alone(batch: Batch):
    model = KnownModel()
    alone = reference_errors(model, batch)
    assert model.calls == ["reference"]
    assert torch.equal(alone, denoising_errors(model, batch, reference=model.reference).reference)


def test_errors_that_are_known_are_taken_and_the_reference_is_left_alone(batch: Batch):
    model, known = KnownModel(), torch.rand(5, 2)
    errors = denoising_errors(model, replace(batch, reference=known), reference=model.reference, baseline=0.25)
    assert model.calls == ["policy"]
    assert errors.reference is known and errors.drift is None
    assert errors.baseline == 0.25 and denoising_errors(model, batch, reference=None).baseline == 0


@pytest.mark.parametrize("move", ["to", "pin_memory"])
def test_a_batch_is_moved_with_all_that_it_has(batch: Batch, move: str, monkeypatch: pytest.MonkeyPatch):
    meta = torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.to(meta))  # which only CUDA can do
    scores = {"scores": torch.rand(5, 2), "per_image": {"time_ids": torch.rand(5, 2, 6)}}
    moved = replace(batch, **scores).to(meta) if move == "to" else replace(batch, **scores).pin_memory()
    tensors = [moved.latents, moved.noise, moved.timesteps, moved.labels, moved.weights, moved.scores]
    tensors += [moved.conditioning["text"], moved.per_image["time_ids"]]
    assert all(tensor.device == meta for tensor in tensors)
    assert moved.masks is moved.reference is None
    assert moved.latents.shape == batch.latents.shape and moved.per_image["time_ids"].shape == (5, 2, 6)


def test_what_is_said_of_an_image_goes_with_that_image(batch: Batch):
    """The first elements of every image said of it: without noise they are its own."""
    marked = replace(batch, noise=torch.zeros(5, *SHAPE), per_image={"mark": batch.latents.flatten(2)[..., :3]})
    noisy_latents, _, conditioning, _ = add_shared_noise(KnownModel(), marked)
    assert conditioning["mark"].shape == (10, 3)
    assert torch.equal(conditioning["mark"], noisy_latents.flatten(1)[:, :3])
