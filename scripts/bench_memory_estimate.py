"""The memory that `train --dry-run` foretells against what a real run takes, each run in a process of its own.

    python scripts/bench_memory_estimate.py                          # pocket and mid on the CPU: peak resident memory
    python scripts/bench_memory_estimate.py --device cuda            # SD 1.5 and SDXL: what torch reserves at most
    python scripts/bench_memory_estimate.py --models mid --settings per_device_batch_size=4

The models have random weights, and the layout that their names say: `mid` is an SD 1.5 of 92 M parameters. Previews
are off. On the CPU the estimate holds the process itself; on CUDA it is compared without what torch cannot see.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from random_models import make_pipeline

from diffusion_dpo.config import load
from diffusion_dpo.data.pairs import pair_row
from diffusion_dpo.data.rows import make_pair
from diffusion_dpo.data.shards import PAIRS, encode_png, write_shard
from diffusion_dpo.device import pick_dtype
from diffusion_dpo.models.pipeline import POCKET_DIR
from diffusion_dpo.settings import TrainConfig

NUM_PAIRS = 8
KINDS = {
    "LoRA": ["model.lora.rank=8"],
    "LoRA, checkpointing": ["model.lora.rank=8", "gradient_checkpointing=true"],
    "full": ["model.lora=null"],
    "full, checkpointing": ["model.lora=null", "gradient_checkpointing=true"],
}
CUDA_KINDS = {
    **KINDS,
    "full, checkpointing, cached, Adafactor": [
        *KINDS["full, checkpointing"],
        "reference.type=cached",
        "optimizer=adafactor",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="*", help="default: pocket mid on the CPU, sd15 sdxl on CUDA")
    parser.add_argument("--batches", nargs="*", type=int, help="default: 1 4 16 on the CPU, 1 4 on CUDA")
    parser.add_argument("--kinds", nargs="*", help=f"of: {', '.join(CUDA_KINDS)}")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings of `train`")
    args = parser.parse_args()
    on_cuda = args.device == "cuda"
    kinds = CUDA_KINDS if on_cuda else KINDS
    heads = ["model", "what", "pairs", "estimate MiB", "measured MiB", "ratio"]
    heads += [] if on_cuda else ["measured MiB, freed memory returned", "ratio"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name in args.models or (["sd15", "sdxl"] if on_cuda else ["pocket", "mid"]):
        with tempfile.TemporaryDirectory() as folder:
            model = POCKET_DIR if name == "pocket" else make_pipeline(Path(folder) / "model", name)
            side = json.loads((model / "vae" / "config.json").read_text())["sample_size"]
            make_pairs(Path(folder) / "pairs", side)
            for kind in args.kinds or kinds:
                for size in args.batches or ([1, 4] if on_cuda else [1, 4, 16]):
                    settings = [
                        f"model.type={'stable_diffusion_xl' if name == 'sdxl' else 'stable_diffusion'}",
                        f"model.pretrained={model}",
                        f"data.path={folder}/pairs",
                        f"cache_dir={folder}/cache",
                        f"output_dir={folder}/{kind.replace(' ', '-')}-{size}",
                        f"device={args.device}",
                        f"per_device_batch_size={size}",
                        f"global_batch_size={2 * size}",
                        "max_steps=2",
                        "evaluation.share=0.25",
                        "preview=null",
                        *kinds[kind],
                        *args.settings,
                    ]
                    foretold = estimate(settings, args.device)
                    found = [
                        measure(settings, returns_memory=fixed) for fixed in ([False] if on_cuda else [False, True])
                    ]
                    cells = [f"{foretold:.0f}", *(f"{value:.0f} | {foretold / value:.2f}" for value in found)]
                    print(f"| {name} | {kind} | {size} | {' | '.join(cells)} |", flush=True)


def estimate(settings: list[str], device: str) -> float:
    """MiB, as a process that has done nothing else foretells them: it counts itself."""
    config = load(TrainConfig, None, settings)
    program = (
        "import sys; from diffusion_dpo import train; from diffusion_dpo.config import load\n"
        "from diffusion_dpo.settings import TrainConfig; import torch\n"
        "from diffusion_dpo.training.memory import make_estimator\n"
        "config = load(TrainConfig, None, sys.argv[2:]); dtype = getattr(torch, sys.argv[1].partition('.')[2])\n"
        "estimator = make_estimator(config, config.device, dtype); found = estimator.estimate(config).total\n"
        "print((found - (estimator.process_bytes if config.device == 'cuda' else 0)) / 2**20)"
    )
    dtype = str(pick_dtype(config.mixed_precision, torch.device(device)))
    done = subprocess.run(
        [sys.executable, "-c", program, dtype, *settings], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def measure(settings: list[str], *, returns_memory: bool) -> float:
    """MiB of a real run at its peak: resident, or reserved on the card by torch.

    `returns_memory` keeps the C library's allocator from holding back what was freed.
    """
    program = (
        "import re, sys, torch; from diffusion_dpo import train; from diffusion_dpo.config import load\n"
        "from diffusion_dpo.settings import TrainConfig; train.run(load(TrainConfig, None, sys.argv[1:]))\n"
        "print('peak', torch.cuda.max_memory_reserved() if torch.cuda.is_available() else "
        "1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]))"
    )
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if returns_memory else {})
    command = [sys.executable, "-c", program, *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    shutil.rmtree(load(TrainConfig, None, settings).output_dir)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1]) / 2**20


def make_pairs(folder: Path, side: int) -> None:
    """Pairs of small images, which training scales to its resolution; a prompt for each."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_PAIRS):
        images = (rng.integers(0, 255, (32, 32, 3), np.uint8) for _ in range(2))
        chosen, rejected = (encode_png(Image.fromarray(image).resize((side, side))) for image in images)
        rows.append(pair_row(make_pair("bench", f"a picture {number}", chosen, rejected, source="bench")))
    folder.mkdir()
    write_shard(folder / "pairs-00000.parquet", rows, PAIRS)


if __name__ == "__main__":
    main()
