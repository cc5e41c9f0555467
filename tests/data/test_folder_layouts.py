"""Rows and folders as people have them: CSV, other names, links, two folders of any name, captions of any suffix."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.recognise import AutoData
from tests.photos import encode, jpeg, photo

A, B = jpeg(0), jpeg(1)
KEYS = ("prompt", "chosen", "rejected")


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def source_at(path: Path, **settings: str) -> PairSource:
    return AutoData(path=path, **settings).recognised()


def only_pair(source: PairSource) -> PreferencePair:
    [pair] = source.read()
    assert isinstance(pair, PreferencePair), pair
    assert source.num_rows() == 1
    return pair


def row(keys: tuple[str, ...] = KEYS, *values: str) -> dict[str, str]:
    return dict(zip(keys, values or ("a cat, sitting", "a.jpg", "b.jpg"), strict=True))


CSV = 'prompt,chosen,rejected\r\n"a cat, sitting",a.jpg,b.jpg\r\n\r\n'
ROWS = {
    "metadata.csv": CSV,
    "pairs.csv": "\ufeff" + CSV,
    "metadata.CSV": CSV.replace("a cat, sitting", "a cat; sitting").replace(",", ";").replace("cat; ", "cat, "),
    "metadata.tsv": "prompt\tchosen\trejected\na cat, sitting\ta.jpg\tb.jpg\n",
    "utf16.csv": CSV.encode("utf-16"),
    "metadata.json": json.dumps([row()]),
    "pairs.jsonl": json.dumps(row()),
    "metadata.jsonl": json.dumps(row(("text", "chosen_file_name", "rejected_file_name"))),
    "rows.jsonl": json.dumps(row(("caption", "chosen", "rejected"))),
    "Rows.csv": CSV.replace("prompt,chosen,rejected", "Text,Chosen,Rejected_file_name"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_any_text_are_read_by_the_folder_and_by_the_file(name: str, tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": A, "b.jpg": B, name: ROWS[name]})
    for path in (root, root / name):
        source = source_at(path)
        assert source.type == "folder"
        pair = only_pair(source)
        assert (pair.prompt, pair.chosen, pair.rejected) == ("a cat, sitting", A, B)


def test_a_row_of_csv_with_too_many_values_costs_that_row(tmp_path: Path) -> None:
    root = write(tmp_path, {"a.jpg": A, "b.jpg": B, "metadata.csv": CSV + "a cat, lying,a.jpg,b.jpg\r\n"})
    _, broken = source_at(root).read()
    assert broken == Dropped("metadata.csv line 4", "4 values for 3 columns (prompt, chosen, rejected)")


@pytest.mark.parametrize(
    ("columns", "values", "kind", "label_prob"),
    [
        ("prompt,image,label", "x,a.jpg,TRUE", "labelled", 1.0),
        ("prompt,path1,path2,confidence", "x,a.jpg,b.jpg,0.8", "hpdv3", 1.0),
        ("prompt,image_0,image_1,prefer_0,prefer_1", "x,a.jpg,b.jpg,True,false", "invoke", 1.0),
    ],
)
def test_numbers_and_truth_values_of_csv_are_such(
    columns: str, values: str, kind: str, label_prob: float, tmp_path: Path
) -> None:
    root = write(tmp_path, {"a.jpg": A, "b.jpg": B, "metadata.csv": f"{columns}\n{values}\n"})
    source = source_at(root)
    pair = only_pair(source)
    assert (source.type, pair.chosen, pair.label_prob) == (kind, A, label_prob)


def test_ranks_of_csv_are_numbers(tmp_path: Path) -> None:
    text = "prompt,image,rank\nx,a.jpg,10\nx,b.jpg,9\n"
    pair = only_pair(source_at(write(tmp_path, {"a.jpg": A, "b.jpg": B, "metadata.csv": text})))
    assert (pair.chosen, pair.margin) == (B, 1.0)


def test_names_of_windows_are_read(tmp_path: Path) -> None:
    line = json.dumps(row(KEYS, "x", "img\\a.jpg", "img\\b.jpg"))
    root = write(tmp_path, {"img/a.jpg": A, "img/b.jpg": B, "metadata.jsonl": line})
    source = source_at(root)
    assert only_pair(source).chosen == A
    assert source.left_out() == []


def test_a_link_out_of_the_folder_is_named_and_followed_into_images_dir_alone(tmp_path: Path) -> None:
    write(tmp_path / "disk", {"a.jpg": A, "b.jpg": B})
    root = write(tmp_path / "d", {"metadata.jsonl": json.dumps(row(KEYS, "x", "images/a.jpg", "images/b.jpg"))})
    (root / "images").symlink_to(tmp_path / "disk")
    advice = "copy what it leads to, or set data.images_dir to it"
    refused = Dropped("metadata.jsonl line 1: images/a.jpg", f"chosen: images/ leaves the folder: a link; {advice}")
    assert list(source_at(root).read()) == list(source_at(root, images_dir=str(root)).read()) == [refused]
    assert only_pair(source_at(root, images_dir=str(tmp_path / "disk"))).chosen == A


def test_what_no_row_names_is_left_out_by_name(tmp_path: Path) -> None:
    files = {"a.jpg": A, "b.jpg": B, "c.jfif": A, "d.heic": b"x", "metadata.jsonl": json.dumps(row()), "notes.md": "x"}
    root = write(tmp_path, {**files, "metadata.csv": CSV})
    pq.write_table(pa.table({"prompt": ["x"], "chosen": [A], "rejected": [B]}), root / "more.parquet")
    assert source_at(root).left_out() == [
        "2 images that no row names (c.jfif, d.heic)",
        "metadata.csv, more.parquet: metadata.jsonl is read",
    ]


# --- two folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("better", "worse", "suffix"),
    [
        ("w", "l", "caption"),
        ("Good", "bad", "txt"),
        ("preferred", "dispreferred", "txt"),
        ("1_dots/w", "1_dots/l", "txt"),
    ],
)
def test_two_folders_whose_names_say_which_is_better(better: str, worse: str, suffix: str, tmp_path: Path) -> None:
    files = {
        f"{better}/a.jfif": A,
        f"{worse}/a.JPE": B,
        f"{better}/a.{suffix}": "a cat",
        f"{worse}/a.{suffix}": "a cat",
    }
    source = source_at(write(tmp_path, files))
    assert source.type == "two_folders"
    pair = only_pair(source)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("a cat", A, B)
    assert source.left_out() == []


@pytest.mark.parametrize(
    "names",
    [
        ("positive/a.jpg", "negative/b.jpg"),  # classes of images that have nothing to do with each other
        ("good/a.jpg", "better/a.jpg", "bad/a.jpg"),  # which two?
        ("good/a.jpg", "other/a.jpg"),
    ],
)
def test_folders_that_do_not_say_it_in_one_way_are_no_pairs(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds candidates, and preference pairs are needed"):
        source_at(write(tmp_path, dict.fromkeys(names, A)))


def test_two_folders_under_several_names_are_refused_with_the_names(tmp_path: Path) -> None:
    """As candidates they would be judged again, and what was preferred would be lost."""
    write(tmp_path, dict.fromkeys(("w/a.jpg", "l/a.jpg", "more/good/a.jpg", "more/bad/a.jpg"), A))
    with pytest.raises(ConfigError, match="under several names: good/ with bad/ and w/ with l/; rename them"):
        source_at(tmp_path)


def test_folders_and_suffix_are_settings(tmp_path: Path) -> None:
    files = {"up/a.jpg": A, "down/a.jpg": B, "up/a.prompt": "a cat", "up/a.txt": "not this"}
    settings = {"chosen_dir": "up", "rejected_dir": "down", "caption_suffix": ".prompt"}
    assert only_pair(source_at(write(tmp_path, files), **settings)).prompt == "a cat"
    with pytest.raises(ConfigError, match="are both 'up'"):
        source_at(tmp_path, chosen_dir="up", rejected_dir="up")


def test_a_prompt_inside_the_images_stands_in_for_a_caption(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64")
    drawn = [encode(photo(i), "PNG", pnginfo=info) for i in (0, 1)]
    files = {"chosen/a.png": drawn[0], "rejected/a.png": drawn[1], "chosen/b.jpg": A, "rejected/b.jpg": B}
    pair, broken = source_at(write(tmp_path, files)).read()
    assert isinstance(pair, PreferencePair) and pair.prompt == "a cat"
    assert broken == Dropped("chosen/b.jpg", "no caption")


def test_what_two_folders_leave_out_is_counted_and_named(tmp_path: Path) -> None:
    files = {"chosen/a.jpg": A, "rejected/a.jpg": B, "chosen/a.txt": "x", "chosen/b.txt": "alone", "c.png": A}
    source = source_at(write(tmp_path, {**files, "a.npz": b"x", "Thumbs.db": b"x", "chosen/d.npz": b"x"}))
    assert source.left_out() == [
        "1 caption without an image (chosen/b.txt)",
        "1 image in neither chosen/ nor rejected/ (c.png)",
        "3 other files: 2 x .npz, 1 x .db (Thumbs.db, a.npz, chosen/d.npz)",
    ]


def test_a_format_that_is_not_decoded_costs_its_pair(tmp_path: Path) -> None:
    files = {"chosen/a.heic": b"\0\0\0\x18ftypheic", "rejected/a.jpg": B, "chosen/a.txt": "x"}
    pair = only_pair(source_at(write(tmp_path, files)))
    assert pair.chosen.endswith(b"heic"), "read, so that it is named when it is decoded"
