"""Compiled blocks: the same predictions and gradients as before, in every mode, for every shape, without giving up."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.models.test_policy_and_reference import KINDS, load, move, predict, reference

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(("kind", "checkpointing"), [("full", False), ("lora", True)])
def test_compiled_blocks_compute_the_same(tiny_sd: Path, kind: str, checkpointing: bool) -> None:
    models = [load("stable_diffusion", tiny_sd, KINDS[kind]) for _ in range(2)]
    for model in models:
        if kind == "full":
            model.freeze_copy()
        if checkpointing:
            model.enable_gradient_checkpointing(selective=False)
    plain, compiled = models
    compiled.compile()
    torch.testing.assert_close(predict(compiled).detach(), reference(compiled), rtol=0, atol=1e-6)
    move(plain)
    move(compiled)
    num_graphs = 0
    for side in (8, 16, 12, 8):  # two shapes, and then no more is compiled
        found: list[Any] = []
        for model in models:
            for parameter in model.trainable().values():
                parameter.grad = None
            prediction = predict(model, side)
            prediction.square().mean().backward()
            grads = [parameter.grad for parameter in model.trainable().values()]
            found.append([prediction.detach(), reference(model), *grads])
        torch.testing.assert_close(*found, rtol=0, atol=1e-4)
        if side == 12:
            num_graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == num_graphs > 0
    assert counters["frames"]["ok"] == counters["frames"]["total"]


def test_an_error_of_the_compiler_is_one_sentence(tiny_sd: Path, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from diffusion_dpo.config import ConfigError
from tests.models.test_policy_and_reference import KINDS, load, predict
model = load("stable_diffusion", Path({str(tiny_sd)!r}), KINDS["lora"])
model.compile()
try:
    predict(model)
except ConfigError as error:
    print("REFUSED", error)
"""
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("REFUSED")]
    assert "compile=true, and torch.compile failed" in line and "Set compile=false" in line
