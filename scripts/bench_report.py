"""How long a report takes, how large it is, and how it feels: built from photographs, then scrolled in Chromium.

    python scripts/bench_report.py num_prompts=2000 seeds=2 models=1 side_px=512 embed=true

Images are crops of the photographs that ship with scikit-image, each in two versions; every one is its own PNG file.
"""

import io
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance
from playwright.sync_api import sync_playwright
from rich.table import Table
from skimage import data

from diffusion_dpo.console import show
from diffusion_dpo.report import BASELINE, Gallery, MetricScores, ModelFacts, Pair, Report
from diffusion_dpo.report.html import write_report
from diffusion_dpo.report.statistics import METHODS, summarise_all

DEFAULTS = {"num_prompts": 2000, "seeds": 2, "models": 1, "side_px": 512, "embed": True}
PHOTOGRAPHS = [Image.fromarray(it) for it in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket())]


def picture(pair: Pair, model: int, side_px: int) -> bytes:
    """A crop of a photograph, in another light for each model."""
    rng = np.random.default_rng([pair.prompt, pair.seed])
    photograph = PHOTOGRAPHS[int(rng.integers(len(PHOTOGRAPHS)))]
    crop = int(rng.integers(180, min(photograph.size)))
    left, top = (int(rng.integers(0, length - crop + 1)) for length in photograph.size)
    image = photograph.crop((left, top, left + crop, top + crop)).resize((side_px, side_px), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    ImageEnhance.Color(image).enhance(1 + 0.2 * model).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def comparison(num_prompts: int, seeds: int, models: int, side_px: int) -> tuple[Report, list[MetricScores], Gallery]:
    rng = np.random.default_rng(0)
    names = [BASELINE, *(f"step-{100 * (i + 1)}" for i in range(models))]
    base = rng.normal(size=(num_prompts, seeds))
    scores = [
        MetricScores(
            name, role, True, {it: base + 0.1 * i + 0.5 * rng.normal(size=base.shape) for i, it in enumerate(names)}
        )
        for name, role in (("hps", "held_out"), ("pickscore", "trained_on"), ("clip", "held_out"))
    ]
    categories = [f"category {p % 11}" for p in range(num_prompts)]
    facts = [ModelFacts(name=name, description="photographs", weights="") for name in names]
    report = Report(
        num_prompts=num_prompts,
        seeds_per_prompt=seeds,
        categories={name: categories.count(name) for name in dict.fromkeys(categories)},
        baseline=facts[0],
        models=tuple(facts[1:]),
        results=tuple(summarise_all(scores, categories)),
        methods=METHODS,
        made_with={},
    )

    def read(pairs: Sequence[Pair]) -> dict[Pair, dict[str, bytes]]:
        began = time.monotonic()
        found = {pair: {name: picture(pair, i, side_px) for i, name in enumerate(names)} for pair in pairs}
        read.seconds += time.monotonic() - began
        return found

    read.seconds = 0.0
    prompts = [f"prompt {p}: a photograph of something, in the light of the morning" for p in range(num_prompts)]
    return report, scores, Gallery(prompts, categories, [list(range(seeds))] * num_prompts, read)


def scroll(page_path: Path) -> dict[str, str]:
    """Open the page, show all pairs, scroll to the end and back; return what was measured."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        began = time.monotonic()
        page.goto(page_path.as_uri(), wait_until="load")
        loaded = time.monotonic() - began
        page.evaluate(
            """() => { window.tasks = []; new PerformanceObserver((list) => { for (const it of list.getEntries())
            window.tasks.push(it.duration); }).observe({ type: "longtask" }); }"""
        )
        for _ in range(10):
            if page.locator("#more").is_visible():
                page.locator("#more").click()
        times = page.evaluate(
            """() => new Promise((done) => { const frames = []; let last = performance.now(); let y = 0;
            const step = (now) => { frames.push(now - last); last = now; y += 60; scrollTo(0, y);
            if (y < document.documentElement.scrollHeight && frames.length < 1200) requestAnimationFrame(step);
            else done(frames); }; requestAnimationFrame(step); })"""
        )
        tasks = page.evaluate("window.tasks")
        nodes = page.evaluate("document.querySelectorAll('*').length")
        browser.close()
    frames = np.array(times)
    return {
        "load, s": f"{loaded:.2f}",
        "nodes": f"{nodes:,}",
        "frames": f"{frames.size}",
        "frame time p50 / p95 / max, ms": " / ".join(
            f"{it:.0f}" for it in (*np.percentile(frames, [50, 95]), frames.max())
        ),
        "long tasks (> 50 ms), longest ms": f"{len(tasks)}, {max(tasks, default=0):.0f}",
    }


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    settings = {name: given.get(name, str(value)) for name, value in DEFAULTS.items()}
    num_prompts, seeds, models, side_px = (int(settings[it]) for it in ("num_prompts", "seeds", "models", "side_px"))
    embed = settings["embed"].lower() == "true"
    report, scores, gallery = comparison(num_prompts, seeds, models, side_px)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        page = write_report(Path(folder), report, scores, gallery, embed=embed)
        seconds = time.monotonic() - began
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        beside = sum(it.stat().st_size for it in Path(folder).glob("report_assets/*"))
        facts = {
            "images": f"{num_prompts * seeds * (models + 1):,} of {side_px} px",
            "built in, s": f"{seconds:.1f}, of which {gallery.read.seconds:.1f} drew the test images",
            "peak memory, MB": f"{peak_mb:.0f} ({before_mb:.0f} before)",
            "report.html, MB": f"{page.stat().st_size / 1e6:.1f}",
            "beside it, MB": f"{beside / 1e6:.1f}",
        } | scroll(page)
    table = Table("", "embed" if embed else "assets")
    for name, value in facts.items():
        table.add_row(name, value)
    show(table)


if __name__ == "__main__":
    main()
