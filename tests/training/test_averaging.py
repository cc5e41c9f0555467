"""The running average is what its formula says, and stands in the policy's place only while it is asked to."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Parameter

from diffusion_dpo.training.averaging import RunningAverage


@pytest.fixture(params=["whole", "divided"])
def parameters(request: pytest.FixtureRequest) -> Iterator[dict[str, Parameter]]:
    """Two weights of a policy; as one process of one has them, and as FSDP divides them."""
    values = {"a": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([[-8.0]])}
    if request.param == "whole":
        yield {name: Parameter(value) for name, value in values.items()}
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield {name: Parameter(distribute_tensor(value, mesh)) for name, value in values.items()}
    distributed.destroy_process_group()


def numbers(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}
    return {name: value.detach().flatten().tolist() for name, value in whole.items()}


def test_it_keeps_its_share_at_every_step_and_takes_the_rest_from_the_policy(parameters: dict[str, Parameter]):
    average = RunningAverage(parameters, 0.75)
    assert numbers(average.values) == {"a": [1, 2, 4], "b": [-8]}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 4
    average.update()
    assert numbers(average.values) == {"a": [2, 3, 5], "b": [-7]}  # 3/4 of the old, 1/4 of the new
    average.update()
    assert numbers(average.values) == {"a": [2.75, 3.75, 5.75], "b": [-6.25]}
    assert numbers(parameters) == {"a": [5, 6, 8], "b": [-4]}
    assert not any(value.requires_grad for value in average.values.values())


def test_the_policy_has_its_own_weights_again_afterwards_whatever_happens(parameters: dict[str, Parameter]):
    average = RunningAverage(parameters, 0.5)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(10)
    policy = numbers(parameters)
    for fails in (False, True):
        try:
            with average.in_place():
                assert numbers(parameters) == {"a": [1, 2, 4], "b": [-8]}
                assert not (parameters["a"] * 2).requires_grad
                if fails:
                    raise InterruptedError
        except InterruptedError:
            assert fails
        assert numbers(parameters) == policy
        assert numbers(average.values) == {"a": [1, 2, 4], "b": [-8]}
        assert (parameters["a"] * 2).requires_grad
