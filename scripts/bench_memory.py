"""What `train` needs to start on pairs that are all cached, by how many they are: seconds, and memory.

    python scripts/bench_memory.py                       # 1,000 and 1,000,000 pairs; about 4 GB of disk and 2 minutes
    python scripts/bench_memory.py --sizes 1000 200000

The pairs are synthetic: an index and a latent cache in the real formats, with random latents of the pocket model, and
a prompt for every three pairs. `train` then runs a few steps on them, each size in a process of its own. Anonymous
memory is what the process keeps; file-backed memory is pages of mapped files (most of them code), which the system
takes back when it needs them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from diffusion_dpo import train
from diffusion_dpo.config import load
from diffusion_dpo.data import PairSource, PreferencePair, cache
from diffusion_dpo.data.encode import Encoders, tensor_name
from diffusion_dpo.data.index import SURVEYED, Collected, open_index, write_index
from diffusion_dpo.data.tensor_files import write
from diffusion_dpo.settings import TrainConfig

PAIRS_PER_PROMPT = 3
NUM_STEPS = 3
_MB = 2**20


class CachedPairs(PairSource):
    """Pairs without images, which can be trained on because they are encoded already."""

    num_pairs: int

    def read(self) -> Iterator[PreferencePair]:
        """Never happens: nothing is missing in the index or in the cache."""
        raise AssertionError("the data was read")

    def num_rows(self) -> int:
        """Return the number of pairs."""
        return self.num_pairs

    def stamp(self) -> str:
        """Return a state that never changes."""
        return "synthetic"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--json", action="store_true", help="print one JSON object a size instead of a table")
    parser.add_argument("--train", nargs=2, metavar=("FOLDER", "BEGAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(measure(Path(args.train[0]), args.sizes[0], float(args.train[1]))))
        return
    if not args.json:
        print(f"{'pairs':>10} {'first step':>11} {'peak':>9} {'anonymous':>10} {'file-backed':>12} {'on disk':>10}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_cache(Path(folder), size)
            command = [sys.executable, __file__, "--sizes", str(size), "--train", folder, str(time.time())]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            on_disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        if args.json:
            print(json.dumps({"pairs": size, **found}))
        else:
            print(
                f"{size:>10,} {found['seconds']:>9.1f} s {found['peak_mb']:>6.0f} MB {found['anonymous_mb']:>7.0f} MB "
                f"{found['file_mb']:>9.0f} MB {on_disk / _MB:>7.0f} MB"
            )


def settings(folder: Path, num_pairs: int) -> TrainConfig:
    """The defaults of `diffusion-dpo train`, with a short evaluation and no previews."""
    overrides = [
        "data.type=bench_memory:CachedPairs",
        f"data.num_pairs={num_pairs}",
        f"max_steps={NUM_STEPS}",
        "preview=null",
        "evaluation.max_pairs=8",
        "device=cpu",
        f"cache_dir={folder / 'cache'}",
        f"output_dir={folder / 'run'}",
    ]
    return load(TrainConfig, None, overrides)


def measure(folder: Path, num_pairs: int, began: float) -> dict[str, float]:
    """Train; return the seconds from `began` (of time.time) to the end of the first step, and the memory in MB."""
    found: dict[str, float] = {}
    real_step = train.train_step

    def step(*args: object) -> dict[str, float]:
        metrics = real_step(*args)  # type: ignore[arg-type]
        found.setdefault("seconds", time.time() - began)
        found.update(anonymous_mb=memory_mb("RssAnon"), file_mb=memory_mb("RssFile"))
        return metrics

    train.train_step = step
    train.run(settings(folder, num_pairs))
    return found | {"peak_mb": memory_mb("VmHWM")}


def memory_mb(name: str) -> float:
    """Return a figure of Linux on this process; not ru_maxrss, in which a process inherits its parent's peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / _MB


def make_cache(folder: Path, num_pairs: int) -> None:
    """Write the index and the latent cache of synthetic pairs."""
    config = settings(folder, num_pairs)
    data = make_index(folder, config.data, num_pairs)
    model = config.model.load(device=torch.device("cpu"), dtype=torch.float32, seed=0)
    encoders = Encoders(
        images=model.encode_images,
        prompts=model.encode_prompts,
        fingerprint=model.encoder_hash,
        latent_channels=model.latent_channels,
        downscale=model.downscale,
        resolution_px=model.resolution_px,
        dtype=torch.float32,
    )
    size = (encoders.resolution_px,) * 2
    facts = cache.facts_of(data, encoders, [size], random_flip=config.random_flip)
    place = cache.folder_of(folder / "cache", facts)
    place.mkdir()
    latents = torch.randn(cache.PAIRS_PER_FILE, 1, 2, *encoders.latent_shape(size))
    text = torch.randn(cache.PROMPTS_PER_FILE, *model.encode_prompts([""])["encoder_hidden_states"].shape[1:])
    name = tensor_name("latents", size)
    for number in range(-(-num_pairs // cache.PAIRS_PER_FILE)):
        file, rows = cache.pairs_file(number), latents[: num_pairs - number * cache.PAIRS_PER_FILE]
        write(place / file, {name: rows}, {name: 3}, facts | {"file": file})
    num_prompts = 1 + len(data.prompts)
    for number in range(-(-num_prompts // cache.PROMPTS_PER_FILE)):
        file, rows = cache.prompts_file(number), text[: num_prompts - number * cache.PROMPTS_PER_FILE]
        tensors = {"encoder_hidden_states": rows}
        write(place / file, tensors, {"encoder_hidden_states": 1}, facts | {"file": file})


def make_index(folder: Path, source: PairSource, num_pairs: int) -> Collected:
    """Write the index where `train` will look for it."""
    side = np.full(num_pairs, 64, dtype=np.int32)
    columns = {
        "row": np.arange(num_pairs),
        "where": [f"row {i}" for i in range(num_pairs)],
        "pair_id": [f"{i:032x}" for i in range(num_pairs)],
        "prompt": [f"a picture of the number {i // PAIRS_PER_PROMPT}" for i in range(num_pairs)],
        "label_prob": np.ones(num_pairs),
        **{f"{which}_{name}": side for which in ("chosen", "rejected") for name in ("width", "height")},
        "chosen_uid": [f"{2 * i:032x}" for i in range(num_pairs)],
        "rejected_uid": [f"{2 * i + 1:032x}" for i in range(num_pairs)],
        **{f"{which}_scores": ["{}"] * num_pairs for which in ("chosen", "rejected")},
        "margin": pa.nulls(num_pairs, pa.float64()),
        "has_mask": np.zeros(num_pairs, dtype=bool),
    }
    made = folder / "made"
    made.mkdir()
    write_index(made, pa.RecordBatch.from_pydict(columns, SURVEYED), [], source, source.stamp())
    data = open_index(source, made)
    data.save(folder / "cache" / "index")
    return data


if __name__ == "__main__":
    main()
