"""How many bytes tensors hold, from operation to operation; of fake tensors it tells what real ones would hold.

A storage counts from the operation that makes it until the last tensor, or autograd, lets go of it. What operations
take for themselves while they run (workspaces of cuDNN and oneDNN) is not seen.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALIGNMENT = 512
"""Bytes that allocators hand out memory in multiples of: those of CUDA; of the CPU it is 64, which is less."""


class LiveBytes(TorchDispatchMode):
    """Within it, `live` is what the tensors made since hold, and `peak` the most that it has been."""

    def __init__(self, there: Iterable[torch.Tensor] = ()) -> None:
        """Count from nothing; the tensors that are `there` already are never counted."""
        super().__init__()
        self.live = self.peak = 0
        self._there = [tensor.untyped_storage() for tensor in there]  # kept, or an address might be used again
        self._known: dict[int, object] = {storage._cdata: storage for storage in self._there}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
