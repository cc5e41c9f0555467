"""The numbers of a step: summed on the device over its micro-batches, and fetched once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.losses import ImageErrors, ImageLoss
from diffusion_dpo.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion_dpo.training import Run

_NAMED = 8
_FEATURES = 2


@dataclass
class Totals:
    """Sums over the micro-batches of one step; nothing waits for the device until `fetch`."""

    processes: Processes = field(default_factory=Processes)
    _names: tuple[str, ...] = ()
    _sums: "list[Tensor]" = field(default_factory=list)
    _examples: "list[Tensor]" = field(default_factory=list)

    def add(self, errors: ImageErrors, result: ImageLoss, weights: "Tensor") -> None:
        """Add a micro-batch: the weighted errors, the loss before weights of examples, and those weights."""
        import torch

        cells = _cells(errors, result, weights)
        self._names = tuple(cells)
        pairs = [torch.stack([value.sum(), count.sum()]) for value, count in cells.values()]
        self._sums.append(torch.stack(pairs).detach())
        self._examples.append(torch.stack([result.loss, errors.policy.sum(1)], 1).detach())

    def fetch(self, grad_norm: "Tensor") -> tuple[dict[str, float], list[list[float]]]:
        """Return the means over all processes, and for every example of the step its loss and the sum of its errors.

        `grad_norm` is the same in every process, and is returned among the means.
        """
        import torch

        examples = torch.cat(self._examples)
        if self.processes.count > 1:  # micro-batches are dealt out in turn
            rows = examples.view(len(self._examples), -1, _FEATURES)
            dealt = rows.new_zeros(len(rows), self.processes.count, *rows.shape[1:])
            dealt[:, self.processes.rank] = rows
            examples = dealt
        sums = torch.stack(self._sums).sum(0)
        flat = self.processes.sum(torch.cat([sums.flatten(), examples.flatten()]))
        end = 2 * len(self._names)
        numbers = torch.cat([flat[:end], grad_norm.detach().view(1), flat[end:]]).tolist()
        means = {}
        for i, name in enumerate(self._names):
            total, count = numbers[2 * i : 2 * i + 2]
            if count > 0:
                means[name] = total / count
        means["grad_norm"] = numbers[end]
        rest = numbers[end + 1 :]
        return means, [rest[i : i + _FEATURES] for i in range(0, len(rest), _FEATURES)]


def _cells(errors: ImageErrors, result: ImageLoss, weights: "Tensor") -> "dict[str, tuple[Tensor, Tensor]]":
    """Return for every metric its values, 0 where they do not count, and which count; named as in TRL.

    Of a ranking, chosen is the best and rejected the worst image; an image that tied is neither.
    """
    ones = errors.policy.new_ones(len(errors.policy))
    if errors.policy.shape[1] > 1:
        roles = {"chosen": (0, ones), "rejected": (-1, ones)}
    else:
        liked, disliked = (
            (side > 0).to(ones.dtype) for side in (errors.labels[:, 0] - 0.5, 0.5 - errors.labels[:, 0])
        )
        roles = {"chosen": (0, liked), "rejected": (0, disliked)}
    cells = {"loss": (weights * result.loss, ones)}
    images = {"rewards/": result.rewards, "errors/": errors.policy}
    if errors.reference is not None:
        images["errors/reference_"] = errors.reference
    for prefix, values in images.items():
        cells |= {f"{prefix}{role}": (values[:, column] * mask, mask) for role, (column, mask) in roles.items()}
    if errors.policy.shape[1] > 1:
        margins = result.rewards[:, 0] - result.rewards[:, -1]
        cells["rewards/margins"] = (margins, ones)
        cells["rewards/accuracies"] = ((margins > 0).to(ones.dtype) + 0.5 * (margins == 0).to(ones.dtype), ones)
    if errors.reference is not None:
        cells["errors/advantage"] = ((errors.reference - errors.policy).mean(1), ones)
    if errors.drift is not None:
        cells["errors/drift"] = (errors.drift.mean(1), ones)
    return cells


def refuse_not_finite(run: "Run", step: int, metrics: dict[str, float], examples: Sequence[Sequence[float]]) -> None:
    """Raise ConfigError, saying what is not finite and naming the examples; called before the optimizer's step."""
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    if not names or (names == ["grad_norm"] and run.scaler.is_enabled() and run.scaler.get_scale() >= 1):
        return  # an fp16 overflow: the scaler skips this step and lowers its scale, which starts at 65536
    visits = run.reader.visits(step)
    bad = [visit for visit, row in zip(visits, examples, strict=True) if not all(map(math.isfinite, row))]
    what = "the gradient"
    if bad:
        latents = run.reader.read(bad[:_NAMED]).latents
        predictions = [row[1] for row in examples]
        what = "the loss" if all(map(math.isfinite, predictions)) else "the model's prediction"
        if not latents.isfinite().all():
            what = "a cached latent (remove the folder cache/ to encode again)"
    culprits = bad or visits
    keys = ", ".join(run.reader.examples[visit.index].key for visit in culprits[:_NAMED])
    raise ConfigError(
        f"step {step + 1}: {what} is not finite, so the run stopped before changing the weights. "
        f"{'These pairs did it' if bad else 'The batch held the pairs'}: {keys}{', ...' * (len(culprits) > _NAMED)}. "
        "Lower learning_rate, use bf16 or fp32 instead of fp16, or look at these pairs with `diffusion-dpo inspect`. "
        "Checkpoints of earlier steps are as they were"
    )
