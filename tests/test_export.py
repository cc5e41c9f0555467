"""`export`: what it writes is read back as the same pairs, by us and by others, and a killed run leaves no trace."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_dpo import export
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import Dropped, PairSource, PreferencePair, tar_shards
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.pairs import PairsData, pair_row
from diffusion_dpo.data.pickapic import PickapicData, pickapic_row
from diffusion_dpo.data.rows import make_labelled_image, make_pair
from diffusion_dpo.data.shards import PAIRS, read_rows, write_shard
from diffusion_dpo.exporting.pairs import SINGLE
from diffusion_dpo.settings import ExportConfig
from tests.photos import encode, folder_hash, jpeg, photo


def pair(prompt: str, chosen: bytes, rejected: bytes, **more: object) -> PreferencePair:
    made = make_pair("test", prompt, chosen, rejected, source="test")
    assert isinstance(made, PreferencePair)
    return replace(made, **more)  # type: ignore[arg-type]


def images(number: int) -> tuple[bytes, bytes]:
    """Two small photographs that no other number has."""
    return jpeg(number % 2, (40 + number, 40)), encode(photo(2 + number % 2, (40 + number, 40)), "PNG")


PAIRS_OF_ALL_KINDS = [
    pair("a cat", *images(0), chosen_origin={"position": 1, "model": "m"}, rejected_origin={"position": 0}),
    pair("a cat", *images(1), margin=0.5, chosen_scores={"clip": 0.3}, rejected_scores={"clip": float("nan")}),
    pair("a\0b", *images(2), label_prob=0.75),
    pair("ü 猫" + "x" * 100_000, *images(3), label_prob=0.5, chosen_origin={"model": "\ud800", "x": [float("inf")]}),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The pairs above, and one of them again."""
    (tmp_path / "pairs").mkdir()
    rows = [pair_row(replace(it, rejected_scores={})) for it in PAIRS_OF_ALL_KINDS]
    rows[1]["rejected_scores"] = '{"clip": NaN}'
    write_shard(tmp_path / "pairs" / "pairs-00000.parquet", [*rows, rows[0]], PAIRS)
    return tmp_path / "pairs"


def run(data: Path, out: str = "out", *overrides: str) -> Path:
    settings = [f"data.path={data}", f"output_dir={data.parent / out}", *overrides]
    return export.run(load(ExportConfig, None, settings))


def read_back(folder: Path) -> list[PreferencePair]:
    found = list(PickapicData(path=folder, ties="keep").read())
    assert all(isinstance(it, PreferencePair) for it in found), found
    return found  # type: ignore[return-value]


def identity(it: PreferencePair) -> tuple[object, ...]:
    return it.pair_id, it.prompt, it.chosen, it.rejected, it.label_prob


def expected(*, soft: bool) -> list[tuple[object, ...]]:
    return [identity(it if soft or it.label_prob == 0.5 else replace(it, label_prob=1.0)) for it in PAIRS_OF_ALL_KINDS]


# --- Pick-a-Pic ------------------------------------------------------------------------------------------------------


def without_tie_sides(rows: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """A tie has no winner: which of its images comes first is chance."""
    return [row if row[4] != 0.5 else (row[1], *sorted(row[2:4]), 0.5) for row in rows]  # type: ignore[type-var]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_our_own_importer_reads_the_same_pairs_back(data: Path, soft: bool, seed: int) -> None:
    folder = run(data, "out", f"soft_labels={str(soft).lower()}", f"seed={seed}", "shard_size=3")
    found = read_back(folder)
    assert without_tie_sides([identity(it) for it in found]) == without_tie_sides(expected(soft=soft))
    assert found[0].chosen_origin.get("model") == "m" and "model" not in found[0].rejected_origin
    assert sorted(it.name for it in (folder / "data").iterdir()) == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]


def test_the_columns_are_those_of_pick_a_pic(data: Path) -> None:
    rows = list(read_rows(run(data) / "data"))
    for row, it in zip(rows, PAIRS_OF_ALL_KINDS, strict=True):
        assert (row["caption"], row["has_label"], row["are_different"]) == (it.prompt, True, True)
        assert {row["jpg_0"], row["jpg_1"]} == {it.chosen, it.rejected}
        assert row["label_0"] + row["label_1"] == 1
        assert row["image_0_uid"] != row["image_1_uid"]
        winner = 0 if row["jpg_0"] == it.chosen else 1
        if it.label_prob == 0.5:
            assert (row["label_0"], row["best_image_uid"]) == (0.5, "tie")
        else:
            assert (row[f"label_{winner}"], row["best_image_uid"]) == (1, row[f"image_{winner}_uid"])
    assert [row["num_example_per_prompt"] for row in rows] == [2, 2, 1, 1]
    assert len({row["ranking_id"] for row in rows}) == 4 and all(row["ranking_id"] > 0 for row in rows)
    assert {rows[0]["model_0"], rows[0]["model_1"]} == {"m", ""}
    types = {field.name: str(field.type) for field in pq.read_schema(next((data.parent / "out" / "data").iterdir()))}
    assert (types["jpg_0"], types["label_0"], types["ranking_id"]) == ("binary", "double", "int64")


def test_datasets_reads_the_folder_by_its_name_alone(data: Path, tmp_path: Path) -> None:
    """As the scripts of diffusers do; and `datasets` keeps the bytes that they decode."""
    import datasets

    folder = run(data, "out", "shard_size=2")
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["caption"][:] == [it.prompt for it in PAIRS_OF_ALL_KINDS]
    assert {found[0]["jpg_0"], found[0]["jpg_1"]} == {PAIRS_OF_ALL_KINDS[0].chosen, PAIRS_OF_ALL_KINDS[0].rejected}
    files = [str(it) for it in sorted((folder / "data").iterdir())]
    again = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert again["label_0"][:] == found["label_0"][:]


@pytest.mark.parametrize("position", [0, 1])
def test_the_winner_is_on_either_side_whatever_its_position_was(position: int) -> None:
    origins = {"chosen_origin": {"position": position}, "rejected_origin": {"position": 1 - position}}
    pairs = [pair(f"prompt {i}", b"a", b"b", **origins) for i in range(1000)]

    def labels(seed: int) -> list[float]:
        return [pickapic_row(it, seed=seed, soft_labels=False, num_pairs_of_prompt=1)["label_0"] for it in pairs]

    assert 420 < sum(labels(0)) < 580  # five standard deviations
    assert labels(0) == labels(0)
    assert 420 < sum(a == b for a, b in zip(labels(0), labels(1), strict=True)) < 580, "another seed, other sides"


def test_what_the_format_cannot_hold_is_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data)
    out = capsys.readouterr().out
    assert "the labels of 1 pairs are probabilities, and became 1 and 0; soft_labels=true keeps them" in out
    assert "1 pairs are ties" in out
    assert "4 pairs in 1 files; dropped: 1 the same pair again" in out
    assert 'next: datasets.load_dataset("' in out
    run(data, "soft", "soft_labels=true")
    assert "became 1 and 0" not in capsys.readouterr().out


# --- WebDataset ------------------------------------------------------------------------------------------------------


def test_tar_files_hold_the_pairs_as_they_are(data: Path) -> None:
    folder = run(data, "out", "format=webdataset", "shard_size=3")
    assert sorted(it.name for it in folder.glob("*.tar")) == ["pairs-000000.tar", "pairs-000001.tar"]
    found = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            assert all((it.mtime, it.uid, it.gid, it.uname, it.mode) == (0, 0, 0, "", 0o644) for it in members)
            found += [(it.name, tar.extractfile(it).read()) for it in members]  # type: ignore[union-attr]
    facts_of_pairs = []
    for number, it in enumerate(PAIRS_OF_ALL_KINDS):
        chosen, rejected, facts = found[3 * number : 3 * number + 3]
        assert chosen == (f"{it.pair_id}.chosen.jpg", it.chosen)
        assert rejected == (f"{it.pair_id}.rejected.png", it.rejected)
        assert facts[0] == f"{it.pair_id}.json" and facts[0].count(".") == 1
        read = json.loads(facts[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert (read["prompt"], read["label_prob"]) == (it.prompt, it.label_prob)
        texts = {name: json.loads(value) for name, value in read.items() if name in tar_shards.AS_TEXT}
        assert texts["margin"] == it.margin
        facts_of_pairs.append(texts)
    assert facts_of_pairs[1]["chosen_scores"] == {"clip": 0.3}
    assert facts_of_pairs[1]["rejected_scores"] == {"clip": None}
    assert facts_of_pairs[0]["chosen_origin"] == {"position": 1, "model": "m"}
    assert facts_of_pairs[3]["chosen_origin"] == {"model": "?", "x": [None]}


def test_datasets_reads_the_tar_files(data: Path, tmp_path: Path) -> None:
    import datasets

    files = [str(it) for it in run(data, "out", "format=webdataset").glob("*.tar")]
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert [it["prompt"] for it in found["json"]] == [it.prompt for it in PAIRS_OF_ALL_KINDS]
    assert found[0]["chosen.jpg"].size == (40, 40)
    assert found["__key__"][:] == [it.pair_id for it in PAIRS_OF_ALL_KINDS]


def as_people_have_them(path: Path) -> Path:
    """Pairs of every format, turned by EXIF, transparent, of 16 bits, with a mask or without; margins on the last."""
    turned = Image.Exif()
    turned[0x0112] = 6
    sides = [encode(photo((i + 1) % 4, (48, 32)), "JPEG") for i in range(7)]
    others = [
        encode(photo(0, (48, 32)), "JPEG", exif=turned),
        encode(photo(1, (48, 32)), "AVIF"),
        encode(photo(2, (48, 32)).convert("RGBA").rotate(30), "PNG"),
        encode(photo(3, (48, 32)), "WEBP"),
        encode(photo(0, (44, 32)), "TIFF"),
        encode(photo(1, (44, 32)), "PNG", exif=turned),
        encode(photo(2, (44, 32)), "GIF"),
    ]
    rows = [pair_row(pair(f"prompt {i}", *it)) for i, it in enumerate(zip(sides, others, strict=True))]
    rows[6] |= {"margin": 0.5, "margin_norm": 2.0, "chosen_scores": '{"clip": 0.3}', "chosen_origin": '{"model": "m"}'}
    mask = encode(Image.new("L", (48, 32), "white"), "PNG")
    table = pa.Table.from_pylist([row | {"mask": mask if i == 3 else None} for i, row in enumerate(rows)])
    path.mkdir()
    pq.write_table(table.set_column(2, "chosen", pa.array(sides)), path / "pairs.parquet")
    return path


def pixels(it: PreferencePair) -> tuple[object, ...]:
    hashes = [pixel_hash(decode_rgb(data)) for data in (it.chosen, it.rejected)]
    return it.prompt, *hashes, it.label_prob, it.margin, it.chosen_scores, it.chosen_origin, bool(it.mask)


@pytest.mark.parametrize("format_", ["webdataset", "pickapic"])
def test_images_that_readers_disagree_on_are_written_so_that_they_agree(
    tmp_path: Path, format_: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`datasets`, from the folder alone, Pillow and our own reader decode the pixels that are trained on."""
    import datasets

    data = as_people_have_them(tmp_path / "d")
    ours = list(PairsData(path=data).read())
    wanted = [pixels(it) for it in ours]  # type: ignore[arg-type]
    folder = run(data, format_, f"format={format_}", "shard_size=100")
    kept = 0 if format_ == "webdataset" else 1  # WebP stays where it may stand beside other formats
    assert f"{7 - kept} images are written as upright PNG" in capsys.readouterr().out
    found = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 7
    for row, it in zip(found, wanted, strict=True):
        if format_ == "webdataset":
            images = [row["chosen.jpg"], row["rejected.png"]]
            assert row["json"]["prompt"] == it[0] and row["json"]["has_mask"] == it[-1]
        else:
            best = 0 if row["label_0"] == 1 else 1
            images = [Image.open(io.BytesIO(row[f"jpg_{side}"])) for side in (best, 1 - best)]
        assert [pixel_hash(image.convert("RGB")) for image in images] == list(it[1:3])
    if format_ == "webdataset":
        assert json.loads(found[6]["json"]["chosen_scores"]) == {"clip": 0.3}, "though the first rows have none"
        assert [pixels(it) for it in PairsData(path=folder).read()] == wanted  # type: ignore[arg-type]
        assert [it.chosen for it in PairsData(path=folder).read()] == [it.chosen for it in ours]  # type: ignore[union-attr]


def test_masks_are_kept_or_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    for name, data in {"a.jpg": jpeg(0), "b.jpg": jpeg(1), "m.png": encode(photo(2, mode="L"), "PNG")}.items():
        (tmp_path / "d" / name).write_bytes(data)
    line = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg", "mask": "m.png"}
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps(line))
    run(tmp_path / "d", "parquet", "data.type=folder")
    assert "the pairs have masks, which Pick-a-Pic has no column for" in capsys.readouterr().out
    folder = run(tmp_path / "d", "tar", "data.type=folder", "format=webdataset")
    assert "have masks" not in capsys.readouterr().out
    with tarfile.open(folder / "pairs-000000.tar") as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == [
            "chosen.jpg",
            "rejected.jpg",
            "mask.png",
            "json",
        ]


# --- the verb --------------------------------------------------------------------------------------------------------


def test_a_rerun_changes_nothing_and_says_so(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(data)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["num_pairs"], manifest["drops"]) == (4, {"the same pair again": 1})
    run(data)
    assert "export: all 4 pairs are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        run(data, "out", "seed=1")
    run(data, "tar", "format=webdataset")
    run(data, "tar", "format=webdataset", "seed=1")  # there are no sides in it


_SLOW = """
import sys, time
from diffusion_dpo.cli import main
from diffusion_dpo.exporting import pairs
write = pairs._write_file
def slow(*arguments):
    write(*arguments)
    print("written", flush=True)
    time.sleep(0.2)
pairs._write_file = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("format_", ["pickapic", "webdataset"])
def test_a_killed_run_is_finished_to_the_same_bytes(data: Path, format_: str) -> None:
    settings = (f"format={format_}", "shard_size=1")
    whole = folder_hash(run(data, "whole", *settings))
    folder = data.parent / "killed"
    arguments = ["export", f"data.path={data}", f"output_dir={folder}", *settings]
    with subprocess.Popen([sys.executable, "-c", _SLOW, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != "written":
            assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
    made = {it: it.stat().st_mtime_ns for it in folder.rglob("*pairs-*" if format_ == "webdataset" else "train-*")}
    assert 0 < len(made) < 4 and not json.loads((folder / "manifest.json").read_text())["complete"]
    (next(iter(made)).parent / ".train-00003.parquet.0123.partial").write_bytes(b"half")
    time.sleep(0.01)
    assert main(arguments) == 0
    assert folder_hash(folder) == whole
    assert all(it.stat().st_mtime_ns == then for it, then in made.items()), "what was whole is not written again"


class Mixed(PairSource):
    """Pairs of somebody's own plug-in, with ids of its own, and an image that was judged by itself among them."""

    def read(self) -> Iterator[PreferencePair | Dropped]:
        yield replace(PAIRS_OF_ALL_KINDS[0], pair_id="a.b/ü")
        single = make_labelled_image("single", "a cat", jpeg(3), True, source="test")
        assert isinstance(single, PreferencePair)
        yield single
        yield replace(PAIRS_OF_ALL_KINDS[1], pair_id="../c")


def test_pairs_of_a_plug_in_beside_single_images(tmp_path: Path) -> None:
    folder = export.run(ExportConfig(data=Mixed(), output_dir=tmp_path / "out"))
    assert [it.pair_id for it in read_back(folder)] == [it.pair_id for it in PAIRS_OF_ALL_KINDS[:2]]
    assert [row["num_example_per_prompt"] for row in read_rows(folder / "data")] == [2, 2]
    assert json.loads((folder / "manifest.json").read_text())["drops"] == {SINGLE: 1}
    folder = export.run(ExportConfig(data=Mixed(), output_dir=tmp_path / "tar", format="webdataset"))
    with tarfile.open(folder / "pairs-000000.tar") as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {it.pair_id for it in PAIRS_OF_ALL_KINDS[:2]}


def test_there_is_nothing_to_export_of_single_images(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "d" / "metadata.jsonl").write_text('{"prompt": "x", "image": "a.jpg", "label": true}')
    with pytest.raises(ConfigError, match=r"data\.type=labelled holds no pairs, only images .* nothing to export"):
        run(tmp_path / "d", "out", "data.type=labelled")
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_never_read_as_data(data: Path) -> None:
    for out in ("pairs", "pairs/export"):
        with pytest.raises(ConfigError, match=r"lies inside the data, .*pairs; choose another one"):
            run(data, out)


def test_broken_data_is_one_message(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "pairs-00000.parquet").write_bytes(b"nonsense")
    assert main(["export", f"data.path={data}", f"output_dir={data.parent / 'out'}"]) == 2
    assert "cannot read" in capsys.readouterr().err
    assert not (data.parent / "out").exists()
