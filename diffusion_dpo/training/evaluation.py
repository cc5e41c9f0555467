"""How training goes, on pairs that it never sees: always the same pairs, timesteps and noise.

Every held-out pair is scored at the same timesteps, the middles of equal parts of the schedule, each with its own
noise. What the reference predicts there cannot change and is computed once.

The estimate of the KL divergence is the difference of the evidence bounds' weights (Kingma et al. 2021, 2107.00630),

    KL(policy || reference)  ~  sum over timesteps of  (change of log SNR) / 2  |epsilon_policy - epsilon_ref|^2

along noisy held-out images instead of the policy's own samples. Against a known divergence, the default 8 timesteps
give 17 % too much and 16 give 6 % (tests/training/test_evaluation.py).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from diffusion_dpo.data.cache import LatentCache
from diffusion_dpo.data.examples import Example
from diffusion_dpo.data.order import Visit, draw_randomness
from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.losses.weighting import error_weights
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import Weighting
from diffusion_dpo.training.batches import gather
from diffusion_dpo.training.errors import Batch, add_shared_noise, errors_of, mean_squares

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class HeldOut:
    """The held-out pairs and the grid that they are scored on."""

    examples: Sequence[Example]
    prompts: Sequence[str]
    """Of each example: pairs of one prompt are not independent, so standard errors are taken over prompts."""
    cache: LatentCache
    num_timesteps: int
    batch_size: int
    seed: int
    only_trained: bool = False
    """Whether the model knows `num_timesteps` timesteps only (`weighting.num_timesteps`), which the grid then has."""
    objective: Objective | None = None
    """What is trained with, where it is about pairs: its value is then measured as well."""
    _reference: "dict[int, Tensor]" = field(default_factory=dict)
    """The reference's predictions by the number of the batch, on the CPU."""
    _original: "dict[int, Tensor]" = field(default_factory=dict)
    """The pretrained model's, where training starts from something else that can be left out."""

    def evaluate(self, model: LoadedModel, processes: Processes = Processes()) -> dict[str, float]:  # noqa: B008
        """Return the metrics `eval/...`; the chosen image's error is the first of each pair's two.

        - loss: the objective's; for DPO minus the log likelihood of the held-out labels, ln 2 before training.
        - accuracy: how often the policy, more than the reference, prefers the chosen image; a tie counts half.
        - margin: mean of (e_ref - e)(chosen) - (e_ref - e)(rejected), without weights and beta.
        - chosen_error, rejected_error: the policy's over the reference's, minus 1; below 0 is better than before.
        - kl: nats per image, from the reference.
        - kl_base: the same from the pretrained model, where that is not what training started from.

        Each `.../se` is a standard error over prompts, `.../log_snr_x` the value at one noise level; clean images have
        a high log SNR.
        """
        import torch

        self.ask_reference(model, processes)
        parts, numbers = self._parts, self._numbers(processes)
        table = torch.zeros(5, len(self.examples) * self.num_timesteps, 2, device=model.device)
        with torch.no_grad():
            for number in numbers:
                place = min(number, len(parts) - 1)
                cells = parts[place]
                batch = self._batch(model, cells).to(model.device)
                reference = self._reference[place].to(model.device)
                noisy_latents, timesteps, conditioning, target = add_shared_noise(model, batch)
                prediction = model.predict(noisy_latents, timesteps, conditioning)
                found = errors_of(model, batch, prediction, target, reference)
                assert found.reference is not None and found.drift is not None
                moved = found.drift
                if self._original:
                    moved = mean_squares(
                        prediction - self._original[place].to(model.device), replace(batch, masks=None)
                    )
                values = [found.policy, found.reference, found.drift, moved]
                if self.objective is not None:
                    values.append(self.objective(found)[1].loss[:, None].expand(-1, 2))
                if number < len(parts):
                    table[: len(values), cells.start : cells.stop] = torch.stack(values)
        table = processes.sum(table).cpu().view(5, len(self.examples), self.num_timesteps, 2).double()
        policy, reference_errors, drift, moved_by, losses = table.numpy()
        metrics = self._measure("eval", policy, reference_errors)
        if self.objective is not None:
            metrics |= self._mean("eval/loss", losses[:, :, 0])
        for column, log_snr in enumerate(model.log_snr(self._timesteps(model).to(model.device)).tolist()):
            part = (slice(None), slice(column, column + 1))
            metrics |= self._measure(f"eval/log_snr_{log_snr:+.2f}", policy[part], reference_errors[part])
        metrics["eval/kl"] = self._kl(model, drift)
        return metrics | ({"eval/kl_base": self._kl(model, moved_by)} if self._original else {})

    def ask_reference(self, model: LoadedModel, processes: Processes = Processes()) -> None:  # noqa: B008
        """Have the reference predict, once, what this process will measure; `evaluate` does not need it afterwards."""
        parts = self._parts
        for place in {min(number, len(parts) - 1) for number in self._numbers(processes)} - self._reference.keys():
            batch = self._batch(model, parts[place]).to(model.device)
            noisy_latents, timesteps, conditioning, _ = add_shared_noise(model, batch)
            with model.reference():
                self._reference[place] = model.predict(noisy_latents, timesteps, conditioning).cpu()
            if (original := model.original()) is not None:
                with original:
                    self._original[place] = model.predict(noisy_latents, timesteps, conditioning).cpu()

    def _numbers(self, processes: Processes) -> range:
        """The batches of a process, equally many for each, which a divided model needs; above the last: it, again."""
        return range(processes.rank, -(-len(self._parts) // processes.count) * processes.count, processes.count)

    @cached_property
    def _shapes(self) -> list[tuple[int, int, int]]:
        return [self.cache.shapes[self.cache.bucket_of[example.images[0][0]]] for example in self.examples]

    @cached_property
    def _parts(self) -> list[range]:
        """The cells of the grid, in batches of one shape: a pair at a timestep, pair by pair."""
        parts, start = [], 0
        for _, group in itertools.groupby(self._shapes):
            end = start + len(list(group)) * self.num_timesteps
            parts += [range(first, min(first + self.batch_size, end)) for first in range(start, end, self.batch_size)]
            start = end
        return parts

    def _batch(self, model: LoadedModel, cells: range) -> Batch:
        """Return some cells as a batch; the number of a cell's timestep is its visit's epoch."""
        visits = [Visit(*divmod(cell, self.num_timesteps)) for cell in cells]
        examples = [self.examples[visit.index] for visit in visits]
        keys = [f"held out {example.key}" for example in examples]
        random = draw_randomness(
            self.seed, visits, keys, self._shapes[visits[0].index], prompt_dropout=0.0, random_flip=False
        )
        return gather(examples, random, self._timesteps(model)[[visit.epoch for visit in visits]], self.cache, model)

    def _timesteps(self, model: LoadedModel) -> "Tensor":
        import torch

        middles = (torch.arange(self.num_timesteps) + 0.5) / self.num_timesteps
        return model.sample_timesteps(middles, self.num_timesteps if self.only_trained else None)

    def _measure(self, name: str, policy: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        """Return the metrics of some cells, from errors of shape (pairs, timesteps, 2)."""
        gain = reference - policy
        margin = gain[:, :, 0] - gain[:, :, 1]
        chosen, rejected = (-gain[:, :, side] / reference[:, :, side].mean() for side in (0, 1))
        cells = {
            "accuracy": (np.sign(margin) + 1) / 2,
            "margin": margin,
            "chosen_error": chosen,
            "rejected_error": rejected,
        }
        metrics: dict[str, float] = {}
        for what, values in cells.items():
            metrics |= self._mean(f"{name}/{what}", values)
        return metrics

    def _mean(self, name: str, values: np.ndarray) -> dict[str, float]:
        """Return the mean of (pairs, timesteps) and, unless there is one prompt only, its standard error.

        Prompts are what was sampled: pairs of one prompt are not independent.
        """
        centred = (values - values.mean()).sum(1)
        sums: dict[str, float] = {}
        for prompt, value in zip(self.prompts, centred, strict=True):
            sums[prompt] = sums.get(prompt, 0.0) + float(value)
        mean = {name: float(values.mean())}
        if len(sums) == 1:
            return mean
        variance = sum(value**2 for value in sums.values()) * len(sums) / (len(sums) - 1)
        return mean | {f"{name}/se": math.sqrt(variance) / values.size}

    def _kl(self, model: LoadedModel, drift: np.ndarray) -> float:
        """Return the estimate, from the drift (pairs, timesteps, 2) where the model predicts."""
        import torch

        edges = (torch.arange(self.num_timesteps + 1) / self.num_timesteps).clamp(max=1 - 1e-6)
        edge_log_snr = model.log_snr(model.sample_timesteps(edges).to(model.device))
        finite = edge_log_snr[edge_log_snr.isfinite()]  # a schedule may end at pure noise, where it is minus infinity
        change = -edge_log_snr.clamp(finite.min(), finite.max()).diff()
        log_snr = model.log_snr(self._timesteps(model).to(model.device))
        to_epsilon = error_weights(Weighting(error_space="epsilon"), model.prediction_type, log_snr, log_snr)
        weights = (change / 2 * to_epsilon).double().cpu().numpy()
        elements = np.array([math.prod(shape) for shape in self._shapes])[:, None, None]
        return float(((drift * elements).mean(axis=(0, 2)) * weights).sum())


def progress_note(metrics: Mapping[str, float]) -> str:
    """Return an evaluation in one line."""
    from_base = f", {metrics['eval/kl_base']:.2g} from the base" if "eval/kl_base" in metrics else ""
    return (
        f"accuracy {metrics['eval/accuracy']:.2f}, chosen error {metrics['eval/chosen_error']:+.2%}, rejected "
        f"{metrics['eval/rejected_error']:+.2%}, KL {metrics['eval/kl']:.2g} nats{from_base}"
    )
