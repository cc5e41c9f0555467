"""report.html: hostile text stays text, pictures are whole, the file stays handy, numbers are where they belong."""

import base64
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.report import BASELINE, Gallery, MetricScores, ModelFacts, Pair, Report, html
from diffusion_dpo.report.gallery import ASSETS, choose_pairs, disagreement, embed
from diffusion_dpo.report.statistics import summarise_all
from tests.browser import HOSTILE, Elements
from tests.report.comparison import SEEDS, make_comparison, png

MODELS = ("tuned", "tuned@0.5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two models."""
    folder = tmp_path_factory.mktemp("report")
    html.write_report(folder, *make_comparison(models=MODELS), embed=True)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text("utf-8")


def test_hostile_text_makes_no_element(page: str) -> None:
    tags = Elements(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 2  # the data and our own
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "style"]
    sources = [attributes.get("src") for tag, attributes in tags if tag == "img" and "src" in attributes]
    assert len(sources) == 3 * 30 * SEEDS
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "{{ 7 * 7 }}" in page and "\x00" not in page


def test_nothing_comes_from_outside(page: str) -> None:
    links = [value for _, attributes in Elements(page).tags for name, value in attributes.items() if name == "href"]
    assert links == ["#wall"]
    assert "url(" not in page and "@import" not in page and "//" not in re.sub(r"base64,[^\"]*|//[^\n]*\n", "", page)
    assert "default-src &#39;none&#39;" in page and "img-src data:;" in page and "unsafe" not in page


def test_a_report_is_a_function_of_its_input(folder: Path, tmp_path: Path) -> None:
    html.write_report(tmp_path, *make_comparison(models=MODELS), embed=True)
    written = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in written} >= {"metrics.png", "histogram.png", "categories.png", "models.png"}


def test_report_json_follows_the_shipped_schema(folder: Path) -> None:
    shipped = json.loads(resources.files("diffusion_dpo.report").joinpath("schema.json").read_text("utf-8"))
    assert shipped == Report.model_json_schema(), "write Report.model_json_schema() to report/schema.json"
    text = (folder / "report.json").read_text("utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert Report.model_validate_json(text).of("tuned")[0].num_missing == 1


def test_every_prompt_has_its_numbers(folder: Path) -> None:
    _, scores, gallery = make_comparison(models=MODELS)
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 30 and lines[1]["prompt"] == HOSTILE[1] and lines[1]["category"] == "animals"
    assert lines[4]["seeds"] == gallery.seeds[4]
    clip = scores[0].values
    for model in MODELS:
        found = lines[4]["metrics"]["clip"][model]
        assert found["mean"] == pytest.approx(clip[model][4].mean())
        assert found["difference"] == pytest.approx(clip[model][4].mean() - clip[BASELINE][4].mean())
    assert lines[3]["metrics"]["clip"]["tuned"]["difference"] == pytest.approx(
        clip["tuned"][3, 1] - clip[BASELINE][3, 1]
    )
    assert lines[0]["metrics"]["faces"]["tuned"]["difference"] == 0
    assert set(lines[0]["metrics"]["clip"][BASELINE]) == {"mean"}


def test_small_images_are_embedded_untouched() -> None:
    data = png(Image.new("RGB", (64, 64), "red"))
    selection = embed([(Pair(0, 0), {BASELINE: data, "tuned": data})])
    assert base64.b64decode(selection.shown[0].sources[0].partition(",")[2]) == data


def test_large_images_are_reduced_to_fit_and_the_page_says_so() -> None:
    rng = np.random.default_rng(0)
    noise = [png(Image.fromarray(rng.integers(0, 256, (200, 150, 3), dtype=np.uint8))) for _ in range(2)]
    images = [(Pair(p, 0), {BASELINE: noise[0], "tuned": noise[1]}) for p in range(20)]
    selection = embed(images, budget_bytes=1_000_000)
    assert len(selection.shown) == 20 and "WebP of at most" in selection.note
    assert sum(len(source) for shown in selection.shown for source in shown.sources) < 1_000_000 * 1.4
    assert selection.num_bytes < 1_000_000
    scarce = embed(images, budget_bytes=150_000)
    assert 0 < len(scarce.shown) < 20 and f"{20 - len(scarce.shown)} of 20 pairs did not fit" in scarce.note


def test_a_large_comparison_shows_best_worst_and_random_of_each_metric() -> None:
    differences = np.random.default_rng(0).permutation(1000).reshape(500, 2).astype(float)
    scores = [MetricScores("m", "held_out", True, {BASELINE: np.zeros((500, 2)), "tuned": differences})]
    chosen = choose_pairs(scores, (500, 2), limit=30)
    values = sorted(differences[pair] for pair in chosen)
    assert len(chosen) == 30 and chosen != sorted(chosen)
    assert values[:9] == list(range(9)) and values[-9:] == list(range(991, 1000))
    assert sorted(choose_pairs(scores, (500, 2))) == [Pair(p, s) for p in range(500) for s in range(2)]


def test_metrics_disagree_most_where_one_gains_what_another_loses() -> None:
    def metric(name: str, differences: list[float], *, higher: bool = True, auxiliary: bool = False) -> MetricScores:
        values = np.array(differences)[:, None]
        return MetricScores(name, "held_out", higher, {BASELINE: 0 * values, "m": values}, auxiliary=auxiliary)

    first = metric("a", [1.0, 1.0, -1.0, 1.0, -1.0])
    second = metric("b", [100.0, -100.0, -100.0, -10.0, np.nan])
    third = metric("c", [-9.0, 9.0, -9.0, 9.0, 9.0], auxiliary=True)
    found = disagreement([first, second, third], "m")[:, 0]
    assert found[1] > found[3] > 0 > max(found[0], found[2]) and np.isnan(found[4])
    flipped = metric("b", [-100.0, 100.0, 100.0, 10.0, np.nan], higher=False)
    np.testing.assert_allclose(disagreement([first, flipped], "m")[:, 0], found)
    assert np.isnan(disagreement([first], "m")).all()


def test_images_beside_the_page_are_whole_kept_and_cleared(tmp_path: Path) -> None:
    report, scores, gallery = make_comparison()
    stranger = tmp_path / ASSETS / "holiday.webp"
    stranger.parent.mkdir()
    stranger.write_bytes(b"mine")
    stale = stranger.with_name("0" * 20 + ".webp")
    stale.write_bytes(b"of an earlier report")
    page = html.write_report(tmp_path, report, scores, gallery, embed=False).read_text("utf-8")
    named = set(re.findall(rf"{ASSETS}/([0-9a-f]{{20}}\.png)", page))
    images = {
        data
        for both in gallery.read([Pair(p, s) for p in range(30) for s in range(SEEDS)]).values()
        for data in both.values()
    }
    assert {path.read_bytes() for path in stranger.parent.glob("*.png")} == images
    assert named == {path.name for path in stranger.parent.glob("*.png")}
    assert not stale.exists() and stranger.read_bytes() == b"mine"
    assert "img-src &#39;self&#39;;" in page and "data:image" not in page
    times = {path: path.stat().st_mtime_ns for path in stranger.parent.glob("*.png")}
    html.write_report(tmp_path, report, scores, gallery, embed=False)
    assert times == {path: path.stat().st_mtime_ns for path in stranger.parent.glob("*.png")}, "made again"
    html.write_report(tmp_path, report, scores, gallery, embed=True)
    assert [path.name for path in stranger.parent.iterdir()] == ["holiday.webp"]


@pytest.mark.parametrize("fill", [0.5, np.nan])
def test_the_barest_comparison_makes_a_report(tmp_path: Path, fill: float) -> None:
    picture = png(Image.new("RGB", (16, 16)))
    values = {name: np.full((1, 1), fill) for name in (BASELINE, "tuned")}
    scores = [MetricScores("m", "held_out", True, values, auxiliary=True)]
    facts = [ModelFacts(name=name, description="", weights="") for name in values]
    report = Report(
        num_prompts=1,
        seeds_per_prompt=1,
        baseline=facts[0],
        models=(facts[1],),
        results=tuple(summarise_all(scores, [""])),
        methods={},
        made_with={},
    )
    gallery = Gallery([""], [""], [[7]], lambda pairs: {pair: dict.fromkeys(values, picture) for pair in pairs})
    page = html.write_report(tmp_path, report, scores, gallery, embed=True).read_text("utf-8")
    assert ("m is the same for both" if fill == 0.5 else "no pair could be scored with m") in page
    assert "NaN" not in page and "nan" not in (tmp_path / "report.md").read_text("utf-8")
