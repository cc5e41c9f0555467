"""Running averages of the trained weights: a reference that follows the policy, and the model that a run ends with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter


class RunningAverage:
    """The average starts as the policy, which before the first step is the base model."""

    def __init__(self, parameters: "Mapping[str, Parameter]", decay: float) -> None:
        """Average `parameters`, keeping the share `decay` of the average at every step."""
        self._parameters: list[Tensor] = list(parameters.values())
        self._decay = decay
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in parameters.items()}

    def update(self) -> None:
        """Move towards the policy; called after every optimizer step."""
        import torch

        with torch.no_grad():
            torch._foreach_lerp_(list(self.values.values()), self._parameters, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the average stands in the place of the policy's weights, and no gradient is recorded."""
        import torch
        from torch.distributed.tensor import DTensor

        # FSDP2 holds on to the memory of weights that are divided among processes: there the values move instead
        whole = [pair for pair in self._pairs() if not isinstance(pair[0], DTensor)]
        parts = [[value.to_local() for value in pair] for pair in self._pairs() if isinstance(pair[0], DTensor)]
        policy, policy_parts = [parameter.data for parameter, _ in whole], [part.clone() for part, _ in parts]
        with torch.no_grad():
            try:
                for parameter, average in whole:
                    parameter.data = average
                for part, average in parts:
                    part.copy_(average)
                yield
            finally:
                for (parameter, _), data in zip(whole, policy, strict=True):
                    parameter.data = data
                for (part, _), values in zip(parts, policy_parts, strict=True):
                    part.copy_(values)

    def _pairs(self) -> "Iterator[tuple[Any, Any]]":
        return zip(self._parameters, self.values.values(), strict=True)
