"""Suites of prompts: the files of their authors, with categories; a download is what it should be, or nothing."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.config_help import settings
from diffusion_dpo.data import prompts, suites
from diffusion_dpo.data.prompts import read_prompts
from diffusion_dpo.data.suites import Suite, suite_files
from diffusion_dpo.pocket.world import parse_caption
from diffusion_dpo.settings import CompareConfig, GenerateConfig

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


def test_a_repeat_keeps_its_first_category_and_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_prompts(write(tmp_path, "a.json", json.dumps({"x": ["bond", "bond"], "y": ["bond", "a cat"]})))
    assert [prompt.category for prompt in found] == ["x", "y"]
    assert "2 repeated prompts are used once, 1 of them under the first" in capsys.readouterr().out


def test_pocket_is_the_held_out_tenth_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()  # a folder is no file of prompts
    named = read_prompts(Path("pocket"), limit=9)
    assert named == read_prompts(None, limit=9, held_out=True) and named != read_prompts(None, limit=9)
    shapes = {1: "one shape", 2: "two shapes"}
    assert [it.category for it in named] == [shapes[len(parse_caption(it.text).items)] for it in named]
    with pytest.raises(
        ConfigError, match=r"must end in .*, or be the name of a suite, parti, geneval, hpsv2 or pocket"
    ):
        read_prompts(Path("./elsewhere/pocket"))


@pytest.mark.parametrize("text", ["{", "3", '["a", 3]', '{"x": "a"}'])
def test_json_that_is_no_suite_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.json (is not JSON|must hold a list of texts)"):
        read_prompts(write(tmp_path, "a.json", text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", r'["\ud800"]', "not valid Unicode"),
        ("a.json", r'{"\ud800": ["bond"]}', "not valid Unicode"),
        ("a.jsonl", r'{"prompt": "bond", "category": "\ud800"}', "line 1: .* not valid Unicode"),
        ("a.jsonl", '{"prompt": "bond", "category": ["x"]}', "line 1: `category` must be a text"),
    ],
)
def test_a_category_that_is_no_text_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_a_tag_of_another_kind_is_no_category(tmp_path: Path) -> None:
    assert read_prompts(write(tmp_path, "a.jsonl", '{"prompt": "bond", "tag": ["x"]}'))[0].category == ""


class Files(http.server.BaseHTTPRequestHandler):
    answer = PARTI.encode()

    def do_GET(self) -> None:
        if self.path.endswith("garbage.tsv"):
            self.wfile.write(b"this is not HTTP")
            return
        self.send_response(404 if self.path.endswith("missing.tsv") else 200)
        if self.path.endswith("chunks.tsv"):  # one is announced, and breaks off
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"99\r\nbond")
            return
        self.send_header("Content-Length", str(len(self.answer) + 9 * self.path.endswith("cut.tsv")))
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
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


@pytest.mark.parametrize(
    "path,message",
    [
        ("missing.tsv", "cannot download the suite parti from http://127.0.0.1.*404.*give prompts_path the file"),
        ("parti.tsv", "not the suite parti as it is known here; download it elsewhere"),
        ("cut.tsv", "cannot download the suite parti .*9 more expected"),
        ("chunks.tsv", "cannot download the suite parti .*IncompleteRead"),
        ("garbage.tsv", "cannot download the suite parti .*this is not HTTP"),
    ],
)
def test_what_is_not_the_suite_leaves_nothing(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, message: str
) -> None:
    monkeypatch.setitem(suites.SUITES, "parti", Suite(path, "0" * 64))
    with pytest.raises(ConfigError, match=message):
        suite_files("parti", host=host)
    assert not list(tmp_path.rglob("*.tsv")) and not list(tmp_path.rglob("*.partial"))


def test_a_body_without_an_end_is_not_read_to_it(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "_MOST_BYTES", 8)
    with pytest.raises(ConfigError, match="more than 8 bytes"):
        suite_files("parti", host=host)


def test_a_cache_that_cannot_be_written_to_is_a_sentence(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(suites.SUITES, "parti", Suite("parti.tsv", hashlib.sha256(PARTI.encode()).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path, "file", "")))
    with pytest.raises(ConfigError, match=r"cannot keep the suite parti in .*set XDG_CACHE_HOME"):
        suite_files("parti", host=host)


def test_a_relative_cache_does_not_count(host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(suites.SUITES, "parti", Suite("parti.tsv", hashlib.sha256(PARTI.encode()).hexdigest()))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert suite_files("parti", host=host) == [tmp_path / "home/.cache/diffusion-dpo/suites/parti.tsv"]


def test_the_hub_says_in_a_sentence_what_it_cannot_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot get the suite hpsv2 from the hub"):
        suite_files("hpsv2")


def test_the_help_names_every_suite() -> None:
    for verb in (GenerateConfig, CompareConfig):
        (words,) = (setting.help for setting in settings(verb) if setting.key == "prompts_path")
        assert all(name in words for name in (*suites.SUITES, "pocket"))
