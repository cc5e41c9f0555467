"""`demo`: every verb, one after the other, on the pocket model: offline, on a laptop's processor, in minutes.

Pairs are labelled by CLIP alone. Success is measured with `pocket_scene`, which reads the finished images back into
facts and took no part in the training, on prompts whose scenes were kept out of everything before.
"""

import importlib
import shutil
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from diffusion_dpo.config import command, load, override
from diffusion_dpo.console import say
from diffusion_dpo.files import atomic_path, claim, finish
from diffusion_dpo.pocket.world import distinct_scenes
from diffusion_dpo.settings import VERBS, DemoConfig

NUM_TRAINING_PROMPTS = 96
NUM_HELD_OUT_PROMPTS = 96


def run(config: DemoConfig) -> Path:
    """Run what is missing of the pipeline into `output_dir`; return the path of the report."""
    began = time.monotonic()
    folder, seed = config.output_dir, config.seed
    prompts, held_out = folder / "prompts.txt", folder / "held-out-prompts.txt"
    candidates, pairs, tuned, comparison = (folder / name for name in ("candidates", "pairs", "train", "compare"))
    with claim(folder, "demo", {"seed": seed}):
        _write_prompts(prompts, seed, NUM_TRAINING_PROMPTS, held_out=False)
        _write_prompts(held_out, seed, NUM_HELD_OUT_PROMPTS, held_out=True)
        _step(
            "[1/5] draw candidates: twelve images for every prompt, without guidance, so that they differ",
            "generate",
            {
                "prompts_path": prompts,
                "num_images_per_prompt": 12,
                "sampling.guidance_scale": 1,
                "seed": seed,
                "output_dir": candidates,
            },
        )
        _step("[2/5] let CLIP judge them", "score", {"path": candidates, "scorers": ["clip"]})
        _step(
            "[3/5] build preference pairs: each of the best three against each of the worst three, where it is clear",
            "pair",
            {
                "path": candidates,
                "strategy": {"type": "top_bottom", "top_k": 3},
                "min_margin": 0.03,
                "output_dir": pairs,
            },
        )
        _step(
            "[4/5] tune the model on them with Diffusion-DPO",
            "train",
            {
                "data.path": pairs,
                "model.lora": None,
                "learning_rate": 3e-5,
                "max_steps": 120,
                "global_batch_size": 32,
                "per_device_batch_size": 32,
                "seed": seed,
                "output_dir": tuned,
            },
        )
        _step(
            "[5/5] compare before and after, on prompts that were held out",
            "compare",
            {
                "models.tuned.adapter_path": tuned,
                "prompts_path": held_out,
                "scorers": ["clip", "pocket_scene"],
                "seeds_per_prompt": 3,
                "seed": seed,
                "output_dir": comparison,
            },
        )
        for name in ("report.json", "report.html"):
            with atomic_path(folder / name) as partial:
                shutil.copyfile(comparison / name, partial)
        finish(folder, "demo", {"seed": seed})
    report = folder / "report.html"
    say(f"\nThe demo took {time.monotonic() - began:.0f} s. Open the report in a browser:\n  {report.resolve()}")
    say("next, your own pairs: diffusion-dpo train model.pretrained=FOLDER data.path=PAIRS")
    return report


def _step(what: str, verb: str, settings: Mapping[str, object]) -> None:
    """Say what comes and the command that does it alone, then do it."""
    say(f"\n{what}\n$ {command(verb, settings)}")
    module = importlib.import_module(f"diffusion_dpo.{verb}")
    module.run(load(VERBS[verb], None, [override(key, value) for key, value in settings.items()]))


def _write_prompts(path: Path, seed: int, count: int, *, held_out: bool) -> None:
    captions = [scene.caption for scene in islice(distinct_scenes(seed, held_out=held_out), count)]
    with atomic_path(path) as partial:
        partial.write_text("\n".join(captions) + "\n", encoding="utf-8")
