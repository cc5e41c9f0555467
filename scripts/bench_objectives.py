"""Every objective on the pocket world: same pairs, same number of denoised images, three seeds; a table for the docs.

    python scripts/bench_objectives.py runs/objectives                 # all of it, an hour or two on two cores
    python scripts/bench_objectives.py runs/objectives --only dpo ipo --seeds 0

A seed decides the prompts, the candidates, the pairs (labelled by CLIP), the training and the held-out prompts. What
is finished is kept, so the same command again goes on. The whole table replaces that of docs/benchmarks/objectives.md.
"""

import argparse
import importlib
import json
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_dpo.config import load, override
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.scores import read_all_verdicts, read_facts
from diffusion_dpo.pocket.world import distinct_scenes
from diffusion_dpo.report.statistics import mean_interval
from diffusion_dpo.settings import VERBS

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks" / "objectives.md"
BEGIN, END = "<!-- the table -->\n", "<!-- end of the table -->\n"
SEEDS = [0, 1, 2]
NUM_PROMPTS = 96
IMAGES_PER_PROMPT = 2
PAIRS_OF_IMAGES = {"global_batch_size": 32, "per_device_batch_size": 32}
IMAGES = {"global_batch_size": 64, "per_device_batch_size": 64}
LISTS_OF_FOUR = {"global_batch_size": 16, "per_device_batch_size": 16}
COMMON = {
    "model.lora": None,
    "learning_rate": 3e-5,
    "max_steps": 120,
    "evaluation.max_pairs": 64,
    "evaluation.every_steps": 60,
    "preview.sampling.num_inference_steps": 2,
}
KEYS = ("accuracy", "chosen_error", "rejected_error", "kl")
ROWS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo, random labels": {},
    "dpo, label_smoothing 0.1": {"loss.label_smoothing": 0.1},
    "dpo, learning rate 1e-5": {"learning_rate": 1e-5},
    "dpo, beta 500": {"loss.beta": 500},
    "dpo, LoRA of rank 16, learning rate 1e-3": {"model.lora": {"rank": 16}, "learning_rate": 1e-3},
    "ipo": {},
    "ipo, beta 200": {"loss.beta": 200},
    "hinge": {},
    "robust_dpo": {},
    "dmpo": {},
    "dpo_shift": {},
    "linear_dpo": {},
    "linear_dpo, EMA reference": {"reference.type": "ema"},
    "mapo": {},
    "mapo, learning rate 1e-5": {"learning_rate": 1e-5},
    "mapo, beta 8": {"loss.beta": 8},
    "kto": IMAGES,
    "sft": IMAGES,
    "sft, learning rate 1e-4": IMAGES | {"learning_rate": 1e-4},
    "dco": IMAGES,
    "dco, learning rate 1e-4": IMAGES | {"learning_rate": 1e-4},
    "capo": {},
    "capo, beta 200": {"loss.beta": 200},
    "rank_dpo": LISTS_OF_FOUR,
    "plackett_luce": LISTS_OF_FOUR,
    "dpo, safeguard 0.9": {"safeguard_mu": 0.9},
    "dpo, SFT anchor 500": {"regularizers.sft": 500.0},
    "dpo, score gain": {"score_gain_weighting": True},
    "dpo, curriculum": {"order": "curriculum", "curriculum_steps": 20},
    "dpo, min-SNR 5": {"weighting.timesteps": "min_snr"},
    "dpo, 1/(alpha sigma)^2": {"weighting.timesteps": "inv_alpha_sigma"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="rows of the table")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        make_data(folder, seed)
        for name in args.only:
            pairs = folder / ("pairs-random" if "random" in name else "pairs")
            measure(
                folder, name, seed, COMMON | {"loss.type": name.partition(",")[0], "data.path": pairs} | ROWS[name]
            )
    table = make_table(args.folder, args.seeds, list(ROWS), "objective")
    print(table)
    if (args.only, args.seeds) == (list(ROWS), SEEDS):
        replace_table(DOCS, table)


def make_data(folder: Path, seed: int) -> None:
    """Prompts, candidates, pairs, pairs with random labels, and the images of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("prompts.txt", False), ("held-out.txt", True)):
        captions = [scene.caption for scene in islice(distinct_scenes(seed, held_out=held_out), NUM_PROMPTS)]
        (folder / name).write_text("\n".join(captions) + "\n")
    candidates, pairs = folder / "candidates", folder / "pairs"
    drawn = {"prompts_path": folder / "prompts.txt", "num_images_per_prompt": 12, "sampling.guidance_scale": 1}
    verb("generate", drawn | {"seed": seed, "output_dir": candidates})
    verb("score", {"path": candidates, "scorers": ["clip"]})
    paired = {"path": candidates, "strategy": {"type": "top_bottom", "top_k": 3}, "min_margin": 0.03}
    verb("pair", paired | {"output_dir": pairs})
    verb("pair", paired | {"shuffle_labels": True, "seed": seed, "output_dir": folder / "pairs-random"})
    draw(folder / "base", folder, seed)


def measure(folder: Path, name: str, seed: int, settings: dict[str, Any]) -> None:
    """Train one row of the table, draw held-out prompts, and keep what came of it."""
    place = place_of(folder, name)
    if (place / "result.json").exists():
        return
    began = time.monotonic()
    places = {"output_dir": place / "train", "cache_dir": folder / "cache"}
    verb("train", PAIRS_OF_IMAGES | settings | {"seed": seed} | places)
    draw(place / "images", folder, seed, adapter_path=place / "train")
    lines = (place / "train" / "metrics.jsonl").read_text().splitlines()
    result = {
        "scene": (scene_scores(place / "images") - scene_scores(folder / "base")).tolist(),
        "metrics": json.loads(lines[-1]),
        "seconds": time.monotonic() - began,
    }
    (place / "result.json").write_text(json.dumps(result))
    for heavy in ("checkpoints", "unet", "adapter", "previews"):
        shutil.rmtree(place / "train" / heavy, ignore_errors=True)
    print(f"== {name}, seed {seed}: {np.mean(result['scene']):+.3f}, {result['seconds']:.0f} s", flush=True)


def place_of(folder: Path, name: str) -> Path:
    return folder / name.replace("/", "-").replace(" ", "-")


def draw(output_dir: Path, folder: Path, seed: int, adapter_path: Path | None = None) -> None:
    drawn = {"prompts_path": folder / "held-out.txt", "num_images_per_prompt": IMAGES_PER_PROMPT, "seed": seed}
    verb("generate", drawn | {"output_dir": output_dir, "model.adapter_path": adapter_path})
    verb("score", {"path": output_dir, "scorers": ["pocket_scene"]})


def scene_scores(folder: Path) -> np.ndarray:
    """Share of the facts of its prompt that an image shows, mean per prompt."""
    verdicts = read_all_verdicts(folder, read_facts(folder))
    values: dict[str, list[float]] = {}
    for unit in find_units(folder):
        for candidate in unit.read(images=False):
            values.setdefault(candidate.prompt, []).append(verdicts[candidate.key]["pocket_scene"].value)
    return np.array([np.mean(found) for found in values.values()])


def replace_table(document: Path, table: str) -> None:
    before, _, rest = document.read_text().partition(BEGIN)
    document.write_text(before + BEGIN + table + END + rest.partition(END)[2])


def make_table(folder: Path, seeds: list[int], rows: list[str], what: str) -> str:
    columns = (what, "pocket_scene, after - before (95 %)", "by seed", *KEYS)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name in rows:
        places = [place_of(folder / f"seed-{seed}", name) / "result.json" for seed in seeds]
        found = [json.loads(path.read_text()) for path in places if path.exists()]
        if not found:
            continue
        scene = np.concatenate([result["scene"] for result in found])
        interval = mean_interval(scene)
        assert interval is not None
        by_seed = ", ".join(f"{np.mean(result['scene']):+.3f}" for result in found)
        mean = {key: np.mean([r["metrics"][f"eval/{key}"] for r in found]) for key in KEYS}
        lines.append(
            f"| {name} | {scene.mean():+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f}) | {by_seed} | "
            f"{mean['accuracy']:.2f} | {mean['chosen_error']:+.1%} | {mean['rejected_error']:+.1%} | "
            f"{mean['kl']:.3g} |"
        )
    return "\n".join(lines) + "\n"


def verb(name: str, settings: dict[str, Any]) -> None:
    overrides = [override(key, value) for key, value in settings.items() if value is not None or key == "model.lora"]
    importlib.import_module(f"diffusion_dpo.{name}").run(load(VERBS[name], None, overrides))


if __name__ == "__main__":
    main()
