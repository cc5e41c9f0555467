"""Judges behind a server of one's own: what it says counts, nonsense and silence are one sentence."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.registry import resolve
from diffusion_dpo.scorers import ScoreRequest, Scores, remote
from diffusion_dpo.scorers.http import NO_VALUE, Http
from diffusion_dpo.scorers.judge import judge
from diffusion_dpo.settings import ScoreConfig
from tests.scorers.servers import Reply, Served, score_light, serve

ROOT = Path(__file__).parents[2]
REQUESTS = [ScoreRequest(Image.new("RGB", (32, 32), (51 * i,) * 3), f"prompt {i}") for i in range(4)]
LIGHT = [0.0, 0.2, 0.4, 0.6]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_SECONDS", 0.01)


def _scorer(url: str, **settings: Any) -> Http:
    settings = {"url": url, "version": "1", "gives": [{"name": "remote_light"}], "max_retries": 2, **settings}
    return Http(type="http", **settings)


def _scores(served: Served | str, **settings: Any) -> Scores:
    scorer = _scorer(served if isinstance(served, str) else served.url, **settings)
    scorer.load(torch.device("cpu"))
    return judge(scorer, REQUESTS, batch_size=4)


def _metrics(content: Any, **more: Any) -> Reply:
    return Reply({"metrics": {"remote_light": content}, **more})


def test_what_the_server_says_counts() -> None:
    served = serve(score_light)
    np.testing.assert_allclose(_scores(served).values["remote_light"], LIGHT)
    ((path, headers, body),) = served.asked
    assert body.keys() == {"images", "prompts"} and body["prompts"] == [f"prompt {i}" for i in range(4)]
    assert "Authorization" not in headers and path == "/"


def test_null_is_a_missing_value_with_a_reason() -> None:
    served = serve(lambda body: _metrics([0, None, 1e-3, None], reasons=["", "no face", "", None]))
    scores = _scores(served)
    np.testing.assert_array_equal(scores.values["remote_light"], [0, np.nan, 1e-3, np.nan])
    assert scores.reasons == ("", "no face", "", NO_VALUE)


@pytest.mark.parametrize(
    "reply, complaint",
    [
        (_metrics([1, 2, 3]), "remote_light has 3 values for 4 images"),
        (_metrics(["1", "2", "3", "4"]), 'a value of remote_light is "1"'),
        (_metrics([True] * 4), "is true, neither"),
        (_metrics(5), "must be a list, not 5"),
        (_metrics([[1]] * 4), r"is \[1\], neither"),
        (Reply(b'{"metrics": {"remote_light": [NaN, 1, 2, 3]}}'), "NaN is not JSON, use null"),
        (Reply(b'{"metrics": {"remote_light": [-Infinity, 1, 2, 3]}}'), "-Infinity is not JSON"),
        (Reply(b'{"metrics": {"remote_light": [1e999, 1, 2, 3]}}'), "neither a finite number"),
        (Reply({"metrics": {}}), r"has the metrics \[\], and `gives` names \['remote_light'\]"),
        (Reply({"metrics": {"remote_light": [1] * 4, "b": []}}), r"has the metrics \['b', 'remote_light'\]"),
        (Reply({"remote_light": [1] * 4}), r'must be {"metrics": {...}}, not {"remote_light"'),
        (Reply([1] * 4), r"not \[1, 1, 1, 1\]"),
        (_metrics([1] * 4, reasons=["a"]), "`reasons` must be 4 texts"),
        (_metrics([1] * 4, reasons=[1] * 4), "`reasons` must be 4 texts"),
        (Reply(b"<html>Welcome to nginx</html>"), "not JSON: <html>Welcome to nginx"),
        (Reply(b""), "not JSON: empty"),
        (Reply(b"[" * 200_000), "not JSON"),
        (Reply(b"\xff\xfe"), "not JSON"),
        (Reply(b" " * (remote.MAX_ANSWER_BYTES + 1)), "more than 16 MiB"),
    ],
)
def test_nonsense_is_one_sentence_and_is_not_asked_for_again(reply: Reply, complaint: str) -> None:
    served = serve(lambda body: reply)
    with pytest.raises(ConfigError, match=complaint) as caught:
        _scores(served)
    assert served.url in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert len(served.asked) == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_that_fails_for_a_while_is_asked_again(status: int) -> None:
    replies = [Reply(b"busy", status), Reply(b"busy", status)]
    served = serve(lambda body: replies.pop() if replies else score_light(body))
    np.testing.assert_allclose(_scores(served).values["remote_light"], LIGHT)
    assert len(served.asked) == 3


def _post(url: str, stop: threading.Event) -> Any:
    body = {"images": []}
    return remote.post_json(url, body, api_key=None, timeout_seconds=5, max_retries=3, stop=stop)


def test_retry_after_is_obeyed() -> None:
    class Hurried(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return False

    waits: list[float | None] = []
    replies = [Reply(b"", 503), Reply(b"", 429, {"Retry-After": "7"}), Reply(b"", 429, {"Retry-After": "9999999"})]
    served = serve(lambda body: replies.pop() if replies else score_light(body))
    _post(served.url, Hurried())
    assert waits == [60, 7, 0.04]


def test_a_retry_is_not_waited_for_once_somebody_asked_to_stop() -> None:
    stop = threading.Event()
    served = serve(lambda body: stop.set() or Reply(b"", 503, {"Retry-After": "30"}))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="503"):
        _post(served.url, stop)
    assert time.monotonic() - began < 5 and len(served.asked) == 1


def test_a_server_that_only_fails_is_given_up() -> None:
    served = serve(lambda body: Reply(b"no CUDA", 500))
    with pytest.raises(ConfigError, match=r"gave no answer after 3 tries, .* 500 Internal Server Error \(no CUDA\)"):
        _scores(served)
    assert len(served.asked) == 3


@pytest.mark.parametrize(
    "status, advice", [(400, "settings"), (401, "api_key_env"), (404, "url"), (413, "batch_size")]
)
def test_what_is_refused_is_not_asked_again(status: int, advice: str) -> None:
    served = serve(lambda body: Reply(b"no", status))
    with pytest.raises(ConfigError, match=rf"refused the request with {status} .*\(no\); .*{advice}"):
        _scores(served)
    assert len(served.asked) == 1


def test_redirects_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-secret")
    other = serve(score_light)
    served = serve(lambda body: Reply(b"", 302, {"Location": other.url}))
    with pytest.raises(ConfigError, match="302 Found; mend `url`"):
        _scores(served, api_key_env="SECRET_KEY")
    assert not other.asked


def test_silence_is_given_up() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=r"after 2 tries, .* no answer within timeout_seconds=0\.2"):
            _scores(url, timeout_seconds=0.2, max_retries=1)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    "first,drop,complaint",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", r"no answer within timeout_seconds=0\.2"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", "no answer within timeout_seconds"),
        (b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", "no answer within timeout_seconds"),
        (b"", b"H", "no answer within timeout_seconds"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\nout of luck", b"!", "after 1 try: 500 No"),
        (b"HTTP/1.1 403 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n!\r\n", "refused the request with 403 No"),
    ],
    ids=["body", "chunks", "headers", "status line", "error", "refusal"],
)
def test_trickles_are_given_up(first: bytes, drop: bytes, complaint: str) -> None:
    """A blank now and then, for minutes: never silent, and never done."""
    began = time.monotonic()
    with pytest.raises(ConfigError, match=complaint):
        _scores(_trickle(first, drop), timeout_seconds=0.2, max_retries=0)
    assert time.monotonic() - began < 1.5


def _trickle(first: bytes, drop: bytes) -> str:
    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listening.accept()
        try:
            connection.sendall(first)
            for _ in range(500):
                connection.sendall(drop)
                time.sleep(0.02)
        except OSError:
            pass
        connection.close()
        listening.close()

    threading.Thread(target=drip, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_name_that_nobody_resolves_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no answer within"):
        _scores("http://judge.example", timeout_seconds=0.2, max_retries=0)
    assert time.monotonic() - began < 1.5


NOISE = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e"


@pytest.mark.parametrize("status", [200, 400, 500])
def test_what_a_server_says_does_not_reach_the_terminal_as_a_command(status: int) -> None:
    served = serve(lambda body: Reply(f"{NOISE} no {'long ' * 9999}".encode(), status))
    with pytest.raises(ConfigError, match="no long") as caught:
        _scores(served, max_retries=0)
    assert not set(NOISE[1:]) & {"\x1b"} or not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & set(str(caught.value))
    assert len(str(caught.value)) < 600


def test_reasons_are_kept_short_and_plain() -> None:
    count = len(LIGHT)
    served = serve(lambda body: _metrics([None] * count, reasons=[f"{NOISE}too  dark {'x' * 10**5}"] * count))
    for reason in _scores(served).reasons:
        assert "too dark" in reason and len(reason) <= 200 and reason.isprintable()


def test_a_server_that_breaks_off_is_no_answer() -> None:
    whole = b'{"metrics": {"remote_light": [1, 1, 1, 1]}}'
    served = serve(lambda body: Reply(whole, headers={"Content-Length": str(len(whole) + 1), "Connection": "close"}))
    with pytest.raises(ConfigError, match="gave no answer after 3 tries"):
        _scores(served, timeout_seconds=5)


def test_the_key_is_sent_and_said_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_KEY", "sk-secret ")
    served = serve(score_light)
    _scores(served, api_key_env="SECRET_KEY")
    assert served.asked[0][1]["Authorization"] == "Bearer sk-secret"
    scorer = _scorer(served.url, api_key_env="SECRET_KEY")
    assert "sk-secret" not in f"{scorer!r} {scorer.model_dump_json()} {scorer.fingerprint()}"
    for status in (401, 500, 200):  # a server that repeats it
        echo = serve(lambda body, status=status: Reply(b"your key sk-secret", status))
        with pytest.raises(ConfigError, match=r"your key \[key\]") as caught:
            _scores(echo, api_key_env="SECRET_KEY")
        assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    "value, says", [(None, "is not set"), (" ", "is not set"), ("sk-a\nsk-b", "more than one line")]
)
def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str | None, says: str) -> None:
    monkeypatch.delenv("SECRET_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SECRET_KEY", value)
    with pytest.raises(ConfigError, match=f"SECRET_KEY.* {says}") as caught:
        _scores("http://127.0.0.1:9", api_key_env="SECRET_KEY")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"url": "file:///etc/passwd"}, "http"),
        ({"url": "ftp://host/x"}, "http"),
        ({"url": "localhost:8000"}, "http"),
        ({"gives": []}, "at least 1"),
        ({"gives": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"gives": [{"name": "a", "auxiliary": True}]}, "main metric"),
        ({"version": ""}, "at least 1"),
        ({"version": None}, "string"),
        ({"gives": [{"name": "a", "range": [1, 0]}]}, "must rise: "),
        ({"gives": [{"name": "a", "range": [1, 1]}]}, "must rise: "),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        _scorer(**{"url": "http://localhost", **settings})


@pytest.mark.parametrize(
    "kind", [{"type": "http", "version": 1, "gives": [{"name": "a"}]}, {"type": "judge", "model": "m"}]
)
@pytest.mark.parametrize(
    "url", ["http://host/?key=SECRET", "https://host#SECRET", "http://me:SECRET@host", "SECRET@h"]
)
def test_a_url_with_a_key_is_refused_and_not_repeated(kind: dict[str, Any], url: str) -> None:
    with pytest.raises(ConfigError, match=r"url must hold no user, .* set api_key_env to its name") as caught:
        load(ScoreConfig, None, ["path=x", f"scorers={json.dumps([{**kind, 'url': url}])}"])
    with pytest.raises(ValidationError) as bare:
        resolve("scorers", kind["type"])(**kind, url=url)
    assert "SECRET" not in f"{caught.value} {bare.value}" and str(caught.value).count("\n") == 1


def test_the_version_is_the_fingerprint_and_the_address_is_not() -> None:
    first = _scorer("http://a").fingerprint()
    assert first == _scorer("http://b", timeout_seconds=1).fingerprint()
    assert first != _scorer("http://a", version="2").fingerprint()
    assert first == _scorer("http://a", version=1).fingerprint(), "YAML reads it as a number"
    assert first != _scorer("http://a", sends=[]).fingerprint()


# --- through the verb ------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(1, 4):
        Image.new("RGB", (40, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("something red")
    return folder


@contextmanager
def _reference_server(scorer: str, *more: Path) -> Iterator[str]:
    """The settings that scripts/score_server.py prints for a scorer."""
    command = [sys.executable, str(ROOT / "scripts" / "score_server.py"), scorer, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *more)))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.fixture
def reference_server() -> Iterator[str]:
    with _reference_server("brightness") as settings:
        yield settings


MOODY = """
from diffusion_dpo.scorers import Scores
from diffusion_dpo.scorers.brightness import Brightness


class Moody(Brightness):
    def score(self, batch):
        reds = [request.image.getpixel((0, 0))[0] for request in batch]
        if 120 in reds:
            raise KeyError("no such face")
        if 130 in reds:
            return Scores({})
        return super().score(batch)
"""


def test_what_the_reference_server_stumbles_over_is_missing(images: Path, tmp_path: Path) -> None:
    """One image in three, on which the scorer raises: null with the reason, and the connection holds."""
    (tmp_path / "moody_judge.py").write_text(MOODY)
    with _reference_server("{type: 'moody_judge:Moody'}", tmp_path) as settings:
        assert main(["score", f"path={images}", "device=cpu", "max_broken_share=1", settings]) == 0
        rows = list(read_rows(images, pattern="scores-brightness-*.parquet"))
        assert sorted(row["value"] is None for row in rows) == [False, False, True]
        (reason,) = {row["reason"] for row in rows if row["value"] is None}
        assert "KeyError" in reason and "no such face" in reason
        url = json.loads(settings.removeprefix("scorers="))[0]["url"]
        scorer = _scorer(url, gives=[{"name": "brightness"}], max_retries=0)
        with pytest.raises(ConfigError, match=r"500 .*ScorerContractError.*returned \[\]"):
            scorer.post(url, {"images": [remote.as_png(Image.new("RGB", (32, 32), (130, 0, 0)))]})


@pytest.mark.parametrize(
    "scorer, says", [("diversity", "diversity compares .* cannot be served"), ("none", "unknown")]
)
def test_what_the_reference_server_cannot_serve_is_one_sentence(scorer: str, says: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "score_server.py"), scorer, "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.returncode == 2 and re.search(says, run.stderr)
    assert not run.stdout and "Traceback" not in run.stderr


def _values(folder: Path, metric: str) -> list[float]:
    return [row["value"] for row in read_rows(folder, pattern=f"scores-{metric}-*.parquet")]


def test_the_reference_server_says_what_the_scorer_says(reference_server: str, images: Path, tmp_path: Path) -> None:
    assert main(["score", f"path={images}", "device=cpu", "batch_size=2", reference_server]) == 0
    assert main(["score", f"path={images}", "device=cpu", "scorers=[brightness]", f"output_dir={tmp_path / 'o'}"]) == 0
    assert len(_values(images, "brightness")) == 3
    assert _values(images, "brightness") == _values(tmp_path / "o", "brightness")
    url = json.loads(reference_server.removeprefix("scorers="))[0]["url"]
    settings = {"gives": [{"name": "brightness"}], "max_retries": 0}
    with pytest.raises(ConfigError, match=r"400 .*not a request"):
        _scorer(url, **settings).post(url, {"images": ["no image"]})
    with pytest.raises(ConfigError, match=r"400 .*not a request"):
        _scorer(url, **settings).post(url, {"pictures": []})


def test_a_server_that_is_down_costs_nothing_that_was_judged(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("diffusion_dpo.scoring.IMAGES_PER_SHARD", 1)
    up = 2
    served = serve(lambda body: score_light(body) if len(served.asked) <= up else Reply(b"", 503))
    scorers = f"scorers=[{_scorer(served.url).model_dump_json()}]"
    arguments = ["score", f"path={images}", "device=cpu", "batch_size=1", scorers]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "gave no answer after 3 tries" in captured.err + captured.out and "Traceback" not in captured.err
    assert len(_values(images, "remote_light")) == 2
    served.asked.clear()
    up = 100
    assert main(arguments) == 0
    assert len(served.asked) == 1 and len(_values(images, "remote_light")) == 3


def test_nobody_listens(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    assert main(["score", f"path={images}", "device=cpu", f"scorers=[{_scorer(url).model_dump_json()}]"]) == 2
    captured = capsys.readouterr()
    assert f"{url} gave no answer after 3 tries" in captured.err + captured.out
    assert "refused" in captured.err + captured.out
