"""report.html in a browser: keys and clicks do what they say, and nothing but the page's own script runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from diffusion_dpo.report import html
from tests.browser import HOSTILE
from tests.report.comparison import SEEDS, make_comparison

pytestmark = pytest.mark.browser
MODELS = ("tuned", "tuned@0.5", "a-checkpoint-with-a-long-name@1.5", "last")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return html.write_report(tmp_path_factory.mktemp("report"), *make_comparison(models=MODELS), embed=True)


@pytest.fixture
def page(chromium: Browser, path: Path) -> Iterator[Page]:
    """The page, at a desk; a test fails where the page logs an error."""
    errors: list[str] = []
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(5000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(path.as_uri())
    yield page
    page.close()
    assert not errors


def changes(page: Page) -> list[float]:
    texts = page.locator("#cards .scores b").all_text_contents()
    return [float(text.replace("\u2212", "-")) for text in texts]


def style(page: Page, selector: str, name: str) -> str:
    return page.eval_on_selector(selector, f"it => getComputedStyle(it).{name}")


def test_the_cards_stand_side_by_side(page: Page) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    boxes = [page.locator("#cards .card").nth(number).bounding_box() for number in (0, 1)]
    assert boxes[0] and boxes[1] and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] < 700


def test_the_wall_is_sorted_and_filtered(page: Page) -> None:
    assert page.locator("#cards > li").count() == 24
    page.locator("#toolbar").get_by_text("Best", exact=True).click()
    assert changes(page) == sorted(changes(page)) and changes(page)[0] < 0  # lpips: lower is better
    page.locator("#toolbar").get_by_text("Worst").click()
    assert changes(page) == sorted(changes(page), reverse=True) and changes(page)[0] > 0
    page.locator("#toolbar").get_by_text("Most changed").click()
    assert [abs(it) for it in changes(page)] == sorted(map(abs, changes(page)), reverse=True)
    page.locator("#toolbar [name=metric]").select_option("clip")
    page.locator("#toolbar").get_by_text("Worst").click()
    assert changes(page)[0] == min(changes(page))
    page.locator("#more").click()
    assert page.locator("#cards > li").count() == 48
    page.locator("#toolbar [name=outcome]").select_option("lost")
    assert changes(page) and all(it <= 0 for it in changes(page))
    page.locator("#toolbar [name=outcome]").select_option("")
    page.get_by_placeholder("Filter by prompt").fill("ONERROR")
    assert page.locator("#cards .prompt").all_text_contents() == [HOSTILE[1]] * SEEDS
    expect(page.locator("#toolbar output")).to_have_text("2 pairs")
    page.get_by_placeholder("Filter by prompt").fill("no such prompt")
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_placeholder("Filter by prompt").fill("")
    page.locator("#toolbar [name=category]").select_option("animals")
    expect(page.locator("#toolbar output")).to_have_text(f"{10 * SEEDS} pairs")


def test_disagreement_comes_first(page: Page) -> None:
    page.locator("#toolbar").get_by_text("Disagreement").click()
    page.locator("#cards button").first.click()
    signs = [text[0] for text in page.locator("#zoom-scores b").all_text_contents()[:2]]
    assert signs in (["+", "+"], ["\u2212", "\u2212"])  # of clip, where more is better, and lpips, where less is


def test_a_model_switch_moves_the_whole_page(page: Page) -> None:
    expect(page.locator("h1:visible")).to_contain_text("with tuned, lpips")
    before = page.locator("#cards .scores").first.text_content()
    page.locator("#models").get_by_text("tuned@0.5").click()
    expect(page.locator("h1:visible")).to_contain_text("with tuned@0.5, lpips")
    assert page.locator("h1:visible").count() == 1
    assert page.locator("#toolbar [name=model]").input_value() == "1"
    assert page.locator("#cards .scores").first.text_content() != before
    assert page.locator("#cards li").first.locator("img:visible").evaluate_all("all => all.map(it => it.alt)") == [
        "baseline",
        "tuned@0.5",
    ]
    page.get_by_role("checkbox", name="all models").check()
    assert page.locator("#cards li").first.locator("img:visible").count() == 1 + len(MODELS)


def test_both_images_are_zoomed_and_moved_alike(page: Page) -> None:
    page.locator("#cards button").first.click()
    expect(page.locator("#zoom")).to_be_visible()
    page.get_by_text("Side by side").click()
    box = page.locator("#stage .frame").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    page.mouse.wheel(0, -600)
    left, right = (style(page, selector, "transform") for selector in ("#zoom-left", "#zoom-right"))
    assert left == right and left.startswith("matrix(2.4")
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4 - 30, box["y"] + box["height"] / 4 - 20)
    page.mouse.up()
    moved = style(page, "#zoom-left", "transform")
    assert moved == style(page, "#zoom-right", "transform") != left
    offsets = [[float(it) for it in text[7:-1].split(", ")[4:]] for text in (left, moved)]
    assert [b - a for a, b in zip(*offsets, strict=True)] == pytest.approx([-30, -20], abs=0.5)
    page.keyboard.press("0")
    assert style(page, "#zoom-left", "transform") == "matrix(1, 0, 0, 1, 0, 0)"
    page.keyboard.press("+")
    expect(page.locator("#factor")).to_have_text("1.5\u00d7")


def test_two_fingers_zoom_both_images(chromium: Browser, path: Path) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(path.as_uri())
    page.locator("#cards button").first.tap()
    page.get_by_text("Side by side").tap()
    box = page.locator("#stage .frame").first.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    device = context.new_cdp_session(page)

    def touch(kind: str, apart: float | None = None) -> None:
        points = [] if apart is None else [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 10)
    for apart in range(12, 32, 2):
        touch("touchMove", apart)
    touch("touchEnd")
    expect(page.locator("#factor")).to_have_text("3\u00d7")
    assert style(page, "#zoom-left", "transform") == style(page, "#zoom-right", "transform")
    context.close()


def test_the_slider_uncovers(page: Page) -> None:
    page.locator("#cards button").first.click()
    box = page.locator("#stage").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, box["y"] + 50)
    page.mouse.up()
    assert page.locator("#cut").input_value() == "20"
    assert style(page, "#stage .frame + .frame", "clipPath") == "inset(0px 0px 0px 20%)"


def test_a_link_leads_to_its_pair(page: Page, path: Path) -> None:
    _, _, gallery = make_comparison(models=MODELS)
    page.locator("#cards button").first.click()
    link = page.url
    assert "#p=" in link and "&m=tuned" in link
    page.keyboard.press("Escape")
    expect(page).to_have_url(path.as_uri())
    for seed in gallery.seeds[11]:
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}#p=12&s={seed}&m=tuned%400.5")
        expect(page.locator("#zoom")).to_be_visible()
        expect(page.locator("#zoom-prompt")).to_have_text(gallery.prompts[11])
        expect(page.locator("#zoom-facts")).to_contain_text(str(seed))
    expect(page.locator("#zoom-model")).to_have_text("tuned@0.5")
    page.get_by_role("button", name="Seed 1").click()
    assert f"s={gallery.seeds[11][0]}" in page.url
    page.goto("about:blank")
    page.goto(f"{path.as_uri()}#p=999&s=1&m=tuned")
    expect(page.locator("#told")).to_contain_text("not among the images")


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_the_table_is_copied_as_markdown(page: Page, has_clipboard: bool) -> None:
    if has_clipboard:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    else:
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        page.evaluate("document.addEventListener('copy', () => { window.copied = document.activeElement.value; })")
    page.get_by_role("button", name="Copy as Markdown").click()
    expect(page.locator("#told")).to_have_text("Table copied")
    text = page.evaluate("navigator.clipboard.readText()" if has_clipboard else "window.copied")
    assert text.startswith("| Metric | Role | baseline | tuned |") and "| held out |" in text


def test_keys_alone_are_enough(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the images"
    page.locator("#cards button").nth(1).focus()
    page.keyboard.press("Enter")
    first = page.locator("#zoom-prompt").text_content()
    expect(page.locator("#position")).to_have_text("2 / 60")
    page.keyboard.press("ArrowRight")
    assert page.locator("#cut").input_value() == "50.5"
    page.keyboard.press("j")
    expect(page.locator("#position")).to_have_text("3 / 60")
    page.keyboard.press("k")
    assert page.locator("#zoom-prompt").text_content() == first
    page.keyboard.press("-")
    expect(page.locator("#factor")).to_have_text("1\u00d7")
    page.keyboard.press("Escape")
    expect(page.locator("#zoom")).to_be_hidden()


def test_hostile_text_never_runs_and_breaks_nothing(page: Page) -> None:
    for text in HOSTILE:
        page.get_by_placeholder("Filter by prompt").fill(text[:40])
        if page.locator("#cards button").count():
            page.locator("#cards button").first.click()
            page.keyboard.press("Escape")
    page.get_by_placeholder("Filter by prompt").fill("long long")
    page.locator("#cards button").first.click()
    assert len(page.locator("#zoom-prompt").text_content() or "") < 1000
    page.get_by_role("button", name="Show all").click()
    assert page.locator("#zoom-prompt").text_content() == HOSTILE[5]
    assert (page.locator("#zoom-prompt").bounding_box() or {})["height"] < 200
    for width in (390, 1440):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.dataset.ran") is None


def test_the_policy_lets_no_other_script_run(chromium: Browser, path: Path) -> None:
    page = chromium.new_page()
    page.goto(path.as_uri())
    evil = "document.documentElement.dataset.ran = 1"
    page.evaluate(
        f"""() => {{ document.body.insertAdjacentHTML("beforeend", '<img src="data:," onerror="{evil}">');
        document.body.append(Object.assign(document.createElement("script"), {{ textContent: "{evil}" }})); }}"""
    )
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.dataset.ran") is None
    page.close()


@pytest.mark.parametrize("embed", [True, False])
def test_it_is_complete_without_its_script(chromium: Browser, tmp_path: Path, embed: bool) -> None:
    path = html.write_report(tmp_path, *make_comparison(models=MODELS), embed=embed)
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator(".card img:visible").count() == (1 + len(MODELS)) * 30 * SEEDS
    assert page.locator("h1:visible").count() == len(MODELS)
    assert page.locator("#toolbar").is_hidden() and page.locator("#models").is_hidden()
    first = page.locator(".card img").first
    first.scroll_into_view_if_needed()
    expect(first).to_have_js_property("complete", True)
    assert page.locator(".whole bdi").count() == SEEDS
    context.close()


def test_images_beside_the_page_are_shown(chromium: Browser, tmp_path: Path) -> None:
    path = html.write_report(tmp_path, *make_comparison(), embed=False)
    page = chromium.new_page()
    page.goto(path.as_uri())
    page.locator("#cards button").first.click()
    page.wait_for_function("document.getElementById('zoom-right').naturalWidth > 0")
    assert page.locator("#cards > li").count() == 24
    page.close()
