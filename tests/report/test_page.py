"""report.html: hostile text stays text, pictures are whole, the file stays handy, and the page works in a browser."""

import base64
import io
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo.pocket import world
from diffusion_dpo.report import Gallery, MetricScores, Pair, Report, html
from diffusion_dpo.report.gallery import choose_pairs, embed
from diffusion_dpo.report.statistics import METHODS, summarise
from tests.browser import HOSTILE, Elements, needs_chromium, run_page

SEEDS = 2


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def comparison(num_prompts: int = 30) -> tuple[Report, list[MetricScores], Gallery]:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng) for _ in range(num_prompts)]
    prompts = [*HOSTILE, *(scene.caption for scene in scenes[len(HOSTILE) :])]
    pictures = {
        Pair(p, s): (png(world.render(scene, rng)), png(world.render(scene, rng)))
        for p, scene in enumerate(scenes)
        for s in range(SEEDS)
    }
    before = rng.random((num_prompts, SEEDS))
    after = before + 0.1 + rng.normal(0, 0.1, before.shape)
    after[3, 0] = np.nan
    scores = [
        MetricScores("clip", "trained_on", True, before, after),
        MetricScores("lpips", "held_out", False, after, before),
        MetricScores("faces", "held_out", True, before, before, auxiliary=True),
    ]
    report = Report(
        num_prompts=num_prompts,
        seeds_per_prompt=SEEDS,
        metrics=tuple(summarise(metric) for metric in scores),
        methods=METHODS,
        made_with={"after": {"adapter_path": HOSTILE[0]}, HOSTILE[1]: [1, None]},
    )
    seeds = [[11, 12]] * num_prompts
    return report, scores, Gallery(prompts, seeds, lambda pairs: {pair: pictures[pair] for pair in pairs})


@pytest.fixture(scope="module")
def page() -> str:
    return html.render(*comparison())


def test_hostile_text_makes_no_element(page: str) -> None:
    tags = Elements(page).tags
    assert sum(tag == "script" for tag, _ in tags) == 2  # the data and our own
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    sources = [attributes.get("src") for tag, attributes in tags if tag == "img" and "src" in attributes]
    assert len(sources) == 2 * 30 * SEEDS
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "{{ 7 * 7 }}" in page and "\x00" not in page
    page.encode("utf-8")


def test_nothing_comes_from_outside(page: str) -> None:
    links = [value for _, attributes in Elements(page).tags for name, value in attributes.items() if name == "href"]
    assert links == ["#wall"]
    assert "url(" not in page and "@import" not in page and "//" not in re.sub(r"base64,[^\"]*|//[^\n]*\n", "", page)
    assert "default-src &#39;none&#39;" in page and "unsafe" not in page


def test_the_page_is_a_function_of_its_input(page: str) -> None:
    assert html.render(*comparison()) == page


def test_report_json_follows_the_shipped_schema(tmp_path: Path) -> None:
    html.write_report(tmp_path, *comparison())
    shipped = json.loads(resources.files("diffusion_dpo.report").joinpath("schema.json").read_text("utf-8"))
    assert shipped == Report.model_json_schema(), "write Report.model_json_schema() to report/schema.json"
    text = (tmp_path / "report.json").read_text("utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert Report.model_validate_json(text).metrics[0].num_missing == 1
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 30 and lines[1]["prompt"] == HOSTILE[1]
    assert lines[0]["metrics"]["faces"]["difference"] == 0


def test_small_images_are_embedded_untouched() -> None:
    data = png(Image.new("RGB", (64, 64), "red"))
    wall = embed([(Pair(0, 0), (data, data))])
    assert base64.b64decode(wall.shown[0].before.partition(",")[2]) == data


def test_large_images_are_reduced_to_fit_and_the_page_says_so() -> None:
    rng = np.random.default_rng(0)
    noise = [png(Image.fromarray(rng.integers(0, 256, (200, 150, 3), dtype=np.uint8))) for _ in range(2)]
    images = [(Pair(p, 0), (noise[0], noise[1])) for p in range(20)]
    wall = embed(images, budget_bytes=1_000_000)
    assert len(wall.shown) == 20 and "WebP of at most" in wall.note
    assert sum(len(shown.before) + len(shown.after) for shown in wall.shown) < 1_000_000 * 1.4
    scarce = embed(images, budget_bytes=150_000)
    assert 0 < len(scarce.shown) < 20 and f"{20 - len(scarce.shown)} of 20 pairs did not fit" in scarce.note


def test_a_large_comparison_shows_best_worst_and_random_of_each_metric() -> None:
    differences = np.random.default_rng(0).permutation(1000).reshape(500, 2).astype(float)
    scores = [MetricScores("m", "held_out", True, np.zeros((500, 2)), differences)]
    chosen = choose_pairs(scores, (500, 2), limit=30)
    values = sorted(differences[pair] for pair in chosen)
    assert len(chosen) == 30 and chosen != sorted(chosen)
    assert values[:9] == list(range(9)) and values[-9:] == list(range(991, 1000))


# --- in a browser ----------------------------------------------------------------------------------------------------

PROBE = """
const probe = {};
const visible = () => [...list.children].filter((card) => !card.hidden);
const set = (name, value) => { toolbar.elements[name].value = value; toolbar.dispatchEvent(new Event("input")); };
const differences = (name) => {
  const { values } = metrics.find((metric) => metric.name === name);
  return visible().map((card) => values[card.dataset.number][1] - values[card.dataset.number][0]);
};
probe.cards = cards.length;
probe.shown = visible().length;
set("metric", 1); set("order", "best"); probe.best = differences("lpips");
set("order", "worst"); probe.worst = differences("lpips");
set("order", "changed"); probe.changed = differences("lpips");
byId("more").click(); probe.more = visible().length;
set("text", "ONERROR"); probe.filtered = visible().map((card) => card.querySelector(".prompt").textContent);
probe.count = toolbar.elements.count.value;
set("text", "no such prompt"); probe.empty = !byId("empty").hidden;
set("text", "onerror"); visible()[0].querySelector("button").click();
probe.open = zoom.open;
probe.zoomed = byId("zoom-prompt").textContent;
probe.rows = byId("zoom-scores").tBodies[0].rows.length;
byId("cut").value = 20; byId("cut").dispatchEvent(new Event("input"));
probe.clip = getComputedStyle(byId("zoom-after")).clipPath;
zoom.dispatchEvent(new KeyboardEvent("keydown", { key: "j" }));
probe.position = byId("position").value;
zoom.close();
const evil = "document.documentElement.dataset.ran = 1";
document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="${evil}">`);
document.body.append(Object.assign(document.createElement("script"), { textContent: evil }));
setTimeout(() => { document.documentElement.dataset.probe = JSON.stringify(probe); }, 50);
"""


@pytest.mark.browser
@needs_chromium
def test_the_page_works_and_runs_nothing_but_its_own_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = html.asset
    monkeypatch.setattr(html, "asset", lambda name: plain(name) + (PROBE if name == "report.js" else ""))
    page = html.write_report(tmp_path, *comparison())
    root = run_page(page, tmp_path / "profile")
    assert "data-probe" in root
    assert "data-ran" not in root, "text of the user's, or a script that is not ours, was run"
    probe = json.loads(root["data-probe"] or "")
    assert (probe["cards"], probe["shown"], probe["more"]) == (60, 24, 48)
    assert probe["best"] == sorted(probe["best"]) and probe["best"][0] < 0  # lower is better
    assert probe["worst"] == sorted(probe["worst"], reverse=True) and probe["worst"][0] > probe["best"][0]
    assert [abs(x) for x in probe["changed"]] == sorted(map(abs, probe["changed"]), reverse=True)
    assert probe["filtered"] == [HOSTILE[1]] * SEEDS
    assert probe["count"] == "2 pairs" and probe["empty"]
    assert probe["open"] and probe["zoomed"] == HOSTILE[1] and probe["rows"] == 3
    assert probe["clip"] == "inset(0px 0px 0px 20%)" and probe["position"] == "2 / 2"
