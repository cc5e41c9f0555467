"""What a step does not do: wait for the device, encode, or run the denoiser more often than it has to."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_dpo.data.collect import collect
from diffusion_dpo.train import train_step
from diffusion_dpo.training import Run
from diffusion_dpo.training.metrics import Totals
from diffusion_dpo.training.setup import prepare
from tests.runs import MODES, make_config

KINDS = {
    **MODES,
    "ema": ["ema_decay=0.9"],
    "adafactor": ["optimizer=adafactor"],
    "cached": ["reference.type=cached"],
    "kto": ["loss.type=kto"],
    "safeguard": ["safeguard_mu=0.9", "weighting.timesteps=min_snr"],
}
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default, torch.ops.aten.nonzero.default}


def prepared(model: Path, pairs: Path, folder: Path, *overrides: str) -> Run:
    config = make_config(model, pairs, folder, "preview=null", *overrides)
    live: Any = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)  # type: ignore[attr-defined]
    return prepare(config, live, collect(config.data, max_broken_share=0), torch.float32)  # type: ignore[arg-type]


class Calls(TorchDispatchMode):
    """Counts the operations that are dispatched, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()
        self.is_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += self.is_on
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_asks_the_device_for_nothing_but_its_metrics(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    """On a GPU, each of these operations waits until all that was queued is done."""
    settings = ["global_batch_size=2", *KINDS[kind]]
    run, calls, real = prepared(tiny_sd, tiny_pairs, tmp_path, *settings), Calls(), Totals.fetch

    def fetch(self: Totals, grad_norm: torch.Tensor) -> tuple[dict[str, float], list[list[float]]]:
        calls.is_on = False
        try:
            return real(self, grad_norm)
        finally:
            calls.is_on = True

    monkeypatch.setattr(Totals, "fetch", fetch)
    batches = iter([run.reader[step, 0] for step in range(2)])
    with calls:
        for step in range(2):
            train_step(run, step, batches)
    assert not {str(op): count for op, count in calls.seen.items() if op in WAITS}
    assert calls.seen[torch.ops.aten.convolution.default] > 0


@pytest.mark.parametrize(
    ("settings", "forwards"),
    [([], ["reference", "policy"]), (["reference.type=cached"], ["policy"]), (["loss.type=sft"], ["policy"])],
)
def test_all_images_of_a_micro_batch_go_through_the_denoiser_at_once_and_nothing_is_encoded(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings, forwards
):
    run, seen = prepared(tiny_sd, tiny_pairs, tmp_path, *settings), []
    unet = run.model.pipeline.unet

    def note(module, args, kwargs):
        seen.append(("policy" if torch.is_grad_enabled() else "reference", len(args[0])))

    unet.register_forward_pre_hook(note, with_kwargs=True)
    for part in ("vae", "text_encoder"):
        monkeypatch.setattr(getattr(run.model.pipeline, part), "forward", None)
    monkeypatch.setattr(run.model.pipeline.vae, "encode", None)
    train_step(run, 0, run.reader.stream(0))
    images = 2 if run.objective.loss.unit == "pair" else 1
    assert seen == [(who, images * 2) for who in forwards] * 2


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_convolutions_run_in_channels_last_and_attention_in_one_kernel(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, mode: str
):
    run = prepared(tiny_sd, tiny_pairs, tmp_path, *MODES[mode])
    weights = [module.weight for module in run.model.pipeline.unet.modules() if isinstance(module, torch.nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    with Calls() as calls:
        train_step(run, 0, run.reader.stream(0))
    names = {str(op) for op in calls.seen}
    assert any("scaled_dot_product" in name for name in names)
    assert not any("softmax" in name for name in names)
