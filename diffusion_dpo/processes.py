"""The processes of one run, as `accelerate launch` or `torchrun` start them, and what they have to agree on."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from diffusion_dpo import console
from diffusion_dpo.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


_SIZES_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; the default is a run of one, in which nothing waits."""

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls, device: str) -> Self:
        """Meet the others that the launcher has started, if any; from then on only the main process prints.

        `device` is the setting; every process takes the GPU of its local rank.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        by_mpi = any(int(os.environ.get(name, "1")) > count for name in _SIZES_OF_MPI)
        if by_mpi or (count > 1 and "RANK" not in os.environ):
            raise ConfigError("start several processes with `accelerate launch` or `torchrun`, which name their ranks")
        if count == 1:
            return cls()
        import torch

        processes = cls(int(os.environ["RANK"]), count)
        if not processes.is_main:
            console.silence()
        on_cuda = device in ("auto", "cuda") and torch.cuda.is_available() and not told_to_use_cpu()
        if on_cuda:
            local_rank, num_devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= num_devices:
                raise ConfigError(
                    f"{num_devices} GPUs are here, and the launcher starts more processes than that on this machine; "
                    f"set --num_processes {num_devices}"
                )
            torch.cuda.set_device(local_rank)
        # main may check and encode data for hours while the others wait; a process that dies ends all at once anyway
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(days=7))
        return processes

    def leave(self) -> None:
        """Part from the others, once all are done."""
        if self.count > 1:
            import torch.distributed

            self.wait()
            torch.distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes, and that speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()

    def from_main(self, value: Any) -> Any:
        """Return the main process's `value` (plain data) in every process; the others' own is not looked at."""
        if self.count == 1:
            return value
        import torch.distributed

        box: list[Any] = [value]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return this process's part of work that all have before them: every item is in exactly one part."""
        return items[self.rank :: self.count]

    def sum(self, tensor: "Tensor") -> "Tensor":
        """Return the sum over all processes of a tensor that has the same shape in each."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.all_reduce(tensor)
        return tensor

    def highest(self, number: int) -> int:
        """Return the highest of the processes' numbers."""
        if self.count == 1:
            return number
        import torch
        import torch.distributed

        box = torch.tensor(number)
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return int(box)


def told_to_use_cpu() -> bool:
    """Whether the launcher was started with --cpu."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def speaks_of_failure() -> bool:
    """Whether this process is the first of its run that fails or is stopped; the others only follow."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    import torch.distributed

    if not torch.distributed.is_initialized():
        return os.environ["RANK"] == "0"
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return int(store.add("diffusion_dpo/failures", 1)) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


def explain_lost_process(error: Exception) -> ConfigError | None:
    """Return what to tell the user when an error says that another process is gone; None for every other error."""
    import torch.distributed

    if not torch.distributed.is_initialized() or not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(words in text for words in ("gloo", "closed by peer", "reset by peer", "remote process")):
        return ConfigError(
            "another process of this run has died, so this one stops; if it could say why, that is above. Checkpoints "
            f"are as they were: the same command continues from the last one ({text.strip().splitlines()[0][:200]})"
        )
    return None
