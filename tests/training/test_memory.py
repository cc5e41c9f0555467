"""The memory estimate: what tensors hold, what optimizers keep, and a simulated step against a real one."""

import gc
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.optimization import Adafactor

from diffusion_dpo.config import load
from diffusion_dpo.data import collect
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.train import train_step
from diffusion_dpo.training.live_bytes import ALIGNMENT, LiveBytes
from diffusion_dpo.training.memory import GIB, OPTIMIZER_BYTES, Estimator, make_estimator
from diffusion_dpo.training.setup import prepare
from tests.runs import make_config

KINDS = {
    "lora": ["model.lora.rank=4"],
    "full": ["model.lora=null"],
    "lora, checkpointing": ["model.lora.rank=4", "gradient_checkpointing=true"],
    "full, checkpointing": ["model.lora=null", "gradient_checkpointing=true"],
    "full, one micro-batch": ["model.lora=null", "global_batch_size=2"],
}


def on_cpu(config: TrainConfig) -> Estimator:
    return make_estimator(config, "cpu", torch.float32)


# --- live bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [False, True])
def test_a_storage_counts_from_its_making_to_its_end(fake: bool) -> None:
    mode = FakeTensorMode() if fake else nullcontext()
    with mode:
        there = torch.zeros(1000)
    with mode, LiveBytes([there]) as counted:
        first = torch.empty(256, 4)  # 4 KiB
        assert counted.live == 4096
        view = first[:, 1:]
        there.add_(1)
        assert counted.live == 4096, "views and what was there hold nothing new"
        second = torch.empty(1, dtype=torch.uint8)
        assert counted.live == 4096 + ALIGNMENT
        del first
        assert counted.live == 4096 + ALIGNMENT, "the view still needs it"
        del view, second
        assert (counted.live, counted.peak) == (0, 4096 + ALIGNMENT)


def test_what_autograd_saves_is_alive_until_the_backward() -> None:
    weight = torch.ones(1024, requires_grad=True)
    with LiveBytes([weight]) as counted:
        loss = weight.exp().exp().sum()
        assert counted.live == 2 * 4096 + ALIGNMENT, "both results of exp, which are their own derivatives"
        loss.backward()
        del loss
        assert counted.live == 4096, "the gradient"


# --- what is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("lora", ["{rank: 4}", "null"])
def test_weights_and_optimizer_state_are_those_of_the_real_ones(kind: str, lora: str, tiny_sd: Path) -> None:
    config = load(TrainConfig, None, [f"model.pretrained={tiny_sd}", f"model.lora={lora}", f"optimizer={kind}"])
    model = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
    parameters = list(model.trainable().values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, fused=True)
    else:
        optimizer = Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    real = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    assert OPTIMIZER_BYTES[kind](on_cpu(config).skeleton.trained()) == real
    held = on_cpu(config).held(config)
    assert held["optimizer state"] == real
    assert held["weights of the denoiser"] == sum(value.nbytes for value in model.unet.parameters())


def test_8_bit_state_is_a_byte_and_its_scales_but_for_small_tensors() -> None:
    small, large = torch.empty(4095, device="meta"), torch.empty(4096, device="meta")
    assert OPTIMIZER_BYTES["adamw_8bit"]([small]) == 8 * 4095
    assert OPTIMIZER_BYTES["adamw_8bit"]([large]) == 2 * (4096 + 4 * 16)


@pytest.mark.parametrize(
    ("settings", "copies", "averages"),
    [
        (["model.lora=null"], 1, 0),
        (["model.lora=null", "reference.type=cached"], 0, 0),
        (["model.lora=null", "reference.type=ema"], 0, 1),
        (["model.lora=null", "loss.type=mapo", "ema_decay=0.9"], 0, 1),
        ([], 0, 0),
    ],
)
def test_what_is_kept_beside_the_weights(settings: list[str], copies: int, averages: int, tiny_sd: Path) -> None:
    config = load(TrainConfig, None, [f"model.pretrained={tiny_sd}", *settings])
    held = on_cpu(config).held(config)
    weights = held["weights of the denoiser"]
    assert held["frozen copy for the reference"] == copies * weights
    assert held["running averages"] == averages * weights
    half = make_estimator(config, "cuda", torch.bfloat16).held(config)["frozen copy for the reference"]
    assert copies * 0.5 * weights <= half < max(0.6 * copies * weights, 1), "layers that autocast rounds are stored so"


# --- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_a_simulated_step_holds_what_a_real_one_does(
    settings: list[str], tiny_sd: Path, tiny_pairs: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_sd, tiny_pairs, tmp_path / "run", *settings)
    foretold = on_cpu(config).step(config)
    data = collect.collect(config.data, max_broken_share=0)
    model = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
    run = prepare(config, model, data, torch.float32)
    batches = run.reader.stream(0)
    train_step(run, 0, batches)  # the optimizer's state is there from then on
    run.optimizer.zero_grad(set_to_none=True)
    there = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    with LiveBytes(there) as counted:
        train_step(run, 1, batches)
    accumulates = config.gradient_accumulation_steps > 1
    gradients = sum(parameter.nbytes for parameter in run.parameters.values()) if accumulates else 0
    assert foretold.peak + gradients == pytest.approx(counted.peak, rel=0.1)


def test_more_pairs_need_more_and_checkpointing_less() -> None:
    def total(*settings: str) -> float:
        config = load(TrainConfig, None, ["global_batch_size=48", *settings])
        return estimator.estimate(config).total

    estimator = on_cpu(TrainConfig())
    sizes = [total(f"per_device_batch_size={size}", "preview=null") for size in (1, 2, 4, 16, 24)]
    assert sizes == sorted(set(sizes))
    whole, selective, none = (
        estimator.step(load(TrainConfig, None, [f"gradient_checkpointing={how}"])).saved
        for how in ("true", "selective", "false")
    )
    assert whole < selective < none


def test_cuda_norms_in_float32_and_half_precision_saves_more_than_half() -> None:
    config = TrainConfig(per_device_batch_size=1)
    half, single = (make_estimator(config, "cuda", dtype).step(config) for dtype in (torch.bfloat16, torch.float32))
    on_a_cpu = make_estimator(config, "cpu", torch.bfloat16).step(config)
    assert 0.5 * single.saved < half.saved < single.saved
    assert on_a_cpu.saved < half.saved, "a CPU's autocast leaves norms in bfloat16"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured on Linux")
@pytest.mark.parametrize("settings", [["model.lora.rank=8"], ["model.lora=null"]], ids=["lora", "full"])
def test_the_estimate_is_within_15_percent_of_a_real_run(
    settings: list[str], tiny_pairs: Path, tmp_path: Path
) -> None:
    program = (
        "import re, sys, torch; from diffusion_dpo import train; from diffusion_dpo.config import load\n"
        "from diffusion_dpo.settings import TrainConfig; from diffusion_dpo.training.memory import make_estimator\n"
        "config = load(TrainConfig, None, sys.argv[2:])\n"
        "if sys.argv[1] == 'estimate':\n"
        "    print(make_estimator(config, 'cpu', torch.float32).estimate(config).total)\n"
        "else:\n"
        "    train.run(config)\n"  # not ru_maxrss, in which a process inherits its parent's peak
        "    print(1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]))\n"
    )
    sizes = ["max_steps=2", "per_device_batch_size=16", "global_batch_size=32", "preview=null", "device=cpu"]
    paths = [f"data.path={tiny_pairs}", f"output_dir={tmp_path / 'run'}"]

    def last_number(what: str) -> float:
        command = [sys.executable, "-c", program, what, *paths, *sizes, *settings]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    assert last_number("estimate") / GIB == pytest.approx(last_number("train") / GIB, rel=0.15)
