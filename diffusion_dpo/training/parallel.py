"""One policy in many processes: a copy in each (DDP), or a part in each (FSDP2), as the launcher was told.

DDP averages the gradients of the processes. FSDP2 (`accelerate launch --use_fsdp --fsdp_version 2`, or
configs/accelerate/fsdp2.yaml) also divides weights, gradients and optimizer state among them, for what no single GPU
holds; it is for full fine-tuning.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models import LoadedModel
from diffusion_dpo.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from diffusion_dpo.training import Run

Accumulating = Callable[[bool], AbstractContextManager[object]]
"""The context of a micro-batch; the argument says whether it is the last of its step."""


def distribute(model: LoadedModel, processes: Processes) -> Accumulating:
    """Let the model's policy be trained by all processes together; return the context for each micro-batch."""
    from torch.nn.parallel import DistributedDataParallel

    if processes.count == 1:
        return lambda last: nullcontext()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "the launcher was told to use DeepSpeed; what ZeRO-3 divides, FSDP2 divides as well: launch with "
            "configs/accelerate/fsdp2.yaml"
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
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
        if not all(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError("FSDP2 is for full fine-tuning (model.lora=null); a LoRA is small: launch it with DDP")
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
    from torch.distributed.tensor import DTensor
    from torch.nn import Parameter

    for name, parameter in run.parameters.items():
        if isinstance(parameter, DTensor):
            full = whole(parameter).cpu()
            owner, _, leaf = name.rpartition(".")
            if run.processes.is_main:
                run.model.pipeline.unet.get_submodule(owner)._parameters[leaf] = Parameter(full)
