"""How much `train` costs over a bare loop of the same forward and backward calls on tensors that are already there.

    python scripts/bench_train.py                                    # the pocket model, full fine-tuning
    python scripts/bench_train.py model.lora.rank=8 global_batch_size=16 per_device_batch_size=16

Settings are those of `diffusion-dpo train`. Real steps and bare steps alternate in one process, so that a busy machine
slows both alike; the figures are medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffusion_dpo.config import load
from diffusion_dpo.data import collect
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.shards import PAIRS, encode_png, write_shard
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.pocket.world import distinct_scenes, render
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.train import train_step
from diffusion_dpo.training import Run
from diffusion_dpo.training.setup import prepare

NUM_PAIRS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["model.lora=null"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = bench_run(Path(folder), args.settings)
        bare, batches = bare_step(run), run.reader.stream(0)
        real_seconds, bare_seconds = [], []
        for step in range(args.steps + 2):
            real_seconds.append(timed(lambda step=step: train_step(run, step, batches), run.model.device))
            bare_seconds.append(timed(bare, run.model.device))
    real, floor = statistics.median(real_seconds[2:]), statistics.median(bare_seconds[2:])
    ratio = statistics.median(a / b for a, b in zip(real_seconds[2:], bare_seconds[2:], strict=True))
    size = run.config.global_batch_size
    print(f"train       {1000 * real:8.1f} ms a step   {size / real:8.1f} pairs/s")
    print(f"bare loop   {1000 * floor:8.1f} ms a step   {size / floor:8.1f} pairs/s")
    print(f"train / bare loop: {ratio:.3f}; outside the model: {max(0.0, 1 - 1 / ratio):.1%} of a step")


def bench_run(folder: Path, settings: list[str]) -> Run:
    """A run over rendered pairs, ready for its first step."""
    rng, scenes, rows = np.random.default_rng(0), distinct_scenes(0), []
    for _ in range(NUM_PAIRS):
        right, wrong = next(scenes), next(scenes)
        chosen, rejected = (encode_png(render(scene, rng)) for scene in (right, wrong))
        rows.append(pair_row(make_pair("bench", right.caption, chosen, rejected, source="bench")))
    (folder / "pairs").mkdir()
    write_shard(folder / "pairs" / "pairs-00000.parquet", rows, PAIRS)
    paths = [f"data.path={folder / 'pairs'}", f"output_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}"]
    sizes = ["global_batch_size=32", "per_device_batch_size=32"]
    config = load(TrainConfig, None, [*paths, *sizes, *settings])
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    data = collect.collect(config.data, max_broken_share=0)
    model = config.model.load(device=device, dtype=dtype, seed=0)
    return prepare(config, model, data, dtype)


def bare_step(run: Run) -> Callable[[], None]:
    """The least that a step can be: reference forward, policy forward, logistic loss, backward, clip, AdamW."""
    numbers = range(run.config.gradient_accumulation_steps)
    batches = [run.reader[0, number].to(run.model.device) for number in numbers]
    optimizer = torch.optim.AdamW(run.parameters.values(), lr=1e-12, fused=True)
    inputs = []
    for batch in batches:
        latents, noise = torch.cat(batch.latents.unbind(1)), torch.cat([batch.noise] * 2)
        timesteps = torch.cat([batch.timesteps] * 2)
        text = torch.cat([batch.conditioning["encoder_hidden_states"]] * 2)
        noisy = run.model.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        inputs.append((noisy, timesteps, text, run.model.target(latents, noise, timesteps)))

    def errors(noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(run.model.device.type, run.model.dtype, enabled=run.model.dtype != torch.float32):
            prediction = run.model.unet(noisy, timesteps, text).sample
        return (prediction.float() - target).square().flatten(1).mean(1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in inputs:
            with run.model.reference():
                reference = errors(*batch)
            advantage, disadvantage = (reference - errors(*batch)).chunk(2)
            torch.nn.functional.softplus(-1000 * (advantage - disadvantage)).mean().div(len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), 1.0)
        optimizer.step()

    return step


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, device work included."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
