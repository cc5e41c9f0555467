"""What labels are worth: pairs by CLIP, by CLIP and LPIPS, and behind a gate, and by chance; three seeds.

    python scripts/bench_preferences.py runs/preferences        # about half an hour on two cores

For every way to make pairs: how many of its labels the oracle of the pocket world agrees with, and what a model tuned
on them draws for held-out prompts. Every prompt has a rendering of its scene as its reference, which LPIPS compares
with. LPIPS runs on a trunk of random weights, made here: its trained one is not shipped, and random convolutions see
shapes and colours, too. Training and columns are those of bench_objectives.py; the table replaces that of
docs/benchmarks/preferences.md. What is finished is kept, so the same command again goes on.
"""

import argparse
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_objectives import COMMON, NUM_PROMPTS, SEEDS, draw, make_table, measure, place_of, replace_table, verb
from torchvision.models import alexnet

from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.pocket.world import distinct_scenes, render

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks" / "preferences.md"
TOP_BOTTOM = {"type": "top_bottom", "top_k": 3}
CLIP, LPIPS = "clip_text", "lpips_alex"
ROWS: dict[str, dict[str, Any]] = {
    "clip": {"strategy": TOP_BOTTOM, "metric": CLIP, "min_margin": 0.03},
    "clip + lpips, both must agree": {
        "strategy": {"type": "pareto", "metrics": [CLIP, LPIPS]},
        "min_margin_norm": 0.5,
        "max_pairs_per_prompt": 9,
    },
    "gate on clip, then lpips": {
        "strategy": {"type": "gate", "gates": [{"metric": CLIP, "min": 0.3}], "failed": "lose", "then": TOP_BOTTOM},
        "metric": LPIPS,
    },
    "lpips": {"strategy": TOP_BOTTOM, "metric": LPIPS},
    "clip, labels shuffled": {
        "strategy": TOP_BOTTOM,
        "metric": CLIP,
        "min_margin": 0.03,
        "shuffle_labels": True,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        make_candidates(folder, seed)
        for name, settings in ROWS.items():
            pairs = pairs_of(folder, name)
            verb("pair", {"path": folder / "candidates", "seed": seed, "output_dir": pairs} | settings)
            measure(folder, name, seed, COMMON | {"data.path": pairs})
    table = with_labels(make_table(args.folder, args.seeds, list(ROWS), "pairs by"), args.folder, args.seeds)
    print(table)
    if args.seeds == SEEDS:
        replace_table(DOCS, table)


def pairs_of(folder: Path, name: str) -> Path:
    return folder / "pairs" / place_of(folder, name).name.replace(",", "")


def make_candidates(folder: Path, seed: int) -> None:
    """Prompts with a reference each, candidates with three scores, the prompts that are held out, and the base."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(seed), []
    for number, scene in enumerate(islice(distinct_scenes(seed), NUM_PROMPTS)):
        name = f"reference-{number:03d}.png"
        render(scene, rng).save(folder / name)
        lines.append(json.dumps({"prompt": scene.caption, "references": [name]}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    captions = [scene.caption for scene in islice(distinct_scenes(seed, held_out=True), NUM_PROMPTS)]
    (folder / "held-out.txt").write_text("\n".join(captions) + "\n")
    candidates = folder / "candidates"
    drawn = {"prompts_path": folder / "prompts.jsonl", "num_images_per_prompt": 12, "sampling.guidance_scale": 1}
    verb("generate", drawn | {"seed": seed, "output_dir": candidates})
    trunk, digest = random_trunk(folder)
    lpips = {"type": "lpips", "net": "alex", "trunk_path": str(trunk), "trunk_sha256": digest, "resolution_px": 64}
    verb("score", {"path": candidates, "scorers": ["clip", lpips, "pocket_scene"]})
    draw(folder / "base", folder, seed)


def random_trunk(folder: Path) -> tuple[Path, str]:
    """Write an AlexNet with the weights that it begins its training with; return the file and its SHA-256."""
    path = folder / "alexnet-random.pth"
    if not path.exists():
        torch.manual_seed(0)
        torch.save(alexnet(weights=None).state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def with_labels(table: str, folder: Path, seeds: list[int]) -> str:
    """Put behind the name of each row how many pairs it has, and the share of labels that the oracle agrees with."""
    heading, rule, *lines = table.splitlines()
    columns = ["pairs", "labels the oracle agrees with (opposes)"]
    done = [_insert(heading, columns), _insert(rule, ["---", "---"])]
    for name, line in zip(ROWS, lines, strict=True):
        gaps = np.concatenate([_oracle(pairs_of(folder / f"seed-{seed}", name)) for seed in seeds])
        numbers = [f"{len(gaps) / len(seeds):.0f}", f"{(gaps > 0).mean():.0%} ({(gaps < 0).mean():.0%})"]
        done.append(_insert(line, numbers))
    return "\n".join(done) + "\n"


def _insert(line: str, cells: list[str]) -> str:
    first, rest = line.removeprefix("|").split("|", 1)
    return f"|{first}| {' | '.join(cells)} |{rest}"


def _oracle(pairs: Path) -> np.ndarray:
    """By how much the oracle finds the chosen image better, for each pair; 0 where it finds no difference."""
    found = []
    for row in read_rows(pairs, ["chosen_scores", "rejected_scores"]):
        chosen, rejected = (json.loads(row[f"{side}_scores"])["pocket_scene"] for side in ("chosen", "rejected"))
        found.append(chosen - rejected)
    return np.array(found)


if __name__ == "__main__":
    main()
