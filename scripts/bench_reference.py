"""What asking the reference once costs: K cached draws of noise and timestep a pair, against fresh ones, three seeds.

    python scripts/bench_reference.py runs/reference        # about an hour on two cores

Data, judges and columns are those of bench_objectives.py; the table replaces that of docs/benchmarks/reference.md.
What is finished is kept, so the same command again goes on.
"""

import argparse
from pathlib import Path
from typing import Any

from bench_objectives import COMMON, SEEDS, make_data, make_table, measure, replace_table, verb

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks" / "reference.md"
STEPS = {"max_steps": 180, "evaluation.every_steps": 90}
LORA = {"model.lora": {"rank": 16}, "learning_rate": 1e-3}
DRAWS: dict[str, dict[str, Any]] = {
    "fresh draws": {},
    **{f"{k} cached draws": {"reference.type": "cached", "reference.num_draws": k} for k in (16, 4, 1)},
}
DATA = {"many pairs": "pairs", "few pairs": "pairs-few"}
ROWS = {f"{data}, {name}": (folder, draws) for data, folder in DATA.items() for name, draws in DRAWS.items()}
del ROWS["many pairs, 16 cached draws"]  # more draws than epochs: the same as fresh ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    args = parser.parse_args()
    for seed in args.seeds:
        folder = args.folder / f"seed-{seed}"
        make_data(folder, seed)
        few = {"path": folder / "candidates", "strategy": "best_worst", "min_margin": 0.03}
        verb("pair", few | {"output_dir": folder / DATA["few pairs"]})
        for name, (pairs, draws) in ROWS.items():
            measure(folder, name, seed, COMMON | LORA | STEPS | {"data.path": folder / pairs} | draws)
    table = make_table(args.folder, args.seeds, list(ROWS), "reference")
    print(table)
    if args.seeds == SEEDS:
        replace_table(DOCS, table)


if __name__ == "__main__":
    main()
