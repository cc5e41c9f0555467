"""The index: what a survey found, read back from disk without looking at the data again, and never when it changed."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_dpo.data import PairSource
from diffusion_dpo.data.collect import collect, survey
from diffusion_dpo.data.folder import FolderData
from diffusion_dpo.data.hub import HubData
from diffusion_dpo.data.index import Collected
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.prompts import prompt_hash, prompt_key
from diffusion_dpo.data.shards import PAIRS, located_rows, write_shard


@pytest.fixture
def source(scored_pairs: Path, tmp_path: Path) -> PairsData:
    """Ten pairs with scores, of which the third is broken, and the first again."""
    rows = [row for _, row in located_rows(scored_pairs / "pairs-00000.parquet")]
    rows[2] = rows[2] | {"chosen": {"bytes": b"<html>", "path": None}}
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "pairs-00000.parquet", [*rows, rows[0]], PAIRS)
    return PairsData(path=tmp_path / "pairs")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[PairSource]:
    """Every reading of pairs, as it happens."""
    seen: list[PairSource] = []
    real = PairsData.read

    def read(self: PairsData):
        seen.append(self)
        return real(self)

    monkeypatch.setattr(PairsData, "read", read)
    return seen


def start(source: PairSource, tmp_path: Path) -> Collected:
    """What a training run does with its data."""
    found = collect(source, max_broken_share=0.5, index_dir=tmp_path / "index")
    found.save(tmp_path / "index")
    return found


def everything(found: Collected) -> list:
    arrays = (
        found.prompt_codes,
        found.prompt_keys,
        found.is_pair,
        found.sizes_px("chosen"),
        found.sizes_px("rejected"),
    )
    facts = [found.dropped, found.fingerprint, found.has_masks, list(found.prompts)]
    return [list(found.records), *facts, *(array.tolist() for array in arrays)]


def test_a_second_start_reads_nothing_and_finds_the_same(source: PairsData, tmp_path: Path, reads: list):
    first = collect(source, max_broken_share=0.5, index_dir=tmp_path / "index")
    assert not (tmp_path / "index").exists()  # it may belong to somebody else
    first.save(tmp_path / "index")
    del reads[:]
    second = start(source, tmp_path)
    assert reads == []
    assert everything(first) == everything(second)
    assert len(second) == 9
    assert second.drops == {"chosen: a web page or SVG, not an image file": 1, "the same pair again": 1}
    assert [pair.pair_id for pair in second] == [record.pair_id for record in second.records]
    assert [path.name for path in (tmp_path / "index").iterdir()] == [second.folder.name]


def test_what_is_vectorised_says_what_the_records_say(source: PairsData):
    found = survey(source)
    records = list(found.records)
    assert [found.prompts[code] for code in found.prompt_codes] == [it.prompt for it in records]
    assert list(found.prompts) == list(dict.fromkeys(it.prompt for it in records))
    assert found.prompt_keys.tolist() == [prompt_key(text) for text in found.prompts]
    assert [f"{key >> 16:012x}" for key in found.prompt_keys.tolist()] == [prompt_hash(text) for text in found.prompts]
    assert found.sizes_px("chosen").tolist() == [list(it.chosen_size_px) for it in records]
    assert found.is_pair.tolist() == [it.is_pair for it in records]
    assert records[-1] == found.records[-1] == found.records[len(found) - 1]
    assert records[3:5] == found.records[3:5]
    assert records[0].chosen_scores == {"shade": 1.0}
    with pytest.raises(IndexError):
        found.records[len(found)]


def test_a_prompt_with_outer_spaces_has_the_same_key():
    assert prompt_key(" a cat\n") == prompt_key("a cat") != prompt_key("a cats")


def add_a_row(source: PairsData) -> None:
    file = source.path / "pairs-00000.parquet"
    write_shard(file, [row for _, row in located_rows(file)][:4], PAIRS)


def touch(source: PairsData) -> None:
    os.utime(source.path / "pairs-00000.parquet", ns=(1, 1))


def add_a_file(source: PairsData) -> None:
    file = source.path / "pairs-00000.parquet"
    (source.path / "pairs-00001.parquet").write_bytes(file.read_bytes())


@pytest.mark.parametrize("change", [add_a_row, touch, add_a_file])
def test_data_that_changed_is_looked_at_again(
    source: PairsData, tmp_path: Path, reads: list, capsys: pytest.CaptureFixture[str], change: Callable
):
    start(source, tmp_path)
    change(source)
    expected = everything(survey(source))
    capsys.readouterr()
    del reads[:]
    assert everything(start(source, tmp_path)) == expected
    assert reads
    assert "the data changed since it was indexed" in capsys.readouterr().out
    del reads[:]
    start(source, tmp_path)
    assert reads == []


def cut(folder: Path) -> None:
    (folder / "pairs.arrow").write_bytes((folder / "pairs.arrow").read_bytes()[:-100])


def flip(folder: Path) -> None:
    data = bytearray((folder / "prompts.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "prompts.arrow").write_bytes(data)


def lose(folder: Path) -> None:
    (folder / "dropped.arrow").unlink()


def scribble(folder: Path) -> None:
    (folder / "index.json").write_text('{"crc32": 3}')


@pytest.mark.parametrize("damage", [cut, flip, lose, scribble])
def test_a_damaged_index_is_named_and_made_again(
    source: PairsData, tmp_path: Path, reads: list, capsys: pytest.CaptureFixture[str], damage: Callable
):
    first = start(source, tmp_path)
    [folder] = (tmp_path / "index").iterdir()
    damage(folder)
    capsys.readouterr()
    assert everything(start(source, tmp_path)) == everything(first)
    out = capsys.readouterr().out
    assert f"the index of the data in {folder} is damaged" in out.replace("\n", " ")
    del reads[:]
    start(source, tmp_path)
    assert reads == []


def test_other_settings_of_a_source_have_another_index(source: PairsData, tmp_path: Path, reads: list):
    start(source, tmp_path)
    hub = HubData(path=str(source.path), max_rows=3)
    assert len(start(hub, tmp_path)) == 2
    assert len(start(hub.model_copy(update={"max_rows": 2}), tmp_path)) == 2
    assert len(list((tmp_path / "index").iterdir())) == 3
    del reads[:]
    assert len(start(source, tmp_path)) == 9
    assert reads == []


def test_a_source_that_cannot_name_its_state_is_always_looked_at(
    source: PairsData, tmp_path: Path, reads: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(PairsData, "stamp", PairSource.stamp)
    for _ in range(2):
        del reads[:]
        start(source, tmp_path)
        assert reads
    assert not (tmp_path / "index").exists()


def test_a_failed_save_leaves_nothing(source: PairsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(path: Path) -> None:
        raise OSError("no space left on device")

    found = survey(source)
    with monkeypatch.context() as patch:
        patch.setattr("diffusion_dpo.files.fsync_file", fail)
        with pytest.raises(OSError, match="no space"):
            found.save(tmp_path / "index")
    assert list((tmp_path / "index").iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "labelled"])
def test_the_state_of_a_folder_is_that_of_every_file_it_names(tmp_path: Path, kind: str):
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.png").write_bytes(b"never read")
    line = {"prompt": "x", "chosen": "a.png", "rejected": "b.png"}
    if kind == "labelled":
        line = {"prompt": "x", "image": "a.png", "label": True}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line) + '\n{"chosen": "\\ud800", "image": 3}\nnot json\n')
    source = (FolderData if kind == "folder" else LabelledData)(path=tmp_path)
    stamps = [source.stamp(), source.stamp()]
    (tmp_path / "other.png").unlink()
    assert stamps == [source.stamp()] * 2
    os.utime(tmp_path / "a.png", ns=(1, 1))
    stamps.append(source.stamp())
    (tmp_path / "a.png").unlink()
    stamps.append(source.stamp())
    with (tmp_path / "metadata.jsonl").open("a") as file:
        file.write("\n")
    stamps.append(source.stamp())
    assert len(set(stamps[1:])) == 4
