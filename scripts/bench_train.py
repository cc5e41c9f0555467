"""How fast training is, in units that hold on a noisy machine: a step over one no-grad UNet forward of the same pairs.

    python scripts/bench_train.py                                   # pocket and mid on the CPU, one thread
    python scripts/bench_train.py --device cuda                     # SD 1.5 at 512 px and SDXL at 1024 px, bf16
    python scripts/bench_train.py --models mid --batches 1 4 --settings compile=true

A row is a model, what of it is trained, and where the reference's errors come from: asked at every step ("fresh"), or
computed beforehand ("cached"). Steps of training, of a bare loop of the same forward and backward calls over tensors
that are there already, no-grad forwards and large matrix products take turns in one run; the table has medians of
their ratios. `outside` is the share of a step that the bare loop does not need. FLOP are counted, not estimated.
"""

import argparse
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from random_models import make_pipeline
from torch.utils.flop_counter import FlopCounterMode

from diffusion_dpo import console
from diffusion_dpo.config import load
from diffusion_dpo.data import collect
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.shards import PAIRS, encode_png, write_shard
from diffusion_dpo.device import pick_device, pick_dtype
from diffusion_dpo.settings import TrainConfig
from diffusion_dpo.train import train_step
from diffusion_dpo.training import Run
from diffusion_dpo.training.errors import Batch, add_shared_noise
from diffusion_dpo.training.setup import prepare

TRAINED = {"full": ["model.lora=null"], "LoRA": ["model.lora.rank=8"]}
REFERENCES = {"fresh": [], "cached": ["reference.type=cached", "reference.num_draws=1"]}
COLUMNS = (
    *("model", "px", "trained", "reference", "pairs", "pairs/s", "UNet units", "/ bare loop", "outside"),
    *("TFLOP/pair", "TFLOP/s", "of matrix peak", "peak GiB", "load + prepare s"),
)


@dataclass
class Start:
    """Seconds until the first step could be taken."""

    load: float
    prepare: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="*", help="pocket mid on the CPU, sd15 sdxl on CUDA")
    parser.add_argument("--trained", nargs="*", default=list(TRAINED))
    parser.add_argument("--references", nargs="*", default=list(REFERENCES))
    parser.add_argument("--batches", nargs="*", type=int, help="pairs per micro-batch: 1 on the CPU, 1 4 16 on CUDA")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of `train`")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_cuda = args.device == "cuda"
    models = args.models or (["sd15", "sdxl"] if on_cuda else ["pocket", "mid"])
    where = torch.cuda.get_device_name() if on_cuda else f"CPU, {args.threads} threads"
    imports = time.time() - psutil.Process().create_time()
    print(f"{where}, torch {torch.__version__}, {' '.join(args.settings) or 'no more settings'}")
    print(f"start: {imports:.1f} s of imports, then loading + preparing, which encodes the pairs, in the table\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            pretrained = "pocket" if model == "pocket" else str(make_pipeline(Path(folder) / model, model))
            for trained in args.trained:
                for reference in args.references:
                    for batch in args.batches or ([1, 4, 16] if on_cuda else [1]):
                        work = Path(folder) / f"{trained}-{reference}-{batch}"
                        settings = [
                            f"model.type={'stable_diffusion_xl' if model == 'sdxl' else 'stable_diffusion'}",
                            f"model.pretrained={pretrained}",
                            f"device={args.device}",
                            *TRAINED[trained],
                            *REFERENCES[reference],
                            *args.settings,
                        ]
                        row = measure(work, settings, batch, args.steps)
                        print("| " + " | ".join([model, row[0], trained, reference, *row[1:]]) + " |", flush=True)


def measure(folder: Path, settings: list[str], batch: int, num_steps: int) -> list[str]:
    """One row of the table, from the resolution on."""
    try:
        run, start = make_run(folder, settings, batch, num_steps + 3)
        return list(report(run, start, num_steps))
    except torch.OutOfMemoryError:
        return ["", str(batch), "does not fit", *[""] * (len(COLUMNS) - 6)]
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def report(run: Run, start: Start, num_steps: int) -> Iterator[str]:
    device, pairs = run.model.device, run.config.global_batch_size
    side = run.config.resolution_px or run.model.resolution_px
    batches = run.reader.stream(0)
    first = run.reader[0, 0].to(device)
    bare, forward, product = bare_step(run), unit_forward(run, first), matrix_product(device, run.model.dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: dict[str, list[float]] = {"step": [], "bare": [], "unit": [], "product": []}
    with FlopCounterMode(display=False) as counter:
        train_step(run, 0, batches)
    flops = counter.get_total_flops() / pairs
    for step in range(1, num_steps + 3):
        calls = {"step": lambda step=step: train_step(run, step, batches), "bare": bare, "unit": forward}
        for name, call in (calls | {"product": product}).items():
            times[name].append(seconds(call, device))
    kept = {name: values[2:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in kept.items()}
    units = statistics.median(a / b for a, b in zip(kept["step"], kept["unit"], strict=True))
    over = statistics.median(a / b for a, b in zip(kept["step"], kept["bare"], strict=True))
    rate = flops * pairs / median["step"]
    peak = 2 * _PRODUCT[device.type] ** 3 / min(kept["product"])
    yield str(side)
    yield str(pairs)
    yield f"{pairs / median['step']:.3g}"
    yield f"{units:.2f}"
    yield f"{over:.3f}"
    yield f"{max(0.0, 1 - 1 / over):.1%}"
    yield f"{flops / 1e12:.3g}"
    yield f"{rate / 1e12:.3g}"
    yield f"{rate / peak:.0%}"
    if device.type == "cuda":
        yield f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
    else:
        yield f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} (so far)"
    yield f"{start.load:.1f} + {start.prepare:.1f}"


def make_run(folder: Path, settings: list[str], batch: int, num_steps: int) -> tuple[Run, Start]:
    """A run over pairs of noise, ready for its first step."""
    warnings.simplefilter("ignore")
    console.silence()
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = [f"data.path={folder / 'pairs'}", f"output_dir={folder / 'run'}", "preview=null", "evaluation.share=0"]
    sizes = [f"global_batch_size={batch}", f"per_device_batch_size={batch}", f"max_steps={num_steps}"]
    config = load(TrainConfig, None, [*paths, *sizes, *settings])
    device = pick_device(config.device)
    dtype = pick_dtype(config.mixed_precision, device)
    began = time.perf_counter()
    model = config.model.load(device=device, dtype=dtype, seed=0)
    loaded = time.perf_counter()
    rows, side = [], config.resolution_px or model.resolution_px
    for number in range(max(4, batch)):
        images = (encode_png(Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))) for _ in range(2))
        rows.append(pair_row(make_pair("bench", f"picture {number}", *images, source="bench")))
    (folder / "pairs").mkdir()
    write_shard(folder / "pairs" / "pairs-00000.parquet", rows, PAIRS)
    data = collect.collect(config.data, max_broken_share=0)
    prepared = time.perf_counter()
    run = prepare(config, model, data, dtype)
    return run, Start(loaded - began, time.perf_counter() - prepared)


def unit_forward(run: Run, batch: Batch) -> Callable[[], None]:
    """The unit: one forward of the UNet over both images of a micro-batch's pairs, without gradients or adapters."""
    noisy_latents, timesteps, conditioning, _ = add_shared_noise(run.model, batch)

    def forward() -> None:
        with run.model.reference():
            run.model.predict(noisy_latents, timesteps, conditioning)

    return forward


def bare_step(run: Run) -> Callable[[], None]:
    """The least that a step can be: forwards, logistic loss, backward, clip, and an optimizer, over ready tensors."""
    batches = [run.reader[0, n].to(run.model.device) for n in range(run.reader.num_micro_batches)]
    inputs = [(*add_shared_noise(run.model, batch), batch.reference) for batch in batches]
    optimizer = torch.optim.AdamW(run.parameters.values(), lr=1e-12, fused=True)

    def errors(noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: dict, target: torch.Tensor) -> torch.Tensor:
        return (run.model.predict(noisy, timesteps, conditioning) - target).square().flatten(1).mean(1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for *call, known in inputs:
            if known is None:
                with run.model.reference():
                    reference = errors(*call)
            else:
                reference = known.T.flatten()
            advantage, disadvantage = (reference - errors(*call)).chunk(2)
            torch.nn.functional.softplus(-1000 * (advantage - disadvantage)).mean().div(len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), 1.0)
        optimizer.step()

    return step


_PRODUCT = {"cpu": 2048, "cuda": 8192}


def matrix_product(device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """A large matrix product, by which the machine's own peak is measured."""
    a, b = (torch.randn(_PRODUCT[device.type], _PRODUCT[device.type], device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, device work included."""
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
