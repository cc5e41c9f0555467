"""A comparison on scenes of the pocket world, with hostile texts wherever text of the user's goes."""

import io

import numpy as np
from PIL import Image

from diffusion_dpo.pocket import world
from diffusion_dpo.report import BASELINE, Gallery, MetricScores, ModelFacts, Pair, Report, Sign, words
from diffusion_dpo.report.statistics import METHODS, prompts_needed, summarise_all
from tests.browser import HOSTILE

SEEDS = 2


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def make_comparison(
    num_prompts: int = 30, *, models: tuple[str, ...] = ("tuned",)
) -> tuple[Report, list[MetricScores], Gallery]:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(num_prompts)]
    prompts = [*HOSTILE, *(scene.caption for scene in scenes[len(HOSTILE) :])]
    categories = [(HOSTILE[0], "animals", "$\\frac{$ | `x`")[p % 3] for p in range(num_prompts)]
    names = (BASELINE, *models)
    pictures = {
        Pair(p, s): {name: png(world.render(scene, rng)) for name in names}
        for p, scene in enumerate(scenes)
        for s in range(SEEDS)
    }
    base = rng.random((num_prompts, SEEDS))
    values = {name: base + 0.1 * i + rng.normal(0, 0.1 * bool(i), base.shape) for i, name in enumerate(names)}
    missing = {name: it.copy() for name, it in values.items()}
    missing[models[0]][3, 0] = np.nan
    worse = {name: base + 0.05 * i + rng.normal(0, 0.1 * bool(i), base.shape) for i, name in enumerate(names)}
    scores = [
        MetricScores("clip", "trained_on", True, missing),
        MetricScores("lpips", "held_out", False, worse),
        MetricScores("faces", "held_out", True, {name: base for name in names}, auxiliary=True),
    ]
    facts = [
        ModelFacts(name=name, description=f"pocket, {HOSTILE[0]}", weights="abc", num_prompts_trained_on=3 * bool(i))
        for i, name in enumerate(names)
    ]
    report = Report(
        num_prompts=num_prompts,
        seeds_per_prompt=SEEDS,
        categories={name: categories.count(name) for name in dict.fromkeys(categories)},
        baseline=facts[0],
        models=tuple(facts[1:]),
        results=tuple(summarise_all(scores, categories)),
        methods=METHODS,
        made_with={"tuned": {"adapter_path": HOSTILE[0]}, HOSTILE[1]: [1, None]},
    )
    signs = [
        Sign(model=name, name=kind, baseline=0.4, value=0.3, warns=warns, sentence=text)
        for name in models
        for kind, warns, text in (
            ("diversity", True, "the images of a prompt differ less than the baseline's: variety was lost"),
            ("distance", False, f"its images moved by 0.1, {words.percent(0.2)} of the way to another seed's (lpips)"),
        )
    ]
    needed = {f"{rate:g}": prompts_needed(rate, words.headline(report).win_rate_std) for rate in (0.55, 0.6, 0.7)}
    report = report.model_copy(update={"signs": tuple(signs), "prompts_needed": needed})
    seeds = [[2**62 + 2 * p + s for s in range(SEEDS)] for p in range(num_prompts)]
    gallery = Gallery(prompts, categories, seeds, lambda pairs: {pair: pictures[pair] for pair in pairs})
    return report, scores, gallery
