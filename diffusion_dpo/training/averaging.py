"""Running averages of the trained weights: a reference that follows the policy, and the model that a run ends with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

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

        policy = [parameter.data for parameter in self._parameters]
        try:
            for parameter, average in zip(self._parameters, self.values.values(), strict=True):
                parameter.data = average
            with torch.no_grad():
                yield
        finally:
            for parameter, data in zip(self._parameters, policy, strict=True):
                parameter.data = data
