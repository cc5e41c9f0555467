"""The optimum that theory predicts, reached by the real `train`, and what every classic mistake does to it.

With the denoiser of tests/shift_model.py, noise cancels in the logit of DPO: for a shift delta along g,

    u = beta w_t k_t delta x / D,      k_t = alpha_t^2 sigma_t^2,      x = g.(x_chosen - x_rejected) ~ N(0, 2)

so under constant weights the best shift is the root of E_t E_x[k x (p(x) - sigmoid(beta k delta x / D))], where p(x)
is how often the first image is labelled better; and under w_t = 1 / k_t it is a D / beta at every t, where the tuned
model is the base tilted by exp(reward / beta), exactly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file
from scipy.optimize import brentq
from scipy.special import expit

from diffusion_dpo import train
from diffusion_dpo.config import load
from diffusion_dpo.losses import dpo
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training import errors
from tests.shift_model import LoadedShift, ShiftDenoiser

SIDE, BETA = 8, 400.0
D = SIDE**2


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents are encoded once for all these runs."""
    return tmp_path_factory.mktemp("latents")


def shift_after_training(folder: Path, cache_dir: Path, *overrides: str) -> np.ndarray:
    """Train on the shift model with the command's own code; return the shifts, (parts, side, side)."""
    settings = [
        "model.type=tests.shift_model:ShiftDenoiser",
        "data.type=tests.shift_model:ShiftPairs",
        f"loss.beta={BETA}",
        "evaluation.share=0",
        "prompt_dropout=0",
        "weight_decay=0",
        "max_grad_norm=1e9",
        "learning_rate=4e-3",
        "max_steps=200",
        "checkpointing_steps=1000",
        "global_batch_size=256",
        "per_device_batch_size=256",
        "preview=null",
        f"cache_dir={cache_dir}",
        f"output_dir={folder}",
        *overrides,
    ]
    return load_file(train.run(load(TrainConfig, None, settings)) / "shift.safetensors")["shift"].numpy()[:, 0]


def best_shift(*, flip_share: float = 0.0) -> float:
    """The theoretical optimum for reward slope 1 and constant weights, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x, weights = nodes * 2**0.5, weights / weights.sum()
    squared = LoadedShift(ShiftDenoiser()).scheduler.alphas_cumprod.numpy()
    k = (squared * (1 - squared))[:, None]
    label = flip_share + (1 - 2 * flip_share) * expit(x)
    return float(brentq(lambda shift: (k * x * (label - expit(BETA * k * shift * x / D)) * weights).sum(), 0, 30))


def assert_optimal(shift: np.ndarray, theory: float) -> None:
    """Within 10 % along g; across it, no further than the finite number of pairs explains."""
    along = shift.sum() / SIDE
    across = np.sqrt(np.square(shift - along / SIDE).sum() / (D - 1))
    assert along == pytest.approx(theory, rel=0.1)
    assert across < 0.02


def test_the_theory_is_what_the_field_notes_say() -> None:
    assert best_shift() == pytest.approx(0.9626, abs=2e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_training_reaches_the_optimum(tmp_path: Path, cache_dir: Path, prediction: str) -> None:
    # measured as an error of epsilon it is the same objective, whatever the model predicts
    space = ["weighting.error_space=epsilon"] if prediction != "epsilon" else []
    shift = shift_after_training(tmp_path, cache_dir, f"model.prediction={prediction}", *space)
    assert_optimal(shift, best_shift())


def test_flipped_labels_weaken_the_shift_as_theory_says_and_robust_dpo_restores_it(tmp_path: Path) -> None:
    flipped = "data.flip_share=0.2"
    plain = shift_after_training(tmp_path / "plain", tmp_path / "cache", flipped)
    assert_optimal(plain, best_shift(flip_share=0.2))
    robust = ["loss.type=robust_dpo", "loss.flip_rate=0.2", "max_steps=300"]
    restored = shift_after_training(tmp_path / "robust", tmp_path / "cache", flipped, *robust)
    assert restored.sum() / SIDE == pytest.approx(best_shift(), rel=0.1)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_the_tuned_sampler_draws_the_exponential_tilt(tmp_path: Path, tmp_path_factory, beta: float) -> None:
    """One dimension, ten shifts along the schedule, weights 1 / (alpha^2 sigma^2): N(0, 1) becomes N(1 / beta, 1)."""
    one = ["model.side=1", "model.num_parts=10", "data.side=1", "weighting.timesteps=inv_alpha_sigma"]
    cache_dir = tmp_path_factory.getbasetemp() / "one-dimension"
    settings = [*one, f"loss.beta={beta}", "learning_rate=1e-2", "max_steps=300"]
    shift = shift_after_training(tmp_path, cache_dir, *settings)
    assert shift.ravel() == pytest.approx([1 / beta] * 10, rel=0.15)
    samples = draw(torch.from_numpy(shift))
    assert samples.mean() == pytest.approx(1 / beta, rel=0.05)
    assert samples.std() == pytest.approx(1, rel=0.05)


def draw(shift: torch.Tensor) -> torch.Tensor:
    """Sample the tuned model with diffusers' DDIM, eta 1, for the prompt that is pulled up."""
    model = LoadedShift(ShiftDenoiser(side=1, num_parts=len(shift)))
    with torch.no_grad():
        model.shift.copy_(shift[:, None])
        scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(200)
        generator = torch.Generator().manual_seed(0)
        samples = torch.randn(8192, 1, 1, 1, generator=generator)
        conditioning = {"sign": torch.ones(len(samples), 1)}
        for timestep in scheduler.timesteps:
            prediction = model.predict(samples, timestep.expand(len(samples)), conditioning)
            samples = scheduler.step(prediction, timestep, samples, eta=1.0, generator=generator).prev_sample
    return samples


# --- every classic mistake is found ---


def wrong_sign(patch: pytest.MonkeyPatch) -> None:
    real = dpo.implicit_reward
    patch.setattr(dpo, "implicit_reward", lambda *args: -real(*args))


def missing_half(patch: pytest.MonkeyPatch) -> None:
    real = dpo.implicit_reward
    patch.setattr(dpo, "implicit_reward", lambda *args: 2 * real(*args))


def sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    change_errors(patch, lambda found: replace(found, policy=found.policy * D, reference=found.reference * D))


def unshared_noise(patch: pytest.MonkeyPatch) -> None:
    change_shared(patch, lambda values: values.ndim == 4, torch.randn_like)


def unshared_timestep(patch: pytest.MonkeyPatch) -> None:
    change_shared(patch, lambda values: values.dtype == torch.int64, lambda values: torch.randint_like(values, 1000))


def reference_is_the_policy(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing_changes(self: LoadedShift) -> Iterator[None]:
        with torch.no_grad():
            yield

    patch.setattr(LoadedShift, "reference", nothing_changes)


def no_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "_check_step_zero", lambda run, metrics: None)  # it finds this one before the first update
    change_errors(patch, lambda found: replace(found, reference=torch.full_like(found.policy, 1e-12)))


def change_errors(patch: pytest.MonkeyPatch, change: Callable) -> None:
    real = train.denoising_errors
    patch.setattr(train, "denoising_errors", lambda *args, **kwargs: change(real(*args, **kwargs)))


def change_shared(patch: pytest.MonkeyPatch, where: Callable, redraw: Callable) -> None:
    """Draw something anew for the rejected images that they should share with the chosen ones."""
    real = errors.shared

    def wrong(values: torch.Tensor, num_images: int) -> torch.Tensor:
        return torch.cat([values, redraw(values)]) if where(values) else real(values, num_images)

    patch.setattr(errors, "shared", wrong)


@pytest.mark.parametrize(
    "mistake",
    [
        wrong_sign,
        missing_half,
        sum_for_mean,
        unshared_noise,
        unshared_timestep,
        reference_is_the_policy,
        no_reference,
    ],
)
def test_every_classic_mistake_misses_the_optimum(
    tmp_path: Path, cache_dir: Path, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mistake(patch)
        shift = shift_after_training(tmp_path, cache_dir)
    with pytest.raises(AssertionError):
        assert_optimal(shift, best_shift())
