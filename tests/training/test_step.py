"""The gradient of a step is that of the weighted mean over the global batch, however it is divided."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_dpo.processes import Processes
from diffusion_dpo.train import train_step
from diffusion_dpo.training import Run
from diffusion_dpo.training.errors import denoising_errors
from tests.training.test_evaluation import prepared, shift

SETTINGS = ["loss.beta=200", "max_grad_norm=1e9", "warmup_steps=4", "learning_rate=0.02"]


class Rank(Processes):
    """One of several processes, of which the others are not there."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def ready(folder: Path, size: int, processes: Processes) -> Run:
    """A run whose examples weigh from 1/2 to 2, with a policy that is not the reference."""
    run = prepared(folder, *SETTINGS)
    config = run.config.model_copy(update={"per_device_batch_size": size})
    shift(run, 1.0, seed=5)
    count = len(run.reader.examples)
    weighed = [replace(it, weight=0.5 + 1.5 * place / count) for place, it in enumerate(run.reader.examples)]
    run.reader = replace(run.reader, config=config, examples=weighed, processes=processes)
    return run


def gradient_of(run: Run, part: slice) -> torch.Tensor:
    """Of the weighted losses of some of step 0's examples, over all 8, at once."""
    batch = run.reader.read(run.reader.visits(0)[part])
    errors = denoising_errors(run.model, batch, reference=run.model.reference)
    loss = sum(
        weight * value for weight, value in zip(batch.weights.tolist(), run.objective(errors)[1].loss, strict=True)
    )
    (gradient,) = torch.autograd.grad(loss / 8, list(run.parameters.values()))
    return gradient


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_add_up_to_the_mean_of_the_whole(tmp_path: Path, size: int):
    run = ready(tmp_path, size, Processes())
    expected = gradient_of(run, slice(8))
    metrics = train_step(run, 0, run.reader.stream(0))
    (parameter,) = run.parameters.values()
    torch.testing.assert_close(parameter.grad, expected)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    assert metrics["learning_rate"] == 0.02 / 4  # the first of four steps of warm-up


def test_the_mean_of_the_processes_gradients_is_that_of_the_whole(tmp_path: Path):
    whole = gradient_of(ready(tmp_path / "whole", 8, Processes()), slice(8))
    gradients = []
    for rank in (0, 1):
        run = ready(tmp_path / str(rank), 2, Rank(rank, 2))
        train_step(run, 0, run.reader.stream(0))
        (parameter,) = run.parameters.values()
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
    torch.testing.assert_close((gradients[0] + gradients[1]) / 2, whole)
    assert not torch.allclose(gradients[0], gradients[1], rtol=0.01)
