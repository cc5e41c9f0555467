"""The page of a training run: complete without its script, safe whatever is in it, small whatever its length."""

import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from diffusion_dpo.report import line_charts, training_page
from diffusion_dpo.report.line_charts import Chart, Line, decimate, plot
from diffusion_dpo.report.readings import read
from diffusion_dpo.report.training_log import Curve, Log, read_log
from diffusion_dpo.report.training_page import Film, TrainingRun, pick_columns, render
from tests.browser import HOSTILE, Elements
from tests.photos import photo
from tests.report.training_runs import make_lines, make_log, without_evaluation


def film(prompts: tuple[str, ...], steps: tuple[int, ...] = (0, 40, 80), side_px: int = 32) -> Film:
    def image(row: int, column: int) -> Image.Image | None:
        return None if (row, column) == (0, 1) else Image.new("RGB", (side_px, side_px), (20 * row, 60 * column, 90))

    rows = tuple(tuple(image(row, column) for column in range(len(steps))) for row in range(len(prompts)))
    return Film(prompts, steps, rows, len(steps))


def make_run(log: Log, *, name: str = "runs/train", prompts: tuple[str, ...] = ("a cat", "a dog")) -> TrainingRun:
    facts = (("model", name), ("objective", "dpo"))
    return TrainingRun(name, log, read(log, relative=True), ("A note.",), film(prompts), facts, facts, facts, 200)


def test_the_page_depends_on_the_run_alone() -> None:
    assert render(make_run(make_log())) == render(make_run(make_log()))
    assert render(make_run(make_log())) != render(make_run(make_log(lambda step: {"loss": 0.6})))


def test_the_page_is_complete_without_its_script() -> None:
    text = render(make_run(make_log()))
    tags = Elements(text).tags
    assert sum(tag == "figure" for tag, _ in tags) == 9
    assert sum(tag == "img" for tag, _ in tags) == 5 + 1  # of six previews one is missing; the last is the viewer's
    assert "Held-out accuracy is 0.65\u00a0±\u00a00.03, better than chance." in text
    assert (
        text.index("What the curves say") < text.index("The curves") < text.index("Previews") < text.index("The run<")
    )
    assert "\u22124.6" in text and "A note." in text and "of 200" not in text


SHAPES: dict[str, Log] = {
    "one step": make_log(num_steps=1),
    "nothing held out": without_evaluation(),
    "one evaluation": make_log(num_steps=20),
    "no reference": read_log(f'{{"step": {i}, "loss": 0.5, "errors/chosen": 0.3}}\n' for i in range(1, 40)),
    "only a step": read_log(['{"step": 7}\n']),
    "all null": make_log(lambda step: {"loss": None, "grad_norm": None, "errors/chosen": None, "eval/accuracy": None}),
    "constant": make_log(lambda step: {"loss": 0.0, "grad_norm": 0.0, "rewards/margins": -5.0}),
    "huge": make_log(lambda step: {"loss": 1e99, "grad_norm": 1e-300, "eval/kl": 1e300, "rewards/chosen": 5e-324}),
    "resumed": read_log([*make_lines(50), *list(make_lines(80))[30:]]),
    "begins late": read_log(list(make_lines(80))[30:]),
}  # fmt: skip


@pytest.mark.parametrize("log", SHAPES.values(), ids=SHAPES)
def test_runs_of_every_shape_have_a_page(log: Log) -> None:
    text = render(make_run(log))
    paths = re.findall(r' d="([^"]*)"', text)
    assert all(re.fullmatch(r"([ML]-?[\d.]+ -?[\d.]+)*Z?", path) for path in paths)
    drawn = [float(number) for path in paths for number in re.findall(r"-?[\d.]+", path)]
    assert all(line_charts.TOP_PX <= number <= line_charts.RIGHT_PX for number in drawn)
    assert not re.search(
        r"\b(nan|inf|None)\b", re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.S)
    )


def test_curves_break_where_there_is_no_number() -> None:
    gap = Curve(np.arange(1, 7), np.array([1.0, 2, np.nan, np.nan, 5, 6]))
    found = plot(Chart("t", "c", (Line("l", "training", gap),)), 1, 6)
    assert found is not None and found.traces[0].path.count("M") == 2
    assert plot(Chart("t", "c", (Line("l", "training", Curve(np.arange(1), np.array([np.nan]))),)), 1, 6) is None


def test_decimating_keeps_every_peak() -> None:
    values = np.zeros(100_000)
    values[[7, 50_001, 99_998]] = 5, -7, 9
    short = decimate(Curve(np.arange(100_000), values), 300)
    assert len(short.steps) <= 600
    assert {(7, 5.0), (50_001, -7.0), (99_998, 9.0)} <= set(
        zip(short.steps.tolist(), short.values.tolist(), strict=True)
    )
    assert (np.diff(short.steps) > 0).all()


def test_steps_of_previews_are_spread_evenly() -> None:
    assert pick_columns(range(0, 2010, 10), 5) == [0, 500, 1000, 1500, 2000]
    assert pick_columns([0, 7], 24) == [0, 7] and pick_columns([3], 24) == [3]


def test_a_hundred_thousand_steps_are_a_small_page_in_seconds() -> None:
    lines = list(make_lines(2000, every=50))
    body = [line.partition(",")[2] for line in lines]
    long = (f'{{"step": {step},{body[step % len(body)]}' for step in range(1, 100_001))
    began = time.process_time()
    text = render(make_run(read_log(long)))
    assert time.process_time() - began < 15
    assert len(text) < 2_000_000
    assert "100,000" in text and "the lowest and highest of each part" in text


def test_previews_keep_to_their_budget() -> None:
    photos = [photo(i, (400, 400)) for i in range(4)]
    steps = tuple(range(0, 240, 10))
    rows = tuple(tuple(photos[i % 4] for i in range(len(steps))) for _ in range(12))
    run = TrainingRun("r", make_log(), read(make_log(), relative=True), film=Film(("p",) * 12, steps, rows, 24))
    assert len(render(run)) < training_page.PREVIEW_BUDGET_BYTES * 4 / 3 + 1_000_000


# --- safe ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page in which all that is the user's tries to be more than text."""
    log = read_log(
        line.replace('"loss"', '"<script>document.documentElement.dataset.ran=1</script>": 1, "loss"')
        for line in make_lines(60)
    )
    page = tmp_path_factory.mktemp("page") / "report.html"
    page.write_text(render(make_run(log, name=HOSTILE[1], prompts=tuple(HOSTILE))), encoding="utf-8")
    return page


def test_hostile_prompts_stay_text_and_nothing_comes_from_outside(hostile: Path) -> None:
    text = hostile.read_text("utf-8")
    tags = Elements(text).tags
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on") or name == "style"]
    assert [attributes["href"] for _, attributes in tags if "href" in attributes] == ["#curves"]
    assert {(attributes["src"] or "").partition(",")[0] for tag, attributes in tags if "src" in attributes} == {
        "data:image/png;base64"
    }
    assert "default-src &#39;none&#39;" in text and "url(" not in text and "\x00" not in text
    assert len(text) < 500_000


@pytest.mark.browser
def test_previews_are_looked_through_by_keyboard(hostile: Path, chromium: Browser) -> None:
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(hostile.as_uri())
    buttons = page.locator("#film button")
    buttons.first.focus()
    page.keyboard.press("Enter")
    viewer, step, prompt = page.locator("#viewer"), page.locator("#viewer-step"), page.locator("#viewer-prompt")
    assert (
        viewer.is_visible()
        and step.text_content() == "step 0"
        and page.locator("#back").get_attribute("aria-disabled") == "true"
    )
    page.keyboard.press("ArrowRight")
    assert step.text_content() == "step 80"  # of the first prompt, step 40 has no image
    page.keyboard.press("ArrowRight")
    assert step.text_content() == "step 80" and page.locator("#on").get_attribute("aria-disabled") == "true"
    page.keyboard.press("ArrowDown")
    assert prompt.text_content() == HOSTILE[1]
    page.locator("#back").click()
    assert step.text_content() == "step 40"
    page.keyboard.press("ArrowUp")
    assert step.text_content() == "step 40", "there is none above"
    assert page.locator("#viewer-image").get_attribute("src") == buttons.nth(3).locator("img").get_attribute("src")
    page.keyboard.press("Escape")
    assert viewer.is_hidden() and buttons.nth(3).evaluate("it => it === document.activeElement")
    page.keyboard.press("ArrowLeft")
    assert buttons.nth(2).evaluate("it => it === document.activeElement")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.documentElement.dataset.ran") is None and not problems
    page.close()


@pytest.mark.browser
def test_curves_are_read_by_keyboard_and_by_pointer(hostile: Path, chromium: Browser) -> None:
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.goto(hostile.as_uri())
    figure = page.locator(".trace").nth(1)
    chart, shown = figure.locator("svg"), figure.locator("output")
    chart.focus()
    assert (shown.text_content() or "").startswith("step 60: chosen ")
    page.keyboard.press("ArrowLeft")
    assert (shown.text_content() or "").startswith("step 40: chosen ")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert (shown.text_content() or "").startswith("step 20: chosen ")
    chart.blur()
    assert shown.text_content() == ""
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.96 * box["width"], box["y"] + 20)
    assert (shown.text_content() or "").startswith("step 60: chosen 0.0 % ± 0.2 %".replace(" %", "\u00a0%"))
    page.close()
