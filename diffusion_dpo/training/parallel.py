"""One policy in many processes: a copy in each (DDP), or a part in each (FSDP2), as the launcher was told.

DDP averages the gradients of the processes. FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`, or
configs/accelerate/fsdp2.yaml) also divides weights, gradients, optimizer state and averages among them while training;
it is for full fine-tuning. The weights alone have to fit each GPU, where the images are encoded and the reference is
asked.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.console import say
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffusion_dpo.training import Run

Accumulating = Callable[[bool], AbstractContextManager[object]]
"""The context of a micro-batch; the argument says whether it is the last of its step."""


def refuse_launcher(config: TrainConfig, processes: Processes) -> None:
    """Raise ConfigError where the launcher asks for what cannot be done; called before anything slow."""
    env = os.environ
    if env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "the launcher was told to use DeepSpeed, which cannot be used here (docs/performance.md says why); what "
            "ZeRO-3 divides, FSDP2 divides as well: launch with configs/accelerate/fsdp2.yaml"
        )
    if _told_to_divide():
        if env.get("FSDP_VERSION", "2") != "2":
            raise ConfigError(f"the launcher was told to use version {env['FSDP_VERSION']} of FSDP; set it to 2")
        if getattr(config.model, "lora", None) is not None:
            raise ConfigError("FSDP2 is for full fine-tuning (model.lora=null); a LoRA is small: launch it with DDP")
        if config.optimizer != "adamw":
            raise ConfigError(
                f"optimizer={config.optimizer} does not work on weights that FSDP2 divides; set optimizer=adamw, "
                "whose state is divided, too"
            )
        if processes.count == 1:
            say("one process: there is nothing that FSDP2 could divide")
    if env.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        say("the launcher's mixed_precision is not looked at; the setting mixed_precision is")


def _told_to_divide() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def distribute(model: LoadedModel, processes: Processes) -> Accumulating:
    """Let the model's policy be trained by all processes together; return the context for each micro-batch."""
    from torch.nn.parallel import DistributedDataParallel

    if processes.count == 1:
        return lambda last: nullcontext()
    if _told_to_divide():
        return _shard(model)
    found: list[DistributedDataParallel] = []

    def wrap(module: "Module") -> "Module":
        found.append(DistributedDataParallel(module, gradient_as_bucket_view=True))
        return found[0]

    model.wrap_policy(wrap)
    return lambda last: nullcontext() if last else found[0].no_sync()


def _shard(model: LoadedModel) -> Accumulating:
    from torch import contiguous_format
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn import ModuleList

    found: list[FSDPModule] = []

    def wrap(module: "Module") -> "Module":
        module.to(memory_format=contiguous_format)  # FSDP2 divides no others
        for block in module.children():
            for part in block if isinstance(block, ModuleList) else [block]:
                fully_shard(part)
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        found.append(module)
        return module

    model.wrap_policy(wrap)

    def accumulating(last: bool) -> AbstractContextManager[object]:
        found[0].set_requires_gradient_sync(last)
        return nullcontext()

    return accumulating


def whole(tensor: "Tensor") -> "Tensor":
    """Return all of a tensor that may be divided among the processes, each of which has to call this."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put(target: "Tensor", value: "Tensor") -> None:
    """Copy a whole tensor into one that may be divided among the processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def gather(run: "Run") -> None:
    """Make the model of the main process whole, to be saved; what was divided cannot be trained on afterwards."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    if not any(isinstance(parameter, DTensor) for parameter in run.parameters.values()):
        return
    unet = run.model.pipeline.unet
    for name, parameter in run.parameters.items():
        full = whole(parameter)
        owner, _, leaf = name.rpartition(".")
        if run.processes.is_main:
            unet.get_submodule(owner)._parameters[leaf] = Parameter(full.cpu())
    if isinstance(unet, FSDPModule):
        unet.__class__ = type(unet).__bases__[1]  # what it was before, whose name is written beside the weights
