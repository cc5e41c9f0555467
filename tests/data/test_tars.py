"""Tars of WebDataset and img2dataset: rows by the names of their members, in the order of the file."""

import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PreferencePair, shards, tars
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.recognise import recognise
from tests.photos import encode, jpeg, photo

A, B, C, D = (jpeg(i) for i in range(4))
PNG = encode(photo(0), "PNG")


def tar(path: Path, members: list[tuple[str, bytes | str | dict]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members:
            data = json.dumps(data) if isinstance(data, dict) else data
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def pairs_of(path: Path) -> list[PreferencePair | Dropped]:
    source = recognise(path).source
    assert source is not None
    items = list(source.read())
    assert source.num_rows() == len(items)
    return items


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_members_of_one_name_are_one_row(tmp_path: Path, name: str, mode: str) -> None:
    tar(
        tmp_path / name,
        [
            ("./x/001.chosen.JPG", A),
            ("./x/001.rejected.png", PNG),
            ("./x/001.json", {"prompt": "a cat", "chosen_model": "m", "rejected_model": "n"}),
            ("x/000.rejected.jpg", B),
            ("x/000.prompt.txt", "\ufeffa dog\n"),
            ("x/000.chosen.webp", C),
            ("__MACOSX/x/._000.chosen.webp", b"fork"),
            ("README.md", "nothing"),
        ],
        mode,
    )
    first, second, third = pairs_of(tmp_path)
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.prompt, first.chosen, first.rejected, first.where) == ("a cat", A, PNG, f"{name} x/001")
    assert (first.chosen_origin, first.rejected_origin) == ({"model": "m"}, {"model": "n"})
    assert (second.prompt, second.chosen, second.rejected, second.where) == ("a dog", C, B, f"{name} x/000")
    assert third == Dropped(f"{name} README", "no prompt")


def test_the_side_of_an_image_may_stand_in_its_suffix(tmp_path: Path) -> None:
    """`000.jpg_0` and `000.jpg_1`, as Pick-a-Pic's rows become in a WebDataset."""
    rows = [(f"{i}.{name}", it) for i in (0, 1) for name, it in (("jpg_0", A), ("jpg_1", B), ("txt", f"p{i}"))]
    tar(tmp_path / "a.tar", [*rows, ("0.json", {"label_0": 1}), ("1.json", {"label_0": 0})])
    assert [(it.prompt, it.chosen) for it in pairs_of(tmp_path)] == [("p0", A), ("p1", B)]


def test_a_missing_partner_and_a_name_that_is_there_twice_cost_their_row(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | str | dict]] = []
    for key in ("a", "b", "c", "d"):
        members += [(f"{key}.chosen.jpg", A), (f"{key}.rejected.jpg", B), (f"{key}.txt", f"prompt {key}")]
    del members[4]  # b's rejected
    members += [("c.chosen.jpg", D), ("d.json", "{broken")]
    tar(tmp_path / "a.tar", members)
    good, no_partner, twice, fine = pairs_of(tmp_path / "a.tar")
    assert isinstance(good, PreferencePair) and isinstance(fine, PreferencePair)
    assert no_partner == Dropped("a.tar b", "rejected: no image")
    assert twice == Dropped("a.tar c", "chosen: the tar holds it twice")


def test_labelled_pairs_and_labelled_images_of_tars(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("0.image_0.jpg", A), ("0.image_1.jpg", B), ("0.txt", "x"), ("0.label.cls", "1")])
    [pair] = pairs_of(tmp_path)
    assert isinstance(pair, PreferencePair) and (pair.chosen, pair.prompt) == (A, "x")
    tar(tmp_path / "a.tar", [("0.jpg", A), ("0.json", {"prompt": "x", "label": False})])
    [single] = pairs_of(tmp_path)
    assert isinstance(single, PreferencePair) and (single.chosen, single.rejected) == (b"", A)


def test_img2dataset_tars_are_candidates_whatever_lies_beside_them(tmp_path: Path) -> None:
    """As img2dataset writes them: a table without images and a file of numbers beside every tar."""
    for shard in range(2):
        members: list[tuple[str, bytes | str | dict]] = []
        for number, data in enumerate((A, B)):
            key = f"{shard:05d}{number:04d}"
            members += [(f"{key}.jpg", data), (f"{key}.txt", f"caption {key}"), (f"{key}.json", {"caption": "c"})]
        tar(tmp_path / f"{shard:05d}.tar", members)
        pq.write_table(
            pa.table({"url": ["u"], "caption": ["c"], "status": ["success"]}), tmp_path / f"0000{shard}.parquet"
        )
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 2}')
    assert recognise(tmp_path).are_candidates
    units = find_units(tmp_path)
    assert [(unit.name, unit.num_images) for unit in units] == [("00000", 2), ("00001", 2)]
    found = [it for unit in units for it in unit.read()]
    assert [it.data for it in found] == [A, B, A, B]
    assert [it.prompt for it in found] == [f"caption {i:05d}{j:04d}" for i in range(2) for j in range(2)]


def test_a_tar_is_walked_once_and_images_are_read_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = A + b"\0" * (1 << 20)
    members: list[tuple[str, bytes | str | dict]] = []
    for i in range(40):
        members += [(f"{i:04d}.chosen.jpg", big), (f"{i:04d}.rejected.jpg", B), (f"{i:04d}.txt", f"p {i}")]
    path = tar(tmp_path / "a.tar", members)
    source = PairsData(path=path)
    walks = []
    next_header = tarfile.TarFile.next

    def counted(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        walks.append(1)
        return next_header(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    assert source.num_rows() == 40
    once = len(walks)
    tracemalloc.start()
    assert sum(isinstance(it, PreferencePair) for it in source.read()) == 40
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(walks) - once <= 20 and once <= 125, "opening reads a header or two"
    assert peak < 8 << 20
    os.utime(path, ns=(1, 1))
    assert source.num_rows() == 40 and len(walks) > 2 * once, "a changed file is walked again"


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "is empty, not a tar file"), (b"nonsense" * 200, "cannot read .* as tar")]
)
def test_a_damaged_tar_is_one_sentence(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ConfigError, match=why):
        tars.num_rows(tmp_path / "a.tar")


def test_a_tar_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("0.chosen.jpg", A), ("0.txt", "x"), ("0.rejected.jpg", B * 50)])
    path.write_bytes(path.read_bytes()[: -len(B) * 40])
    with pytest.raises(ConfigError, match=r"cannot read .*a\.tar as tar: .*; write or download it again"):
        list(PairsData(path=path).read())


def test_columns_are_those_of_the_first_rows_and_where_names_the_row(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", [("k.jpg", A), ("k.json", {"width": 3}), ("k.txt", "t")])
    assert shards.column_names(path) == ["__key__", "image", "text", "width"]
    assert list(shards.located_rows(path, ["image", "width"])) == [("a.tar k", {"image": A, "width": 3})]
    assert shards.read_columns(path, ["text"]) == [["t"]]
