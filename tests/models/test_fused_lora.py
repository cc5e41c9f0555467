"""The fused LoRA layer against peft's own."""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import Linear

from diffusion_dpo.models.fused_lora import fuse
from diffusion_dpo.models.lora_layers import only


def make_layers(*, names: tuple[str, ...] = ("start", "default"), bias: bool = True) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(12, 20, bias=bias), torch.nn.Linear(20, 12))
    model.requires_grad_(False)
    for number, name in enumerate(names):
        config = LoraConfig(r=3 + number, lora_alpha=7, target_modules=["0", "1"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            model = inject_adapter_in_model(config, model, adapter_name=name)
    for module in model.modules():
        if isinstance(module, Linear):
            module.set_adapter(list(names))
            for parameter in module.lora_B.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("names", [("default",), ("start", "default")])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pefts(shape: tuple[int, ...], names: tuple[str, ...], bias: bool) -> None:
    peft = make_layers(names=names, bias=bias).double()
    fused = copy.deepcopy(peft)
    fuse(fused)
    assert {type(module) is Linear for module in fused} == {False}
    found = []
    for model in (peft, fused):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    assert len(found[0]) == 2 + 4 * len(names)
    torch.testing.assert_close(*found)


def test_what_is_switched_off_is_left_out() -> None:
    peft = make_layers()
    fused = copy.deepcopy(peft)
    fuse(fused)
    x = torch.randn(2, 5, 12)
    for model in (peft, fused):
        layers = list(model)
        model.results = [model(x)]
        with only(layers, "start"):
            model.results.append(model(x))
        with only(layers):
            model.results.append(model(x))
        for layer in layers:
            layer.merge()
        model.results.append(model(x))
    torch.testing.assert_close(peft.results, fused.results)
    torch.testing.assert_close(fused.results[0], fused.results[3])
    assert not torch.allclose(fused.results[0], fused.results[1])
    assert not torch.allclose(fused.results[1], fused.results[2])


def test_half_precision_rounds_no_more_than_pefts() -> None:
    peft = make_layers()
    fused, exact = copy.deepcopy(peft), copy.deepcopy(peft).double()
    fuse(fused)
    x = torch.randn(64, 12)
    target = exact(x.double())
    errors = []
    for model in (peft, fused):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x.bfloat16()).detach()
        assert y.dtype == torch.bfloat16
        errors.append(math.sqrt((y.double() - target).square().mean()))
    assert errors[1] <= errors[0]
