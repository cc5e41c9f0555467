"""A vision-language judge: only what it says in both orders counts, and nothing is asked twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, read_rows, write_shard
from diffusion_dpo.scorers import ScoreRequest, Scores, remote
from diffusion_dpo.scorers.judge import Judge, judge
from diffusion_dpo.scorers.vlm_judge import VlmJudge
from tests.scorers.servers import Reply, Served, chat, decode, light, serve

ROOT = Path(__file__).parents[2]
GRAYS = (10, 60, 110, 160, 210)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.01)


def _group(grays: Sequence[int] = GRAYS, prompt: str = "a wall") -> list[ScoreRequest]:
    """The images of one prompt, each with the others as its rivals."""
    images = [Image.new("RGB", (32, 32), (gray,) * 3) for gray in grays]
    return [ScoreRequest(image, prompt, (), tuple(images[:i] + images[i + 1 :])) for i, image in enumerate(images)]


def _scorer(served: Served, folder: Path, **settings: Any) -> VlmJudge:
    scorer = VlmJudge(type="judge", url=served.url, model="m", log_path=folder / "log.jsonl", **settings)
    scorer.load(torch.device("cpu"))
    return scorer


def _scores(served: Served, folder: Path, requests: Sequence[ScoreRequest] = (), **settings: Any) -> Scores:
    return judge(_scorer(served, folder, **settings), requests or _group(), batch_size=64)


def _verdict(prefers: Callable[[float, float], str]) -> Served:
    """An endpoint that compares how light A and B are."""
    return chat(lambda images: json.dumps({"verdict": prefers(light(images[0]), light(images[1]))}))


def _lighter() -> Served:
    return _verdict(lambda a, b: "A" if a > b else "B")


def test_the_share_of_won_comparisons(tmp_path: Path) -> None:
    served = _lighter()
    scores = _scores(served, tmp_path)
    assert scores.values["judge_win_rate"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert scores.values["judge_comparisons"].tolist() == [4] * 5
    assert scores.values["judge_consistency"].tolist() == [1] * 5
    assert set(scores.reasons) == {""}
    shown = Counter(_shown(body) for _, _, body in served.asked)
    assert len(shown) == 5 * 4 and set(shown.values()) == {1}, "every pair in both orders, once"
    assert {path for path, _, _ in served.asked} == {"/chat/completions"}


def _shown(body: Any) -> tuple[float, ...]:
    (message,) = body["messages"]
    return tuple(light(decode(p["image_url"]["url"])) for p in message["content"] if p["type"] == "image_url")


@pytest.mark.parametrize("place", ["A", "B"])
def test_a_model_that_prefers_a_place_says_nothing(tmp_path: Path, place: str) -> None:
    scores = _scores(_verdict(lambda a, b: place), tmp_path)
    assert np.isnan(scores.values["judge_win_rate"]).all()
    assert scores.values["judge_consistency"].tolist() == [0] * 5
    assert set(scores.reasons) == {"no consistent verdict: 4 inconsistent"}


def test_ties_are_half_and_only_consistent_ones(tmp_path: Path) -> None:
    scores = _scores(_verdict(lambda a, b: "tie"), tmp_path / "all")
    assert scores.values["judge_win_rate"].tolist() == [0.5] * 5
    scores = _scores(_verdict(lambda a, b: "tie" if a > b else "A"), tmp_path / "half")
    assert np.isnan(scores.values["judge_win_rate"]).all()
    dark = _verdict(lambda a, b: "tie" if max(a, b) < 0.3 else "A" if a > b else "B")
    assert _scores(dark, tmp_path / "dark").values["judge_win_rate"].tolist() == [1 / 8, 1 / 8, 0.5, 0.75, 1]


def test_prose_garbage_and_refusals_are_missing(tmp_path: Path) -> None:
    for i, text in enumerate(("Image A is better", "", "I cannot help with that")):
        scores = _scores(chat(lambda images, text=text: text), tmp_path / str(i))
        assert np.isnan(scores.values["judge_win_rate"]).all()
        assert set(scores.reasons) == {"no consistent verdict: 4 unparseable"}
    refusal = serve(lambda body: Reply({"choices": [{"message": {"content": None, "refusal": "No."}}]}))
    assert np.isnan(_scores(refusal, tmp_path / "refusal").values["judge_win_rate"]).all()
    filtered = serve(lambda body: Reply({"error": {"code": "content_filter"}}, 400))
    assert np.isnan(_scores(filtered, tmp_path / "filtered").values["judge_win_rate"]).all()
    assert len(filtered.asked) == 20


def test_points_are_missing_where_they_cannot_be_read(tmp_path: Path) -> None:
    served = chat(lambda images: '{"points": 4}' if light(images[0]) > 0.3 else "A fine\nimage: 9/10")
    scores = _scores(served, tmp_path, mode="pointwise")
    np.testing.assert_array_equal(scores.values["judge_points"], [np.nan, np.nan, 4, 4, 4])
    assert scores.reasons[:3] == ("unparseable: A fine image: 9/10",) * 2 + ("",)


@pytest.mark.parametrize(
    "content", [{"error": "x"}, [], {"choices": []}, {"choices": [{"message": {"content": [1]}}]}]
)
def test_what_is_no_chat_completion(tmp_path: Path, content: Any) -> None:
    served = serve(lambda body: Reply(content))
    with pytest.raises(ConfigError, match="does not answer as /chat/completions"):
        _scores(served, tmp_path, num_parallel=1)
    assert len(served.asked) == 1
    assert not (tmp_path / "log.jsonl").read_bytes()


def test_values_depend_on_neither_batch_order_nor_threads(tmp_path: Path) -> None:
    served = _verdict(lambda a, b: "A" if a > b or a + b > 1.3 else "B")  # contradicts itself on light images
    requests = [*_group(), *_group((40, 80, 200, 250), "a door")]
    whole = _scores(served, tmp_path / "whole", requests)
    assert 0 < whole.values["judge_consistency"].min() < 1
    alone = [_scores(served, tmp_path / str(i), [one], num_parallel=1) for i, one in enumerate(requests)]
    backwards = _scores(served, tmp_path / "backwards", requests[::-1], num_parallel=16)
    for name, values in whole.values.items():
        np.testing.assert_array_equal(values, [one.values[name][0] for one in alone])
        np.testing.assert_array_equal(values, backwards.values[name][::-1])


def test_the_only_image_and_its_copy_have_no_rival(tmp_path: Path) -> None:
    (lonely,) = _group([9])
    served = _lighter()
    scores = _scores(served, tmp_path, [lonely, replace(lonely, rivals=(lonely.image.copy(),))])
    assert np.isnan(scores.values["judge_win_rate"]).all() and not served.asked
    assert set(scores.reasons) == {"its prompt has no other image"}


def test_a_limit_saves_requests(tmp_path: Path) -> None:
    served = _lighter()
    scores = _scores(served, tmp_path, max_rivals=2)
    assert scores.values["judge_comparisons"].tolist() == [2] * 5
    assert len(served.asked) == 5 * 2


def test_references_and_question_are_shown_when_asked_for(tmp_path: Path) -> None:
    served = _verdict(lambda a, b: "A")
    prompt = 'a {wall}: "B" \ud800'
    requests = [replace(one, references=(Image.new("RGB", (32, 32), "red"),)) for one in _group((50, 90), prompt)]
    _scores(served, tmp_path, requests, question="which is darker")
    assert {len(_shown(body)) for _, _, body in served.asked} == {2}
    text = served.asked[0][2]["messages"][0]["content"][0]["text"]
    assert json.dumps(prompt, ensure_ascii=False) in text and "which is darker" in text
    served.asked.clear()
    _scores(served, tmp_path, requests, question="which is darker", include_references=True)
    assert [_shown(body)[0] for _, _, body in served.asked] == pytest.approx([1 / 3] * 2)
    assert len(served.asked) == 2, "what was shown without references does not stand for this"
    others = [replace(one, references=(Image.new("RGB", (32, 32), "blue"),)) for one in requests]
    _scores(served, tmp_path, others, question="which is darker", include_references=True)
    assert len(served.asked) == 4, "nor what was shown with other references"


def test_what_decides_the_values_is_in_the_fingerprint(tmp_path: Path) -> None:
    served = _lighter()
    first = _scorer(served, tmp_path).fingerprint()
    assert first == _scorer(_lighter(), tmp_path / "b", num_parallel=1, name="x", max_retries=1).fingerprint()
    for settings in ({"mode": "pointwise"}, {"question": "?"}, {"include_references": True}, {"max_rivals": 2}):
        assert _scorer(served, tmp_path, **settings).fingerprint() != first


# --- the log ---------------------------------------------------------------------------------------------------------


def test_what_was_asked_is_not_asked_again(tmp_path: Path) -> None:
    served = _lighter()
    first = _scores(served, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    entries = [json.loads(line) for line in before.splitlines()]
    assert len(entries) == 20 and {entry["parsed"] for entry in entries} == {"A", "B"}
    assert all(entry["model"] == "m" and json.loads(entry["raw"])["verdict"] == entry["parsed"] for entry in entries)
    served.asked.clear()
    again = _scores(served, tmp_path)
    assert not served.asked and (tmp_path / "log.jsonl").read_bytes() == before
    np.testing.assert_array_equal(first.values["judge_win_rate"], again.values["judge_win_rate"])
    _scores(served, tmp_path, question="another")
    assert len(served.asked) == 20
    served.asked.clear()
    _scores(served, tmp_path, _group(prompt="the same images for another prompt"))
    assert len(served.asked) == 20


def test_a_torn_line_is_asked_again_and_hurts_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = _lighter()
    first = _scores(served, tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    served.asked.clear()
    again = _scores(served, tmp_path)
    assert len(served.asked) == 1 and "1 line of" in capsys.readouterr().out
    np.testing.assert_array_equal(first.values["judge_win_rate"], again.values["judge_win_rate"])
    served.asked.clear()
    _scores(served, tmp_path)
    assert not served.asked


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ConfigError, match="cannot use log_path"):
        _scorer(_lighter(), tmp_path)


def test_a_failure_in_the_middle_keeps_what_was_answered(tmp_path: Path) -> None:
    served = serve(lambda body: Reply(b"", 503) if len(served.asked) > 7 else _say_a())
    with pytest.raises(ConfigError, match="gave no answer after 1 try: 503"):
        _scores(served, tmp_path, num_parallel=1, max_retries=0)
    assert len(served.asked) == 8 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 7
    healthy = _lighter()
    _scores(healthy, tmp_path)
    assert len(healthy.asked) == 13


def test_one_refusal_ends_the_asking_of_all_threads(tmp_path: Path) -> None:
    def answer(body: Any) -> Reply:
        if len(served.asked) == 1:
            return Reply(b"no", 401)
        time.sleep(0.2)
        return _say_a()

    served = serve(answer)
    with pytest.raises(ConfigError, match="401"):
        _scores(served, tmp_path, num_parallel=4)
    assert len(served.asked) <= 8, "of 20"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(served.asked) - 1, "others may end"


def _slow(released: threading.Event) -> Served:
    """An endpoint that answers one request and then keeps all others waiting, for a minute at most."""

    def answer(body: Any) -> Reply:
        if len(served.asked) > 1:
            released.wait(60)
        return _say_a()

    served = serve(answer)
    return served


def test_a_deadline_waits_for_no_answer_and_no_retry(tmp_path: Path) -> None:
    released = threading.Event()
    served, busy = _slow(released), serve(lambda body: Reply(b"", 503, {"Retry-After": "60"}))
    began = time.monotonic()
    for endpoint in (served, busy):
        worker = Judge(_scorer(endpoint, tmp_path), batch_size=64, timeout_seconds=0.5)
        with pytest.raises(ConfigError, match=r"no answer on 5 images within batch_timeout_seconds=0\.5"):
            worker.score(_group())
    assert time.monotonic() - began < 10
    released.set()
    time.sleep(0.3)
    assert len(served.asked) <= 5 and len(busy.asked) <= 4, "four at a time, and nothing new"


def test_ctrl_c_waits_for_no_answer(candidates: Path) -> None:
    served = _slow(threading.Event())
    command = [sys.executable, "-m", "diffusion_dpo", *_arguments(candidates, served.url)]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while len(served.asked) < 5 and process.poll() is None:
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 10


def _say_a() -> Reply:
    return Reply({"choices": [{"message": {"content": '{"verdict": "A"}'}}]})


# --- through the verb ------------------------------------------------------------------------------------------------


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Two prompts with four images each, in two shards that cut through a prompt."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    grays = [20, 60, 100, 140, 30, 70, 110, 250]
    rows = [
        {
            "uid": f"{gray:032d}",
            "prompt_id": str(i // 4),
            "prompt": f"prompt {i // 4}",
            "index": i,
            "seed": i,
            "image": image_struct(encode_png(Image.new("RGB", (32, 32), (gray,) * 3))),
            "references": [],
            "origin": "",
            "settings_hash": "0",
        }
        for i, gray in enumerate(grays)
    ]
    write_shard(folder / "images-00000.parquet", rows[:3], CANDIDATES)
    write_shard(folder / "images-00001.parquet", rows[3:], CANDIDATES)
    return folder


def _arguments(candidates: Path, url: str, **settings: Any) -> list[str]:
    block = {"type": "judge", "url": url, "model": "m", "log_path": str(candidates.parent / "log.jsonl"), **settings}
    return ["score", f"path={candidates}", "device=cpu", "batch_size=2", f"scorers={json.dumps([block])}"]


def _rates(candidates: Path) -> list[float]:
    rows = read_rows(candidates, pattern="scores-judge_win_rate-*.parquet")
    return [row["value"] for row in rows if row["metric"] == "judge_win_rate"]


def test_killed_in_the_middle_nothing_is_asked_twice(candidates: Path) -> None:
    killed: list[int] = []

    def prefer(a: float, b: float) -> str:
        if len(served.asked) > 9 and not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
        return "A" if a > b else "B"

    served = _verdict(prefer)
    arguments = _arguments(candidates, served.url, num_parallel=1)
    process = subprocess.Popen(
        [sys.executable, "-m", "diffusion_dpo", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    assert process.wait(60) == -signal.SIGKILL
    assert len(served.asked) == 10
    assert main(arguments) == 0
    shown = Counter(_shown(body) for _, _, body in served.asked)
    assert len(shown) == 2 * 4 * 3
    assert shown.total() == len(shown) + 1, "the answer that the kill cut off is asked for again, no other"
    np.testing.assert_allclose(_rates(candidates), [0, 1 / 3, 2 / 3, 1] * 2)


def test_a_run_says_how_often_the_model_contradicted_itself(
    candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def prefer(a: float, b: float) -> str:
        dark, bright = sorted((a, b))
        return "A" if bright > 0.9 else "tie" if bright < 0.3 else "?" if dark < 0.1 else "A" if a > b else "B"

    assert main(_arguments(candidates, _verdict(prefer).url)) == 0
    out = capsys.readouterr().out
    assert out.count("pairs asked in both orders") == 1
    assert "m: of 12 pairs asked in both orders, 5 were decided, 2 ties, 3 inconsistent, 2 unparseable" in out
    assert main(_arguments(candidates, "http://127.0.0.1:9")) == 0, "all is known, and nobody is asked"
    assert "pairs asked" not in capsys.readouterr().out


def test_the_key_is_sent_and_written_nowhere(
    candidates: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    echo = '{"verdict": "tie", "reason": "sk-very-secret"}'
    served = chat(lambda images: echo)
    assert main(_arguments(candidates, served.url, api_key_env="JUDGE_KEY")) == 0
    assert {headers["Authorization"] for _, headers, _ in served.asked} == {"Bearer sk-very-secret"}
    files = [path for path in candidates.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".jsonl" for path in files) and any(path.suffix == ".json" for path in files)
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
    captured = capfd.readouterr()
    assert "sk-very-secret" not in captured.out + captured.err
