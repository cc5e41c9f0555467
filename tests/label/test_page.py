"""The page of `label` in a real browser: keys, undo, reasons, two tabs, a dying server, prompts that try to run."""

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from diffusion_dpo.config import dump
from diffusion_dpo.data.votes import read_lines, read_votes
from diffusion_dpo.label.connections import make_server
from diffusion_dpo.label.items import make_items
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.server import make_app
from diffusion_dpo.label.study import Study
from tests.browser import HOSTILE
from tests.label.studies import TOKEN, make_config

pytestmark = pytest.mark.browser
THERE = "['left', 'right'].every((side) => document.getElementById(side).complete)"


@contextmanager
def served(root: Path, *overrides: str, prompts: list[str] | None = None) -> Iterator[tuple[str, Study]]:
    """A study at an address of its own, in a thread of this process."""
    config = make_config(root, *overrides, prompts=prompts or ())
    config.output_dir.mkdir(exist_ok=True)
    listener = socket.create_server(("127.0.0.1", 0))
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    with Log(config.output_dir / "votes.jsonl") as log:
        study = Study(config, make_items(config, config.output_dir), log)
        app = make_app(study, config.output_dir, token=TOKEN, hosts=frozenset([host]))
        server = make_server(app)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://{host}", study
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Open a study's page as a rater; everything is closed in the end, and nothing may have gone wrong on the page."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def open_page(address: str, name: str = "ann", **options: Any) -> Page:
        contexts.append(chromium.new_context(reduced_motion="reduce", **options))
        contexts[-1].set_default_timeout(5000)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/?token={TOKEN}")
        page.wait_for_url(f"{address}/")
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector("#pair:not([hidden])")
        until(page, THERE)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def until(page: Page, condition: str) -> None:
    """Wait for a condition; playwright's own way of it needs eval, which the page's policy forbids."""
    for _ in range(500):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(10)
    raise AssertionError(f"never came true: {condition}; the page says {page.inner_text('body')!r}")


def settled(page: Page, done: int) -> None:
    """Wait until the page says how many are done and none is on its way."""
    until(page, f"document.getElementById('progress').value.startsWith('{done} of ')")
    until(page, "!Object.values(localStorage).some((text) => text.includes('task'))")


def log_of(study: Study) -> list[dict[str, Any]]:
    return read_lines(study.config.output_dir / "votes.jsonl")


def test_keys_vote_skip_with_a_reason_and_undo(tmp_path: Path, visit: Callable[..., Page]) -> None:
    with served(tmp_path) as (address, study):
        page = visit(address)
        for number, key in enumerate(["1", "2", "0", "b", "ArrowLeft"], start=1):
            page.keyboard.press(key)
            settled(page, number)
        page.keyboard.press("s")
        page.keyboard.press("1")  # within the dialog a reason, not the left image
        settled(page, 6)
        page.keyboard.press("u")
        settled(page, 5)
        page.keyboard.press("?")
        page.keyboard.press("2")  # help is open: no vote
        page.keyboard.press("?")
        page.keyboard.press(" ")
        assert page.locator("#zoom").is_visible()
        page.keyboard.press(" ")
        assert not page.locator("#zoom").is_visible()
        page.keyboard.press("Control+1")
        settled(page, 5)
        answers = [event["answer"] for event in log_of(study) if event["event"] == "vote"]
        assert answers == ["left", "right", "tie", "both_bad", "left", "skip"]
        assert log_of(study)[5]["reason"] == "corrupt" and log_of(study)[6]["event"] == "undo"


def test_the_vote_is_for_the_image_that_was_seen_and_a_double_click_is_one_vote(
    tmp_path: Path, visit: Callable[..., Page]
) -> None:
    with served(tmp_path) as (address, study):
        page = visit(address, has_touch=True)
        seen = {}
        for number in range(1, 7):
            names = [str(page.get_attribute(f"#{side}", "src")).rpartition("/")[2] for side in ("left", "right")]
            seen[str(page.text_content("#prompt"))] = names[number % 2]
            button = page.locator("#pair button").nth(number % 2)
            button.tap() if number > 4 else button.dblclick()
            settled(page, number)
            page.wait_for_timeout(600 if number > 4 else 0)  # two taps are a double tap, too
        assert len(log_of(study)) == 6
        by_uid = {
            uid: name
            for item in study.items.values()
            for uid, name in ((item.first_uid, item.first_image), (item.second_uid, item.second_image))
        }
        for vote in read_votes(study.config.output_dir):
            assert by_uid[vote.first_uid if vote.choice == "first" else vote.second_uid] == seen[vote.prompt]


def test_two_tabs_and_the_way_back_lose_no_vote_and_cast_none_twice(
    tmp_path: Path, visit: Callable[..., Page]
) -> None:
    with served(tmp_path) as (address, study):
        first = visit(address)
        second = first.context.new_page()
        second.goto(address)
        second.wait_for_selector("#pair:not([hidden])")
        for number in range(1, 4):
            first.keyboard.press("1")
            settled(first, number)
        second.keyboard.press("2")  # on a pair that the other tab has answered
        until(second, "document.getElementById('problem').textContent.includes('has your vote already')")
        answered = json.dumps([study.items[event["item"]].prompt for event in log_of(study)])
        until(second, f"!{answered}.includes(document.getElementById('prompt').textContent)")
        for number in (4, 5):
            until(second, THERE)
            second.keyboard.press("2")
            settled(second, number)
        second.goto(f"{address}/results")
        second.go_back()
        settled(second, 5)
        assert len(log_of(study)) == 5 and len({event["item"] for event in log_of(study)}) == 5


def test_a_vote_waits_for_the_image_to_be_there(tmp_path: Path, visit: Callable[..., Page]) -> None:
    with served(tmp_path) as (address, study):
        page = visit(address)
        held: list[Any] = []
        holding = [True]
        page.route("**/image/*", lambda route: held.append(route) if holding else route.continue_())
        for _ in range(4):
            page.keyboard.press("1")  # the first shows a pair that does not come
            page.wait_for_timeout(60)
        assert page.locator("#left").is_hidden() and len(log_of(study)) == 1
        holding.clear()
        for route in held:
            route.continue_()
        until(page, THERE)
        page.keyboard.press("1")
        settled(page, 2)


def test_a_link_from_another_site_opens_the_page(tmp_path: Path, chromium: Browser) -> None:
    """A mail or a chat in a browser: cookies of SameSite=Strict do not go along with what another site has started."""
    with served(tmp_path) as (address, _):
        link = f'<a href="{address}/?token={TOKEN}">vote</a>'.encode()

        class Chat(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(link)

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        with HTTPServer(("127.0.0.1", 0), Chat) as chat:
            threading.Thread(target=chat.serve_forever, daemon=True).start()
            page = chromium.new_page()
            page.set_default_timeout(5000)
            page.goto(f"http://localhost:{chat.server_port}/")
            page.click("a")
            page.wait_for_selector("#name")
            assert page.url == f"{address}/"
            page.close()
            chat.shutdown()


def test_prompts_are_text_whatever_they_try(tmp_path: Path, visit: Callable[..., Page]) -> None:
    prompts = [text.replace("\ud800", "") for text in HOSTILE]
    with served(tmp_path, prompts=prompts) as (address, study):
        page = visit(address, viewport={"width": 390, "height": 844})
        for number in range(1, len(prompts) + 1):
            assert page.evaluate("document.documentElement.dataset.ran") is None
            assert page.evaluate("document.getElementById('prompt').childElementCount") == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            box = page.locator("#left").bounding_box()
            assert box is not None and box["height"] > 150  # the longest prompt leaves room for the images
            page.keyboard.press("1")
            settled(page, number)
        page.wait_for_selector("#done:not([hidden])")
        page.goto(f"{address}/results")
        assert page.evaluate("document.documentElement.dataset.ran") is None
        assert len(log_of(study)) == len(prompts)


def test_a_page_outlives_its_server_and_brings_what_it_kept(tmp_path: Path, visit: Callable[..., Page]) -> None:
    """Killed with -9, and back with another token: until the new address is opened the votes are kept, and said so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = make_config(tmp_path, f"port={port}")
    path = tmp_path / "label.yaml"

    def start(token: str) -> subprocess.Popen[str]:
        path.write_text(dump(config.model_copy(update={"token": token})))
        command = [sys.executable, "-m", "diffusion_dpo", "label", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert any(re.match("open: ", line) for line in process.stdout)
        return process

    server = start(TOKEN)
    try:
        page = visit(f"http://127.0.0.1:{port}")
        page.keyboard.press("1")
        settled(page, 1)
        server.kill()
        server.wait()
        page.keyboard.press("2")
        page.keyboard.press("0")
        until(page, "document.getElementById('problem').textContent.includes('does not answer')")
        assert "2 being saved" in str(page.text_content("#progress"))
        server = start("another-token-of-the-tests")
        until(page, "document.getElementById('problem').textContent.includes('token')")
        assert len(read_votes(config.output_dir)) == 1
        other = page.context.new_page()
        other.goto(f"http://127.0.0.1:{port}/?token=another-token-of-the-tests")
        other.wait_for_selector("#pair:not([hidden])")
        settled(page, 3)
        until(page, "document.getElementById('problem').hidden")
        left = {event["key"]: event["answer"] for event in read_lines(config.output_dir / "votes.jsonl")}
        assert list(left.values()) == ["left", "right", "tie"]
    finally:
        server.kill()
        server.wait()


def test_another_person_at_the_same_browser_does_not_vote_in_the_name_of_the_first(
    tmp_path: Path, visit: Callable[..., Page]
) -> None:
    with served(tmp_path) as (address, study):
        page = visit(address)
        page.route("**/vote", lambda route: route.abort())
        page.keyboard.press("1")
        until(page, "document.getElementById('problem').textContent.includes('does not answer')")
        page.unroute("**/vote")
        page.evaluate("window.stop()")
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(f"{address}/name")
        page.fill("#name", "bob")
        page.keyboard.press("Enter")
        page.wait_for_url(f"{address}/")
        page.wait_for_timeout(300)
        assert {event["rater"] for event in log_of(study)} <= {"ann"}


def test_a_tab_whose_person_has_left_keeps_the_vote_until_they_are_back(
    tmp_path: Path, visit: Callable[..., Page]
) -> None:
    """Also where one name begins with the other."""
    with served(tmp_path) as (address, study):
        page = visit(address)
        other = page.context.new_page()
        for name in ("ann b", "ann"):
            other.goto(f"{address}/name")
            other.fill("#name", name)
            other.keyboard.press("Enter")
            other.wait_for_selector("#pair:not([hidden])")
            if name == "ann b":
                page.keyboard.press("1")
                until(page, "document.getElementById('problem').textContent.includes(\"ann b's turn\")")
                assert not log_of(study)
        settled(page, 1)
        (event,) = log_of(study)
        assert (event["rater"], event["answer"]) == ("ann", "left")


def test_keys_work_without_a_secure_context(tmp_path: Path, visit: Callable[..., Page]) -> None:
    """What a rater on another machine has: over plain HTTP a browser takes some functions away."""
    with served(tmp_path) as (address, study):
        page = visit(address)
        page.evaluate("delete Crypto.prototype.randomUUID")
        page.keyboard.press("1")
        settled(page, 1)
        assert [event["answer"] for event in log_of(study)] == ["left"]


def test_the_next_pair_is_there_within_a_tenth_of_a_second(tmp_path: Path, visit: Callable[..., Page]) -> None:
    """From the key to both images painted, over 100 votes."""
    with served(tmp_path, prompts=[f"prompt {i}" for i in range(110)]) as (address, study):
        page = visit(address, viewport={"width": 1440, "height": 900})
        times = page.evaluate(_TIMED, 105)
        settled(page, 105)
        assert len(log_of(study)) == 105
        ordered = sorted(times)
        print(f"key to image: median {ordered[52]:.0f} ms, p95 {ordered[99]:.0f} ms, worst {ordered[-1]:.0f} ms")
        assert ordered[52] < 100  # the median here, since other tests run beside this one; -s shows the rest


_TIMED = """async (amount) => {
  const times = [];
  const images = ["left", "right"].map((id) => document.getElementById(id));
  const isLate = () => images.some((image) => !image.complete);
  for (let number = 0; number < amount; number += 1) {
    const before = images[0].src;
    const start = performance.now();
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key: number % 2 ? "1" : "2", bubbles: true }));
    const end = start + 2000;
    while (performance.now() < end && (images[0].src === before || isLate())) await new Promise(requestAnimationFrame);
    await Promise.all(images.map((image) => image.decode()));
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - start);
    await new Promise((resolve) => setTimeout(resolve, 30));
  }
  return times;
}"""
