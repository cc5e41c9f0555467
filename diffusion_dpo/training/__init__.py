"""What a training run is made of; `train.py` holds the loop."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_dpo.losses.objective import Objective
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.training.averaging import RunningAverage
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
    optimizer: "torch.optim.Optimizer"
    scaler: "torch.amp.GradScaler"
    averaged: RunningAverage | None
    """The running average of the policy, where that is the reference."""
    ema: RunningAverage | None
    """The running average of the policy, where that is the result."""
    held_out: HeldOut | None
    health: Health
    accumulating: Callable[[bool], AbstractContextManager[object]]
    """The context of a micro-batch; the argument says whether it is the last of its step."""
    identity: str = ""
    """Hash of what makes this run another than any other; a checkpoint of another run is refused."""
    kl: float = 0.0
    """The KL divergence from the reference, in nats per image, at the last evaluation."""
    kl_base: float | None = None
    """The same from the pretrained model, where training started from something else that can be left out."""

    @property
    def processes(self) -> Processes:
        """The processes that train together."""
        return self.reader.processes

    @property
    def beyond_budget(self) -> bool:
        """Whether the last evaluation found the policy further from the reference than it may go."""
        limit = self.config.evaluation.max_kl
        return limit is not None and not self.kl <= limit

    @property
    def reference(self) -> "Callable[[], AbstractContextManager[None]] | None":
        """The context in which the model is its reference; None where a step does without asking it."""
        if not self.objective.needs_reference or self.reader.cached is not None:
            return None
        return self.model.reference if self.averaged is None else self.averaged.in_place

    def as_result(self) -> AbstractContextManager[None]:
        """Within it, the model is what the run has to show: the running average, where one is kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()
