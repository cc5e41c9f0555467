"""Which files are train, validation and test, by their names; every reader takes train, says so, and takes others."""

import csv
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError, validate
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.collect import collect
from diffusion_dpo.data.recognise import AutoData
from diffusion_dpo.data.splits import select, split_names
from tests.photos import jpeg

A, B = jpeg(0), jpeg(1)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("data/train-00000-of-00001.parquet data/test-00000-of-00002.parquet", "train test"),
        ("train-00000-of-00001-0a1b.parquet validation_unique-00000-of-00001.parquet", "train validation_unique"),
        ("default/partial-train/0000.parquet default/test/0000.parquet", "train test"),
        ("train.jsonl valid.jsonl dev.jsonl eval.jsonl", "train validation validation test"),
        ("train/metadata.jsonl val/metadata.jsonl", "train validation"),
        ("TRAIN_0.json train_1.json test_0.json train2.json", "train train test train"),
        ("a/my-train-file.csv a/my-test-file.csv", "train test"),
        ("pickapic_train.parquet pickapic_dev.parquet", "train validation"),
        ("pairs/p.parquet pairs-test/p.parquet", "- test"),
        ("test-0.parquet", "test"),
        # names that only look like splits
        ("train-images.parquet other.parquet", "- -"),
        ("test_run/a.parquet latest/b.parquet contest.parquet", "- - -"),
        ("training_photos/a.parquet drawings/b.parquet", "- -"),
        ("pairs-00000.parquet pairs-00001.parquet", "- -"),
    ],
)
def test_a_split_is_known_by_name_and_by_its_counterpart(names: str, splits: str) -> None:
    found = split_names([PurePosixPath(name) for name in names.split()])
    assert [name or "-" for name in found] == splits.split()


@pytest.mark.parametrize(
    ("names", "split", "kept"),
    [
        ("train.x test.x val.x", None, "train.x"),
        ("train.x test.x val.x", "dev", "val.x"),
        ("train.x test.x val.x", "all", "train.x test.x val.x"),
        ("train.x test.x more.x", None, "train.x"),
        ("more.x test.x", None, "more.x"),
        ("more.x test.x", "train", "more.x"),
        ("train.x more.x", None, "train.x more.x"),
        ("test.x", None, "test.x"),
        ("a.x b.x", "train", "a.x b.x"),
    ],
)
def test_train_is_taken_where_there_is_a_choice(names: str, split: str | None, kept: str) -> None:
    kept_files, left = select([Path("d") / name for name in names.split()], split, Path("d"))
    assert [file.name for file in kept_files] == kept.split()
    assert sorted(file.name for files in left.values() for file in files) == sorted({*names.split()} - {*kept.split()})


@pytest.mark.parametrize(
    ("names", "split", "says"),
    [
        ("train.x test.x", "validation", "no split 'validation'; those there are test, train"),
        ("a.x b.x", "test", "no split 'test'; its files name none: a.x, b.x"),
        ("test.x val.x", None, "several splits, and none of them is train; those there are test, validation"),
    ],
)
def test_a_split_that_is_not_there_is_answered_with_those_that_are(names: str, split: str | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        select([Path("d") / name for name in names.split()], split, Path("d"))


# --- readers ---------------------------------------------------------------------------------------------------------

Row = dict[str, object]


def parquet(root: Path, split: str, rows: list[Row]) -> None:
    (root / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / f"{split}-00000-of-00001.parquet")


def lines(root: Path, split: str, rows: list[Row]) -> None:
    """JSON lines, images beside them."""
    write_images(root)
    (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def metadata(root: Path, split: str, rows: list[Row]) -> None:
    """An imagefolder with splits."""
    write_images(root / split)
    (root / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(root: Path, split: str, rows: list[Row]) -> None:
    write_images(root / split)
    with (root / split / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sides(root: Path, split: str, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        for side, data in (("chosen", A), ("rejected", B)):
            (root / split / side).mkdir(parents=True, exist_ok=True)
            (root / split / side / f"{i}.jpg").write_bytes(data)
            (root / split / side / f"{i}.txt").write_text(str(row["prompt"]))


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jpg").write_bytes(A)
    (folder / "b.jpg").write_bytes(B)


READERS: dict[str, tuple[Callable[[Path, str, list[Row]], None], Row]] = {
    "pairs": (parquet, {"chosen": A, "rejected": B}),
    "pickapic": (parquet, {"jpg_0": A, "jpg_1": B, "label_0": 1.0}),
    "labelled": (parquet, {"image": A, "label": True}),
    "hub": (parquet, {"image_0": A, "image_1": B, "label": 1}),
    "hub, lines": (lines, {"image_0": "a.jpg", "image_1": "b.jpg", "label": 1}),
    "folder": (metadata, {"chosen": "a.jpg", "rejected": "b.jpg"}),
    "folder, csv": (table, {"chosen": "a.jpg", "rejected": "b.jpg"}),
    "hpdv3": (lines, {"path1": "a.jpg", "path2": "b.jpg"}),
    "invoke": (lines, {"image_0": "a.jpg", "image_1": "b.jpg", "prefer_0": True, "prefer_1": False}),
    "two_folders": (sides, {}),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_takes_the_train_split_says_so_and_takes_another(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, columns = READERS[kind]
    for split, size in (("train", 3), ("validation", 1), ("test", 2)):
        write(tmp_path / "d", split, [{"prompt": f"{split} {i}", **columns} for i in range(size)])

    def prompts(**settings: str) -> list[str]:
        source = AutoData(path=tmp_path / "d", **settings).recognised()
        assert source.type == kind.partition(",")[0]
        items = list(source.read())
        assert source.num_rows() == len(items)
        return [it.prompt for it in items if isinstance(it, PreferencePair)]

    assert prompts() == prompts(split="train") == ["train 0", "train 1", "train 2"]
    assert prompts(split="val") == ["validation 0"]
    assert len(prompts(split="all")) == 6
    with pytest.raises(ConfigError, match="no split 'dvd'; those there are test, train, validation"):
        prompts(split="dvd")
    collect(AutoData(path=tmp_path / "d").recognised(), max_broken_share=0)
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: " in out and "1 row of the split validation (" in out and "2 rows of the split test (" in out
    assert "data.split=" in out


def test_ranked_rows_have_splits_too(tmp_path: Path) -> None:
    for split in ("train", "test"):
        parquet(tmp_path, split, [{"prompt": split, "rank": 1, "image": A}, {"prompt": split, "rank": 2, "image": B}])
    for settings, prompt in (({}, "train"), ({"split": "test"}, "test")):
        [pair] = AutoData(path=tmp_path, **settings).recognised().read()
        assert isinstance(pair, PreferencePair) and pair.prompt == prompt


def test_the_setting_is_one_of_every_reader() -> None:
    with pytest.raises(ConfigError, match=r"splt: there is no such setting\. Did you mean split"):
        validate(AutoData, {"path": "x", "splt": "test"}, where="a test")
