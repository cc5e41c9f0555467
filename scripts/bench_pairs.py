"""How long `pair` takes over very many candidates: synthetic images and scores, the real verb, by strategy.

    python scripts/bench_pairs.py                       # 100,000 candidates, 8 a prompt, 3 metrics
    python scripts/bench_pairs.py --images 10000

Goal: 100,000 candidates with 3 metrics in at most 10 s and 1 GB. Images are 32 px, so what is measured is reading the
table of scores, choosing the pairs and writing them, not copying pixels.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion_dpo import console, pair
from diffusion_dpo.config import load
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.scores import facts_path, shard_path
from diffusion_dpo.data.shards import CANDIDATES, SCORES, encode_png, image_struct, write_shard
from diffusion_dpo.settings import PairConfig

METRICS = ("shade", "grain", "tilt")
IMAGES_PER_PROMPT = 8
IMAGES_PER_SHARD = 1024
STRATEGIES = {
    "best_worst": {},
    "top_bottom": {"top_k": 3},
    "pareto": {"metrics": list(METRICS)},
    "majority": {"metrics": list(METRICS)},
    "weighted": {"weights": dict.fromkeys(METRICS, 1.0), "normalise": "win_rate"},
    "gate": {"gates": [{"metric": "tilt", "min": -1.0}]},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "STRATEGY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(Path(args.one[0]), args.one[1])
        return
    print("| strategy | pairs | seconds | of which reading and choosing | peak memory, MB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        make_candidates(Path(folder) / "candidates", args.images)
        for strategy in STRATEGIES:
            command = [sys.executable, __file__, "--one", folder, strategy]
            print(subprocess.run(command, capture_output=True, text=True, check=True).stdout, end="", flush=True)


def measure(folder: Path, strategy: str) -> None:
    """Run the verb once, in a process of its own, and print a row of the table."""
    console.silence()
    settings = {"type": strategy} | STRATEGIES[strategy]
    config = load(
        PairConfig,
        None,
        [
            f"path={folder / 'candidates'}",
            f"output_dir={folder / strategy}",
            f"strategy={json.dumps(settings)}",
            *([f"metric={METRICS[0]}"] if strategy in ("best_worst", "top_bottom", "gate") else []),
        ],
    )
    chosen: list[float] = []
    make = pair._make

    def timed(*args: Any) -> int:
        chosen.append(time.perf_counter())
        return make(*args)

    pair._make = timed
    began = time.perf_counter()
    pair.run(config)
    ended = time.perf_counter()
    num_pairs = json.loads((folder / strategy / "manifest.json").read_text())["num_pairs"]
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak_mb = int(status["VmHWM"].split()[0]) / 1000
    print(f"| {strategy} | {num_pairs:,} | {ended - began:.1f} | {chosen[0] - began:.1f} | {peak_mb:.0f} |")


def make_candidates(folder: Path, count: int) -> None:
    """Write images of one colour each, and their scores by three judges that agree a little."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, count, IMAGES_PER_SHARD)):
        rows = [_row(i) for i in range(start, min(start + IMAGES_PER_SHARD, count))]
        write_shard(folder / f"images-{number:05d}.parquet", rows, CANDIDATES)
    for unit in find_units(folder):
        keys = [candidate.key for candidate in unit.read(images=False)]
        common = rng.normal(size=len(keys))
        for metric in METRICS:
            values = common + rng.normal(size=len(keys))
            scores = [
                {"uid": "", "key": key, "metric": metric, "value": value, "reason": "", "fingerprint": "1"}
                for key, value in zip(keys, values.tolist(), strict=True)
            ]
            write_shard(shard_path(folder, metric, unit.name), scores, SCORES)
    for metric in METRICS:
        facts = {"name": metric, "higher_is_better": True, "range": [None, None], "auxiliary": False}
        about = {"scorer": metric, "licence": "none", "fingerprint": "1", "metrics": [facts]}
        facts_path(folder, metric).write_text(json.dumps(about))


def _row(number: int) -> dict[str, object]:
    image = Image.new("RGB", (32, 32), (number % 251, number // 251 % 251, 1 + number // 251 // 251))
    return {
        "uid": pixel_hash(image),
        "prompt_id": f"{number // IMAGES_PER_PROMPT}",
        "prompt": f"prompt number {number // IMAGES_PER_PROMPT}",
        "index": number % IMAGES_PER_PROMPT,
        "seed": number,
        "image": image_struct(encode_png(image)),
        "references": [],
        "origin": "",
        "settings_hash": "0",
    }


if __name__ == "__main__":
    main()
