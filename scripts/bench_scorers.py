"""Every registered judge: what it is, and what it costs with tiny weights; the tables of docs/scorers.md.

    python scripts/bench_scorers.py              # both tables, a few minutes on two cores
    python scripts/bench_scorers.py --facts      # what the classes say of themselves alone
    python scripts/bench_scorers.py --only clip lpips    # measure these and print

The tiny weights are those of the tests, so the times say what the framework, decoding and preprocessing cost, and not
what a model of full size does. Images are photographs of 512 x 512 pixels.
"""

import argparse
import contextlib
import inspect
import io
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402
from pydantic import ValidationError  # noqa: E402

from diffusion_dpo import score  # noqa: E402
from diffusion_dpo.config import load  # noqa: E402
from diffusion_dpo.data.images import pixel_hash  # noqa: E402
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, write_shard  # noqa: E402
from diffusion_dpo.pocket.world import distinct_scenes  # noqa: E402
from diffusion_dpo.registry import TABLES, resolve  # noqa: E402
from diffusion_dpo.scorers import Metric, Scorer, ScoreRequest  # noqa: E402
from diffusion_dpo.scorers.judge import Judge  # noqa: E402
from diffusion_dpo.settings import ScoreConfig  # noqa: E402
from tests.photos import photo  # noqa: E402
from tests.scorers.tiny import TINY  # noqa: E402

DOCS = ROOT / "docs" / "scorers.md"
FACTS, TIMES = "facts", "times"
BATCH_SIZE = 16
IMAGES_PER_PROMPT = 4
SIDE_PX = 512
NUM_IMAGES = 128
SECONDS_A_SCORER = 6.0
MOST_ROUNDS = 41


def facts() -> str:
    """Return the table of facts and, below it, each class's own words; as the registry is now."""
    scorers = {name: _by_default(name) for name in sorted(TABLES["scorers"])}
    heads = ("type", "metrics", "better", "range", "needs", "extra", "weights", "licence", "source")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, scorer in scorers.items():
        main = scorer.metrics[0]
        names = ", ".join(f"({m.name})" if m.auxiliary else m.name for m in scorer.metrics)
        better = "higher" if main.higher_is_better else "lower"
        needs = ", ".join(sorted(scorer.needs)) or "-"
        said = (names, better, _range(main), needs, scorer.extra or "-", scorer.weights, scorer.licence, scorer.source)
        lines.append(f"| `{name}` | {' | '.join(said)} |")
    lines += [
        "",
        "In brackets: what informs and labels no pairs unless asked to. Without an extra: the package brings it.",
    ]
    for name, scorer in scorers.items():
        lines += ["", f"### {name}", "", inspect.getdoc(type(scorer)) or ""]
    return "\n".join(lines) + "\n"


def replaced(page: str, name: str, content: str) -> str:
    """Return the page with what stands between `<!-- name -->` and `<!-- end of name -->` replaced."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    return page[: page.index(begin) + len(begin)] + content + page[page.index(end) :]


def _by_default(name: str) -> Scorer:
    """Make a scorer with its defaults, or with tiny weights where a setting has none."""
    made = resolve("scorers", name)
    try:
        return made(type=name)
    except ValidationError:
        with tempfile.TemporaryDirectory() as folder:
            return made(type=name, **TINY[name](Path(folder))[0])


def _range(metric: Metric) -> str:
    low, high = metric.range
    if math.isinf(high):
        return "unbounded" if math.isinf(low) else f"{low:g} and up"
    return f"{low:.4g} to {high:.4g}"


def measured(names: list[str]) -> str:
    """Return the table of times."""
    lines = [
        "| type | ms/image | images/s | framework | first run s | second run s | faster |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            folder = Path(root) / name
            folder.mkdir()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                scorer = resolve("scorers", name)(type=name, **TINY[name](folder)[0])
                bare, framed = _bare_and_framed(scorer)
                first, second = _two_runs(Path(root) / f"{name}-candidates", scorer)
            lines.append(
                f"| `{name}` | {bare * 1e3:.2f} | {1 / bare:.0f} | {framed - 1:+.1%} | {first:.2f} | {second:.3f} "
                f"| {first / second:.0f} |"
            )
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _bare_and_framed(scorer: Scorer) -> tuple[float, float]:
    """Return the seconds an image of `scorer.score`, and those of `Judge.score` over them; medians, taken in turns."""
    import torch

    scorer.load(torch.device("cpu"))
    requests = [
        ScoreRequest(
            image=image,
            prompt=prompt,
            references=(photo(1, (SIDE_PX, SIDE_PX)),) if "reference" in scorer.needs else (),
            rivals=tuple(other for other in group if other is not image) if "rivals" in scorer.needs else (),
        )
        for prompt, group in itertools.islice(_groups(), BATCH_SIZE // IMAGES_PER_PROMPT)
        for image in group
    ]
    judge = Judge(scorer, batch_size=BATCH_SIZE)
    bare: list[float] = []
    framed: list[float] = []
    end = time.perf_counter() + SECONDS_A_SCORER
    while len(bare) < 5 or (time.perf_counter() < end and len(bare) < MOST_ROUNDS):
        turns: list[tuple[list[float], Callable[[], Any]]] = [
            (bare, lambda: scorer.score(requests)),
            (framed, lambda: judge.score(requests)),
        ]
        for seconds, work in turns if len(bare) % 2 else turns[::-1]:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    # the first round warms up
    ratio = statistics.median(b / a for a, b in zip(bare[1:], framed[1:], strict=True))
    return statistics.median(bare[1:]) / BATCH_SIZE, ratio


def _two_runs(folder: Path, scorer: Scorer) -> tuple[float, float]:
    """Return the seconds of `score` over new candidates and of the same command again, libraries being imported."""
    folder.mkdir()
    needed = [photo(1, (SIDE_PX, SIDE_PX))] if "reference" in scorer.needs else []
    references = [image_struct(encode_png(image)) for image in needed]
    rows = [
        {
            "uid": pixel_hash(image),
            "prompt_id": prompt,
            "prompt": prompt,
            "index": index,
            "seed": index,
            "image": image_struct(encode_png(image)),
            "references": references,
            "origin": "",
            "settings_hash": "0",
        }
        for prompt, group in itertools.islice(_groups(), NUM_IMAGES // IMAGES_PER_PROMPT)
        for index, image in enumerate(group)
    ]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    config = load(ScoreConfig, None, [f"path={folder}", "device=cpu"]).model_copy(update={"scorers": (scorer,)})
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        score.run(config)
        seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def _groups() -> "itertools.chain[tuple[str, list[Image.Image]]]":
    """Yield prompts of the pocket world, each with its own crops of a photograph."""

    def each() -> Any:
        for number, scene in enumerate(distinct_scenes(0)):
            large = photo(number % 4, (SIDE_PX + 64 + number, SIDE_PX + 64))
            yield (
                scene.caption,
                [large.crop((i, 2 * i, SIDE_PX + i, SIDE_PX + 2 * i)) for i in range(IMAGES_PER_PROMPT)],
            )

    return itertools.chain(each())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", action="store_true", help="write the facts alone")
    parser.add_argument("--only", nargs="+", choices=sorted(TINY), help="measure these, and write nothing")
    arguments = parser.parse_args()
    if arguments.only:
        measured(arguments.only)
        return
    page = replaced(DOCS.read_text(encoding="utf-8"), FACTS, facts())
    if not arguments.facts:
        page = replaced(page, TIMES, measured(sorted(TABLES["scorers"].keys() & TINY.keys())))
    DOCS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
