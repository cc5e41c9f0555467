"""Suites of prompts: the files of their authors, with categories; a download is what it should be, or nothing."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import prompts, suites
from diffusion_dpo.data.prompts import read_prompts
from diffusion_dpo.data.suites import Suite, suite_files

PARTI = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tx\na cat\tAnimals\tBasic\t\n"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(
    "name,text,categories",
    [
        ("parti.tsv", PARTI, ["Abstract", "Animals"]),
        ("anime.json", json.dumps(["bond", "a cat"]), ["anime", "anime"]),
        ("hps.json", json.dumps({"photo": ["bond"], "anime": ["a cat"]}), ["photo", "anime"]),
        (
            "g.jsonl",
            '{"tag": "one", "include": [], "prompt": "bond"}\n{"tag": "two", "prompt": "a cat"}',
            ["one", "two"],
        ),
        ("own.jsonl", '{"category": "x", "prompt": "bond"}\n{"prompt": "a cat"}', ["x", ""]),
    ],
)
def test_categories_come_with_the_files_of_the_suites(
    tmp_path: Path, name: str, text: str, categories: list[str]
) -> None:
    found = read_prompts(write(tmp_path, name, text))
    assert [prompt.category for prompt in found] == categories
    assert found == read_prompts(write(tmp_path, "plain.txt", "bond\na cat\n"))  # a category is no part of a prompt


def test_pocket_prompts_have_categories_and_a_repeat_keeps_its_first(tmp_path: Path) -> None:
    assert {prompt.category for prompt in read_prompts(None)} == {"one shape", "two shapes"}
    (one,) = read_prompts(write(tmp_path, "a.json", json.dumps({"x": ["bond"], "y": ["bond"]})))
    assert one.category == "x"


@pytest.mark.parametrize("text", ["{", "3", '["a", 3]', '{"x": "a"}', json.dumps(["\ud800"])])
def test_json_that_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.json (is not JSON|must hold a list of texts)"):
        read_prompts(write(tmp_path, "a.json", text))


class Files(http.server.BaseHTTPRequestHandler):
    answer = PARTI.encode()

    def do_GET(self) -> None:
        self.send_response(404 if self.path.endswith("missing.tsv") else 200)
        self.send_header("Content-Length", str(len(self.answer)))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_suite_is_downloaded_once_and_checked(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = Suite("there/parti.tsv", hashlib.sha256(PARTI.encode()).hexdigest())
    monkeypatch.setitem(suites.SUITES, "parti", right)
    (file,) = suite_files("parti", host=host)
    assert file.is_relative_to(tmp_path / "cache") and [prompt.text for prompt in read_prompts(Path("parti"))]
    assert suite_files("parti", host="http://127.0.0.1:9") == [file]  # nobody is asked again
    file.write_text("damaged")
    with pytest.raises(ConfigError, match="cannot download the suite parti"):
        suite_files("parti", host="http://127.0.0.1:9")
    assert suite_files("parti", host=host) == [file] and file.read_text() == PARTI
    write(tmp_path, "parti", "a file of this name\n")
    with pytest.raises(ConfigError, match=r"must end in \.txt"):
        prompts.read_prompts(Path("parti"))


@pytest.mark.parametrize("path,message", [("missing.tsv", "404"), ("parti.tsv", "not the suite parti as it is known")])
def test_what_is_not_the_suite_leaves_nothing(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, message: str
) -> None:
    monkeypatch.setitem(suites.SUITES, "parti", Suite(path, "0" * 64))
    with pytest.raises(ConfigError, match=message):
        suite_files("parti", host=host)
    assert not list(tmp_path.rglob("*.tsv"))


def test_the_hub_says_in_a_sentence_what_it_cannot_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot get the suite hpsv2 from the hub"):
        suite_files("hpsv2")


def test_the_names_are_those_in_the_help() -> None:
    assert set(suites.SUITES) == {"parti", "geneval", "hpsv2"}
