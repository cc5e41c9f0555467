"""Prompts from files: what is read, what is refused, and in which words."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.prompts import NUM_POCKET_PROMPTS, read_prompts
from diffusion_dpo.pocket.world import is_held_out, parse_caption
from tests.photos import jpeg


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_three_formats_give_the_same_prompts(tmp_path: Path):
    files = [
        write(tmp_path, "a.txt", "a red circle\n\n  a blue square \n"),
        write(tmp_path, "a.tsv", "Category\tPrompt\nx\ta red circle\ny\ta blue square\n"),
        write(tmp_path, "a.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a blue square"}\n'),
    ]
    read = [read_prompts(path) for path in files]
    assert read[0] == read[1] == read[2]
    assert [prompt.text for prompt in read[0]] == ["a red circle", "a blue square"]


BOTH = [("a red circle", "x"), ("a blue, square", "")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("drawbench.csv", 'Prompts,Category\r\na red circle,x\r\n"a blue, square",\r\n'),
        ("excel.csv", "\ufeffcategory;TEXT\nx;a red circle\n;a blue, square\n"),
        ("parti.tsv", "Prompt\tCategory\tChallenge\tNote\na red circle\tx\ty\t\na blue, square\t\t\t\n"),
        ("upper.CSV", 'caption,category\na red circle,x\n\n"a blue, square"\n'),
        ("lines.jsonl", '{"text": "a red circle", "category": "x"}\n{"caption": "a blue, square"}\n'),
        ("genai.json", '{"0": {"prompt": "a red circle", "category": "x"}, "1": {"prompt": "a blue, square"}}'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_prompts_as_others_keep_them(tmp_path: Path, name: str, text: str, encoding: str):
    (tmp_path / name).write_bytes(
        text.encode(encoding) if encoding == "utf-8" else text.lstrip("\ufeff").encode(encoding)
    )
    assert [(it.text, it.category) for it in read_prompts(tmp_path / name)] == BOTH


def test_json_of_objects_and_parquet_are_read_and_rows_without_a_prompt_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path, "a.json", '[{"prompt": "one", "id": 3}, "two"]')
    assert [(it.id, it.text, it.category) for it in read_prompts(path)] == [
        ("3", "one", ""),
        (read_prompts(write(tmp_path, "a.txt", "two"))[0].id, "two", "a"),
    ]
    table = pa.table({"image": [b"x"] * 4, "Caption": ["one", None, "two", " "], "id": [5, 6, 7, 8]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [(it.id, it.text) for it in read_prompts(tmp_path / "a.parquet")] == [("5", "one"), ("7", "two")]
    assert "2 rows have no prompt and are passed over (a.parquet row 1: no prompt, a.parquet row 3" in (
        capsys.readouterr().out
    )
    pq.write_table(table.select(["id"]), tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"a column must be called .*; the columns are id"):
        read_prompts(tmp_path / "b.parquet")


def test_an_id_is_the_content_unless_it_is_given_and_never_the_position(tmp_path: Path):
    forward = read_prompts(write(tmp_path, "a.txt", "one\ntwo\n"))
    backward = read_prompts(write(tmp_path, "b.txt", "two\none\n"))
    assert forward == backward[::-1]
    given = read_prompts(write(tmp_path, "c.jsonl", '{"id": 7, "prompt": "one"}\n'))
    assert given[0].id == "7"


def test_repeats_are_used_once_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert len(read_prompts(write(tmp_path, "a.txt", "one\none\ntwo\n"))) == 2
    assert "1 repeated prompts" in capsys.readouterr().out


def test_references_are_read_beside_the_file(tmp_path: Path):
    (tmp_path / "face.jpg").write_bytes(jpeg(0))
    path = write(tmp_path, "a.jsonl", '{"prompt": "one", "references": ["face.jpg"]}\n')
    assert read_prompts(path)[0].references == (jpeg(0),)


def test_the_same_text_with_other_references_is_another_prompt(tmp_path: Path):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    lines = ['{"prompt": "one"}', *(f'{{"prompt": "one", "references": ["{i}.jpg"]}}' for i in (0, 1, 0))]
    prompts = read_prompts(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert [prompt.references for prompt in prompts] == [(), (jpeg(0),), (jpeg(1),)]
    given = [line.replace("{", '{"id": 1, ') for line in lines[1:3]]
    with pytest.raises(ConfigError, match="references"):
        read_prompts(write(tmp_path, "b.jsonl", "\n".join(given)))


def test_nothing_outside_the_folder_is_a_reference(tmp_path: Path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(jpeg(0))
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg"):
        path = write(folder, "a.jsonl", json.dumps({"prompt": "one", "references": [name]}))
        with pytest.raises(ConfigError, match=r"line 1: reference .* leaves the folder"):
            read_prompts(path)
    path = write(folder, "a.jsonl", json.dumps({"prompt": "one", "references": ["a.jsonl"]}))
    with pytest.raises(ConfigError, match=r"line 1: reference 'a\.jsonl': not an image file"):
        read_prompts(path)


def test_zero_is_an_id_and_nothing_is_none(tmp_path: Path):
    zero, empty = read_prompts(write(tmp_path, "a.jsonl", '{"id": 0, "prompt": "one"}\n{"id": "", "prompt": "two"}\n'))
    assert zero.id == "0"
    assert empty == read_prompts(write(tmp_path, "b.txt", "two"))[0]


def test_only_a_line_feed_ends_a_line(tmp_path: Path):
    text = "one\u2028still one\x85\x0cstill"
    assert [p.text for p in read_prompts(write(tmp_path, "a.txt", f"{text}\r\ntwo"))] == [text, "two"]
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    assert [p.text for p in read_prompts(write(tmp_path, "a.jsonl", row))] == [text]


def test_quotes_in_a_table_are_text(tmp_path: Path):
    path = write(tmp_path, "a.tsv", 'Prompt\tCategory\n"half a quote\tx\n"a sign" on a wall\ty\n')
    assert [prompt.text for prompt in read_prompts(path)] == ['"half a quote', '"a sign" on a wall']


def test_pocket_prompts_are_split_by_content():
    training, held_out = (read_prompts(None, held_out=side) for side in (False, True))
    assert len(training) == len(held_out) == NUM_POCKET_PROMPTS
    for prompts, side in ((training, False), (held_out, True)):
        assert all(is_held_out(parse_caption(prompt.text)) == side for prompt in prompts)
    assert len(read_prompts(None, limit=5)) == 5


def test_more_prompts_than_the_pocket_world_has_are_refused_at_once():
    with pytest.raises(ConfigError, match="num_prompts is 999999, and the pocket world has 23583 held-out captions"):
        read_prompts(None, limit=999_999, held_out=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xlsx", "prompt\n", r"must end in .txt, .csv, .tsv, .json, .jsonl or .parquet"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.csv", "prompt,id\na cat, a dog,1\n", r"a.csv line 2 has 3 values for 2 columns \(prompt, id\); put"),
        ("a.csv", 'prompt\n"half a quote\n', "cannot read"),
        ("a.json", '[{"prompt": "one"}, {"words": "two"}]', "item 1 needs a text `prompt`"),
        ("a.json", "[1]", "a list of texts or objects"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.tsv", "words\tid\nx\t1\n", "must be called `prompt`, `text` or `caption`; the columns are words, id"),
        ("a.jsonl", '{"prompt": "one"}\n{oops\n', "line 2 is not JSON"),
        ("a.jsonl", '{"words": "one"}\n', "line 1 needs a text `prompt`"),
        ("a.jsonl", '{"prompt": ["one", "two"]}\n', "line 1 needs .*; here: 2 prompts for one image"),
        ("a.jsonl", '{"prompt": "one", "references": "x.png"}\n', "`references` must be a list"),
        (
            "a.jsonl",
            '{"prompt": "one", "references": ["absent.png"]}\n',
            "line 1: reference 'absent.png': no such file",
        ),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": "\\ud800"}\n', "line 2: .* not valid Unicode"),
        ("a.jsonl", '{"prompt": "one", "id": "\\ud800"}\n', "line 1: .* not valid Unicode"),
        ("a.tsv", f"prompt\n{'x' * 200_000}\n", "cannot read .* field larger"),
        (
            "a.jsonl",
            '{"prompt": "one", "id": 1}\n{"prompt": "two", "id": 1}\n',
            r"two different prompts \(or references\) have the id '1'",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="there is no file"):
        read_prompts(tmp_path / "absent.txt")
