"""What a training run is made of; `train.py` holds the loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.averaging import AveragedReference
from diffusion_dpo.training.batches import Reader
from diffusion_dpo.training.evaluation import HeldOut
from diffusion_dpo.training.health import Health

if TYPE_CHECKING:
    import torch


@dataclass
class Run:
    """Everything that a training step needs."""

    config: TrainConfig
    model: LoadedModel
    objective: Objective
    reader: Reader
    parameters: "dict[str, torch.nn.Parameter]"
    optimizer: "torch.optim.AdamW"
    scaler: "torch.amp.GradScaler"
    averaged: AveragedReference | None
    """The running average of the policy, where that is the reference."""
    held_out: HeldOut | None
    health: Health
    identity: str = ""
    """Hash of what makes this run another than any other; a checkpoint of another run is refused."""
    kl: float = 0.0
    """The KL divergence from the reference, in nats per image, at the last evaluation."""

    @property
    def beyond_budget(self) -> bool:
        """Whether the last evaluation found the policy further from the reference than it may go."""
        limit = self.config.evaluation.max_kl
        return limit is not None and not self.kl <= limit

    @property
    def reference(self) -> "Callable[[], AbstractContextManager[None]] | None":
        """The context in which the model is its reference; None where the objective does without."""
        if not self.objective.needs_reference:
            return None
        return self.model.reference if self.averaged is None else self.averaged.in_place
