"""`demo`: every verb, one after the other, on the pocket model: offline, on a laptop's processor, in minutes.

Pairs are labelled by CLIP alone. Success is measured with `pocket_scene`, which reads the finished images back into
facts and took no part in the training, on prompts whose scenes were kept out of everything before.
"""

import json
import re
import shlex
import shutil
import time
from itertools import islice
from pathlib import Path

from diffusion_dpo import compare, generate, pair, score, train
from diffusion_dpo.config import load
from diffusion_dpo.console import say
from diffusion_dpo.files import atomic_path, claim, finish
from diffusion_dpo.pocket.world import distinct_scenes
from diffusion_dpo.settings import (
    CompareConfig,
    DemoConfig,
    GenerateConfig,
    PairConfig,
    ScoreConfig,
    TrainConfig,
)

NUM_TRAINING_PROMPTS = 96
NUM_HELD_OUT_PROMPTS = 96


def run(config: DemoConfig) -> Path:
    """Run what is missing of the pipeline into `output_dir`; return the path of the report."""
    began = time.monotonic()
    folder, seed = config.output_dir, config.seed
    with claim(folder, "demo", {"seed": seed}):
        prompts, held_out = folder / "prompts.txt", folder / "held-out-prompts.txt"
        _write_prompts(prompts, seed, NUM_TRAINING_PROMPTS, held_out=False)
        _write_prompts(held_out, seed, NUM_HELD_OUT_PROMPTS, held_out=True)
        candidates, pairs, tuned, comparison = (folder / name for name in ("candidates", "pairs", "train", "compare"))

        settings = [
            _path("prompts_path", prompts),
            "num_images_per_prompt=8",
            f"seed={seed}",
            _path("output_dir", candidates),
        ]
        _announce(1, "draw candidates", "generate", settings)
        generate.run(load(GenerateConfig, None, settings))

        settings = [_path("path", candidates), "scorers=[clip]"]
        _announce(2, "let CLIP judge them", "score", settings)
        score.run(load(ScoreConfig, None, settings))

        settings = [_path("path", candidates), "strategy=top_bottom", "top_k=2", _path("output_dir", pairs)]
        _announce(3, "build preference pairs", "pair", settings)
        pair.run(load(PairConfig, None, settings))

        settings = [
            _path("data.path", pairs),
            "model.lora=null",
            "learning_rate=2e-5",
            "max_steps=150",
            "global_batch_size=32",
            "per_device_batch_size=32",
            f"seed={seed}",
            _path("output_dir", tuned),
        ]
        _announce(4, "tune the model with Diffusion-DPO", "train", settings)
        train.run(load(TrainConfig, None, settings))

        settings = [
            _path("after.adapter_path", tuned),
            _path("prompts_path", held_out),
            "scorers=[clip,pocket_scene]",
            f"seed={seed}",
            _path("output_dir", comparison),
        ]
        _announce(5, "compare before and after on held-out prompts", "compare", settings)
        compare.run(load(CompareConfig, None, settings))

        for name in ("report.json", "report.html"):
            with atomic_path(folder / name) as partial:
                shutil.copyfile(comparison / name, partial)
        finish(folder, "demo", {"seed": seed})
    report = folder / "report.html"
    say(f"\nThe demo took {time.monotonic() - began:.0f} s. Open the report in a browser:\n  {report.resolve()}")
    say("next, your own pairs: diffusion-dpo train model.pretrained=FOLDER data.type=pickapic data.path=PAIRS.parquet")
    return report


def _announce(number: int, what: str, verb: str, settings: list[str]) -> None:
    """Say what comes and the command that does it alone."""
    say(f"\n[{number}/5] {what}\n$ diffusion-dpo {verb} {shlex.join(settings)}")


def _path(key: str, path: Path) -> str:
    """A setting whose value is a path, quoted where YAML would read something else into it."""
    plain = re.fullmatch(r"[\w./][\w./-]*", str(path))
    return f"{key}={path if plain else json.dumps(str(path))}"


def _write_prompts(path: Path, seed: int, count: int, *, held_out: bool) -> None:
    captions = [scene.caption for scene in islice(distinct_scenes(seed, held_out=held_out), count)]
    with atomic_path(path) as partial:
        partial.write_text("\n".join(captions) + "\n", encoding="utf-8")
