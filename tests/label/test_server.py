"""The server of `label`: who is let in, what is refused, and that nothing but opaque names leaves it."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from diffusion_dpo.data.votes import read_lines
from diffusion_dpo.label.items import make_items
from diffusion_dpo.label.log import Log, SharedLog
from diffusion_dpo.label.results import Results, results_of
from diffusion_dpo.label.server import make_app
from diffusion_dpo.label.study import Study
from tests.browser import HOSTILE
from tests.label.studies import TOKEN, make_config

HOST = "127.0.0.1:8321"
ORIGIN = {"Origin": f"http://{HOST}"}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    config = make_config(tmp_path, prompts=[*(text.replace("\ud800", "") for text in HOSTILE[:5]), "plain", "b"])
    config.output_dir.mkdir()
    return Study(config, make_items(config, config.output_dir), Log(config.output_dir / "votes.jsonl"))


@pytest.fixture
def stranger(study: Study) -> Iterator[TestClient]:
    app = make_app(study, study.config.output_dir, token=TOKEN, hosts=frozenset([HOST]))
    with TestClient(app, base_url=f"http://{HOST}", follow_redirects=False) as client:
        yield client


@pytest.fixture
def rater(stranger: TestClient) -> TestClient:
    assert stranger.get(f"/?token={TOKEN}").status_code == 200
    assert stranger.post("/name", json={"name": "Ann-Marie B."}, headers=ORIGIN).status_code == 200
    stranger.headers["X-Rater"] = "Ann-Marie%20B."
    return stranger


def vote(client: TestClient, task: str, answer: str = "left", headers: Any = ORIGIN, **more: Any) -> Any:
    body = {"task": task, "answer": answer, "key": f"key-of-{task}", "seconds": 1.5} | more
    return client.post("/vote", json=body, headers=headers)


@pytest.mark.parametrize("path", ["/", "/next", "/results", "/static/label.js", f"/image/{'0' * 32}"])
def test_nothing_is_served_without_the_token(stranger: TestClient, path: str) -> None:
    for query in ("", "?token=", "?token=wrong", f"?token={TOKEN[:-1]}"):
        answer = stranger.get(path + query)
        assert answer.status_code == 403 and "with its token" in answer.json()["error"]
    stranger.cookies.set("token-8321", "wrong")
    assert stranger.get(path).status_code == 403


@pytest.mark.parametrize(("address", "status"), [("/", 403), ("/?token=wrong", 403), (f"/no-page?token={TOKEN}", 404)])
def test_a_browser_is_shown_a_page_that_says_why_it_gets_nothing(
    stranger: TestClient, address: str, status: int
) -> None:
    answer = stranger.get(address, headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert answer.status_code == status and answer.headers["content-type"].startswith("text/html")
    says = "There is no such page here" if status == 404 else "Open the address that `diffusion-dpo label` has printed"
    assert f"<p>{says}" in answer.text and "/static" not in answer.text


def test_the_token_becomes_a_cookie_that_scripts_and_other_sites_do_not_have(stranger: TestClient) -> None:
    answer = stranger.get(f"/?token={TOKEN}")
    assert 'content="0; url=/"' in answer.text and TOKEN not in answer.text
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert stranger.get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1:1", "127.0.0.1:8321.evil.example", ""])
def test_another_host_is_refused(rater: TestClient, host: str) -> None:
    assert rater.get("/next", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"http://{HOST}.evil.example", None])
def test_another_origin_cannot_vote(rater: TestClient, study: Study, origin: str | None) -> None:
    task = rater.get("/next").json()["tasks"][0]["task"]
    headers = {} if origin is None else {"Origin": origin}
    chosen = {"task": task, "answer": "left", "key": "k" * 8}
    for path, body in (("/vote", chosen), ("/undo", {"key": "u" * 8}), ("/name", {})):
        assert rater.post(path, json=body, headers=headers).status_code == 403
    assert not study.counts()


def test_every_answer_forbids_scripts_and_sources_that_are_not_ours(rater: TestClient) -> None:
    for path in ("/", "/results", "/next", "/nowhere", "/static/label.js"):
        policy = rater.get(path).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert rater.get(path).headers["x-content-type-options"] == "nosniff"


def test_a_question_says_nothing_but_the_prompt_and_two_opaque_names(rater: TestClient, study: Study) -> None:
    answer = rater.get("/next")
    for task in answer.json()["tasks"]:
        assert set(task) == {"task", "prompt", "images"} and len(task["images"]) == 2
    secrets = [text for item in study.items.values() for text in (item.first_uid, item.second_uid, item.id)]
    page = rater.get("/").text + answer.text
    assert not [secret for secret in secrets if secret in page]
    image = rater.get(f"/image/{answer.json()['tasks'][0]['images'][0]}")
    assert image.status_code == 200 and image.content.startswith(b"\x89PNG")
    assert not set(image.headers) & {"content-disposition", "etag", "last-modified"}


@pytest.mark.parametrize(
    "name", ["../votes", "..%2Fvotes.jsonl", "%2e%2e/items", "0" * 31, "z" * 32, "0" * 32, "0" * 32 + ".png"]
)
def test_images_go_by_their_names_alone(rater: TestClient, name: str) -> None:
    answer = rater.get(f"/image/{name}")
    assert answer.status_code == 404 and "error" in answer.json()


@pytest.mark.parametrize("name", ["label.py", "server.py", "..%2F__init__.py", "results.html.j2"])
def test_of_the_package_only_the_page_is_served(rater: TestClient, name: str) -> None:
    assert rater.get(f"/static/{name}").status_code == 404


def test_a_vote_is_acknowledged_once_it_is_in_the_log(rater: TestClient, study: Study) -> None:
    task = rater.get("/next").json()["tasks"][0]["task"]
    answer = vote(rater, task, "tie")
    assert answer.status_code == 200 and answer.json()["done"] == 1
    (event,) = read_lines(study.config.output_dir / "votes.jsonl")
    assert (event["rater"], event["answer"], event["choice"]) == ("Ann-Marie B.", "tie", "tie")
    assert vote(rater, task, "tie").json()["done"] == 1  # sent again, since the answer was lost
    assert len(read_lines(study.config.output_dir / "votes.jsonl")) == 1
    for _ in range(2):  # sent again, too
        undone = rater.post("/undo", json={"key": "undo-000"}, headers=ORIGIN).json()
        assert undone["undone"]["task"] == task and undone["done"] == 0
    assert rater.post("/undo", json={"key": "undo-001"}, headers=ORIGIN).status_code == 404
    assert rater.post("/undo", json={}, headers=ORIGIN).status_code == 400


@pytest.mark.parametrize(
    "body,status,message",
    [
        ({"task": "unknown"}, 404, "no such pair"),
        ({"answer": "first"}, 400, "left, right"),
        ({"answer": "skip"}, 400, "skip with"),
        ({"answer": "skip", "reason": "<b>"}, 400, "skip with"),
        ({"key": "short"}, 400, "key"),
        ({"key": 3}, 400, "key"),
        ({"seconds": -1}, 400, "seconds"),
        ({"seconds": "soon"}, 400, "seconds"),
        ({"reason": "x" * 5000}, 413, "bytes"),
    ],
)
def test_a_vote_that_is_none_is_refused_in_words(
    rater: TestClient, study: Study, body: dict[str, Any], status: int, message: str
) -> None:
    task = rater.get("/next").json()["tasks"][0]["task"]
    answer = vote(rater, **{"task": task, **body})
    assert answer.status_code == status and message in answer.json()["error"]
    assert not study.counts()


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"nonsense"])
def test_a_body_that_is_no_object_is_refused(rater: TestClient, data: bytes) -> None:
    assert rater.post("/vote", content=data, headers=ORIGIN).status_code == 400


@pytest.mark.parametrize("name", ["", "   ", "<script>", "x" * 41, 3, None, "a\nb"])
def test_a_name_is_a_name(stranger: TestClient, name: Any) -> None:
    stranger.get(f"/?token={TOKEN}")
    assert stranger.post("/name", json={"name": name}, headers=ORIGIN).status_code == 400
    assert stranger.get("/next").status_code == 401


def test_a_full_disk_is_a_507_and_no_vote_is_lost_or_made_up(
    rater: TestClient, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = rater.get("/next").json()["tasks"][0]["task"]
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    answer = vote(rater, task)
    assert answer.status_code == 507 and "the disk is full" in answer.json()["error"]
    assert not read_lines(study.config.output_dir / "votes.jsonl")
    monkeypatch.setattr(os, "fsync", real)
    assert vote(rater, task).status_code == 200


def test_prompts_of_any_kind_come_as_data_and_never_as_markup(rater: TestClient) -> None:
    prompts = [task["prompt"] for task in rater.get("/next").json()["tasks"]]
    assert any("<script>" in prompt or "<img" in prompt or "{{" in prompt for prompt in prompts)
    assert json.loads(rater.get("/next").text)["total"] == 7
    for task in rater.get("/next").json()["tasks"]:
        vote(rater, task["task"])
    assert "<script>document" not in rater.get("/results").text


def test_results_show_who_voted(rater: TestClient) -> None:
    assert "Nobody has voted yet" in rater.get("/results").text
    vote(rater, rater.get("/next").json()["tasks"][0]["task"])
    page = rater.get("/results").text
    assert "1 vote on 7 pairs" in page and "Ann-Marie B." in page


def test_a_page_that_is_drawn_for_somebody_else_neither_votes_nor_takes_back(rater: TestClient, study: Study) -> None:
    """Which image is on the left depends on who looks: the vote of another tab would be for the other image."""
    first, second = (task["task"] for task in rater.get("/next").json()["tasks"][:2])
    assert vote(rater, first).status_code == 200
    assert rater.post("/name", json={"name": "Bob"}, headers=ORIGIN).status_code == 200  # in a second tab
    answers = [vote(rater, second), rater.post("/undo", json={"key": "undo-000"}, headers=ORIGIN), rater.get("/next")]
    assert [(it.status_code, "Bob's turn" in it.json()["error"]) for it in answers] == [(409, True)] * 3
    assert vote(rater, second, headers={**ORIGIN, "X-Rater": "Bob"}).status_code == 200
    assert [event["rater"] for event in study.standing()] == ["Ann-Marie B.", "Bob"]


def test_votes_go_on_while_the_results_are_worked_out_and_that_is_done_once_for_each_state(
    rater: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end, calls = threading.Event(), threading.Event(), []

    def slow(votes: Any, items: Any) -> Results:
        begun.set()
        assert may_end.wait(20)
        calls.append(len(votes))
        return results_of(votes, items)

    monkeypatch.setattr("diffusion_dpo.label.server.results_of", slow)
    pages: list[str] = []
    looking = [threading.Thread(target=lambda: pages.append(rater.get("/results").text)) for _ in range(2)]
    for thread in looking:
        thread.start()
    assert begun.wait(20)
    first, *_ = rater.get("/next").json()["tasks"]
    assert vote(rater, first["task"]).status_code == 200 and not pages
    may_end.set()
    for thread in looking:
        thread.join()
    assert all(" on 7 pairs" in page for page in pages)
    assert rater.get("/results").text == rater.get("/results").text
    assert calls == [0, 1]


def test_votes_that_wait_share_an_fsync_and_none_is_acknowledged_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real, may_sync = os.fsync, threading.Event()

    def fsync(handle: int) -> None:
        assert may_sync.wait(20)
        real(handle)
        synced.append(len(path.read_bytes().splitlines()))

    path = tmp_path / "votes.jsonl"

    async def write(log: Log) -> list[int]:
        shared = SharedLog(log, taken.append)
        waiting = [asyncio.create_task(shared.append({"n": n})) for n in range(9)]
        await asyncio.sleep(0.05)
        assert not taken and not any(task.done() for task in waiting)
        may_sync.set()
        await asyncio.gather(*waiting)
        return [event["n"] for event in taken]

    taken: list[dict[str, int]] = []
    with Log(path) as log:
        monkeypatch.setattr(os, "fsync", fsync)
        assert asyncio.run(write(log)) == [event["n"] for event in read_lines(path)] == list(range(9))
    assert len(synced) <= 2 and synced[-1] == 9


def test_a_full_disk_refuses_all_votes_that_waited_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def write(log: Log) -> list[Any]:
        shared = SharedLog(log, taken.append)
        await shared.append({"n": 0})
        monkeypatch.setattr(os, "fsync", full)
        refused = await asyncio.gather(*(shared.append({"n": n}) for n in range(1, 5)), return_exceptions=True)
        monkeypatch.setattr(os, "fsync", real)
        await shared.append({"n": 5})
        return refused

    taken: list[dict[str, int]] = []
    with Log(tmp_path / "votes.jsonl") as log:
        refused = asyncio.run(write(log))
    assert [getattr(error, "errno", None) for error in refused] == [errno.ENOSPC] * 4
    assert taken == read_lines(tmp_path / "votes.jsonl") == [{"n": 0}, {"n": 5}]
