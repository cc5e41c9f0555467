"""The processes of one run, as `accelerate launch` or `torchrun` start them, and what they have to agree on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this one is; the default is a run of one, in which nothing waits."""

    rank: int = 0
    count: int = 1

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
