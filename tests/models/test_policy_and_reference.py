"""Policy, reference and what is saved, of every family alike, in every mode of training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_dpo import train
from diffusion_dpo.models.stable_diffusion import StableDiffusion
from diffusion_dpo.models.stable_diffusion_xl import StableDiffusionXL
from diffusion_dpo.models.unet_diffusion import LoadedUNet, Lora
from tests.runs import MODES, assert_drawn_alike, make_config, read_metrics

CPU = torch.device("cpu")
SETTINGS = {"stable_diffusion": StableDiffusion, "stable_diffusion_xl": StableDiffusionXL}
KINDS = {"full": None, "lora": Lora(rank=2), "lora everywhere": Lora(rank=2, targets=("to_q", "conv1", "proj_in"))}


def load(family: str, folder: Path, lora: Lora | None, **settings: Any) -> LoadedUNet:
    dtype = settings.pop("dtype", torch.float32)
    return SETTINGS[family](pretrained=str(folder), lora=lora, **settings).load(device=CPU, dtype=dtype, seed=0)


def predict(model: LoadedUNet, side: int = 8) -> torch.Tensor:
    noisy = torch.randn(2, 4, side, 8, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[70, 64, 3, 0, 64, 64], [64, 64, 0, 0, 64, 64]])
    conditioning = model.encode_prompts(["abc", "xyz"]) | model.image_conditioning(sizes)
    return model.predict(noisy, torch.tensor([10, 900]), conditioning)


def reference(model: LoadedUNet) -> torch.Tensor:
    with model.reference():
        return predict(model)


def move(model: LoadedUNet, seed: int = 0) -> LoadedUNet:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("start", [None, "adapter", "unet"])
@pytest.mark.parametrize("kind", ["full", "lora everywhere"])
@pytest.mark.parametrize("copied", [True, False], ids=["copy", "left out"])
def test_policy_and_reference_begin_as_one_and_only_the_policy_moves(
    any_family: tuple[str, Path], tmp_path: Path, copied: bool, kind: str, start: str | None, dtype: torch.dtype
) -> None:
    lora = KINDS[kind]
    settings: dict[str, Any] = {"dtype": dtype}
    if start is not None:
        older = KINDS["lora everywhere"] if start == "adapter" else None
        settings["adapter_path"] = move(load(*any_family, older), seed=1).save(tmp_path)
    model = load(*any_family, lora, **settings)
    if copied:
        model.freeze_copy()
    policy = predict(model).detach()
    assert torch.equal(policy, reference(model))
    moved = predict(move(model))
    assert moved.requires_grad and (moved - policy).abs().max() > 1e-3
    with pytest.raises(KeyError), model.reference():
        assert not predict(model).requires_grad
        raise KeyError
    if copied or lora is not None:
        assert torch.equal(reference(model), policy)
    else:  # the caller knows that there is nothing to go back to
        assert torch.equal(reference(model), moved)
    assert torch.equal(predict(model), moved)


def test_a_copy_costs_half_of_what_autocast_rounds_and_nothing_of_what_is_frozen(any_family: tuple[str, Path]) -> None:
    lora = load(*any_family, KINDS["lora"])
    lora.freeze_copy()
    shared = {parameter.data_ptr() for parameter in lora.unet.parameters() if not parameter.requires_grad}
    assert {parameter.data_ptr() for parameter in lora._copy.parameters()} == shared

    full = load(*any_family, None, dtype=torch.bfloat16)
    full.freeze_copy()
    dtypes = {"norm" in name: parameter.dtype for name, parameter in full._copy.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert {parameter.dtype for parameter in full.unet.parameters()} == {torch.float32}
    assert not {p.data_ptr() for p in full._copy.parameters()} & {p.data_ptr() for p in full.unet.parameters()}
    assert not any(parameter.requires_grad for parameter in full._copy.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_are_in_channels_last_and_attention_is_fused(any_family: tuple[str, Path], kind: str) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    model = load(*any_family, KINDS[kind])
    model.freeze_copy()
    for unet in (model.unet, model._copy):
        kernels = [parameter for parameter in unet.parameters() if parameter.ndim == 4]
        assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
        assert {type(processor) for processor in unet.attn_processors.values()} == {AttnProcessor2_0}


def test_the_policy_alone_goes_through_what_it_is_wrapped_in(any_family: tuple[str, Path]) -> None:
    for lora in (None, KINDS["lora"]):
        model = load(*any_family, lora)
        model.freeze_copy()
        expected, names, calls = predict(model).detach(), list(model.trainable()), []

        class Wrapper(torch.nn.Module):
            def __init__(self, inner: torch.nn.Module, calls: list[bool]) -> None:
                super().__init__()
                self.inner, self.calls = inner, calls

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                self.calls.append(True)
                return self.inner(*args, **kwargs)

        wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda inner, calls=calls: Wrapper(inner, calls)  # noqa: E731
        model.wrap_policy(wrap)
        assert torch.equal(reference(model), expected) and not calls
        assert torch.equal(predict(model), expected) and calls == [True]
        assert list(model.trainable()) == names


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora everywhere"])
def test_recomputed_activations_change_no_bit(any_family: tuple[str, Path], kind: str, selective: bool) -> None:
    found, saved = {}, {}
    for name in ("kept", "recomputed"):
        model = move(load(*any_family, KINDS[kind]))
        if name == "recomputed":
            model.enable_gradient_checkpointing(selective=selective)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            prediction = predict(model)
        prediction.square().mean().backward()
        found[name] = [prediction, *(parameter.grad for parameter in model.trainable().values())]
        saved[name] = sum(sizes)
    assert all(torch.equal(a, b) for a, b in zip(found["kept"], found["recomputed"], strict=True))
    assert saved["recomputed"] < saved["kept"] * (1 if selective else 0.7)


@pytest.mark.parametrize("mode", MODES)
def test_sdxl_trains_from_ln_2_in_every_mode(tiny_sdxl: Path, tiny_pairs: Path, tmp_path: Path, mode: str) -> None:
    settings = ["model.type=stable_diffusion_xl", "max_steps=2", "loss.beta=5000", "preview=null", *MODES[mode]]
    train.run(make_config(tiny_sdxl, tiny_pairs, tmp_path, *settings))
    first, second = read_metrics(tmp_path)
    assert abs(first["loss"] - np.log(2)) < 1e-5
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert first["grad_norm"] > 0
    assert second["rewards/chosen"] != 0


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_plain_diffusers_draws_what_sdxl_training_draws(
    tiny_sdxl: Path, tiny_pairs: Path, tmp_path: Path, mode: str
) -> None:
    """In another process, without this package: the saved adapter is the model that the last preview came from."""
    settings = ["model.type=stable_diffusion_xl", "learning_rate=3e-2", "preview.sampling.guidance_scale=3"]
    train.run(make_config(tiny_sdxl, tiny_pairs, tmp_path, *settings, *MODES[mode]))
    assert_drawn_alike(tmp_path, tiny_sdxl, "StableDiffusionXLPipeline", guidance=3)
