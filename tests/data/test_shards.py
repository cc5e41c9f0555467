"""Shards: what is written comes back, here and in `datasets`; what cannot be read says which file."""

import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import PreferencePair, shards
from diffusion_dpo.data.pairs import pair_row
from tests.photos import encode, photo


def candidate(index: int) -> dict:
    image = shards.image_struct(encode(photo(index % 4), "PNG"))
    return {
        "uid": f"u{index}",
        "prompt_id": "p",
        "prompt": "a cat, ünïcode 猫",
        "index": index,
        "seed": 2**60 + index,
        "image": image,
        "references": [image] * (index % 3),
        "origin": "",
        "settings_hash": "h",
    }


def test_candidates_come_back_here_and_in_datasets(tmp_path):
    rows = [candidate(i) for i in range(5)]
    path = tmp_path / "images-00000.parquet"
    shards.write_shard(path, rows, shards.CANDIDATES)
    assert list(shards.read_rows(tmp_path)) == rows
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert [row["seed"] for row in loaded] == [row["seed"] for row in rows]
    for i, row in enumerate(loaded):
        assert np.array_equal(np.asarray(row["image"]), np.asarray(photo(i % 4)))
        assert len(row["references"]) == i % 3
        assert all(np.array_equal(np.asarray(it), np.asarray(photo(i % 4))) for it in row["references"])


def test_pairs_are_read_by_datasets(tmp_path):
    chosen, rejected = (encode(photo(i), "PNG") for i in (0, 1))
    pair = PreferencePair("id", "a cat", chosen, rejected, 0.9, "c", "r", {"clip": 0.5}, {"clip": 0.25}, margin=0.25)
    path = tmp_path / "pairs-00000.parquet"
    shards.write_shard(path, [pair_row(pair, seeds=[3, 4])], shards.PAIRS)
    row = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert np.array_equal(np.asarray(row["chosen"]), np.asarray(photo(0)))
    assert np.array_equal(np.asarray(row["rejected"]), np.asarray(photo(1)))
    assert (row["seeds"], row["margin"], row["chosen_scores"]) == ([3, 4], 0.25, '{"clip": 0.5}')


def test_row_groups_are_small_and_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "images-00000.parquet"
    shards.write_shard(path, [candidate(i) for i in range(35)], shards.CANDIDATES)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [16, 16, 3]
    before = path.read_bytes()
    with pytest.raises(pa.ArrowException):
        shards.write_shard(path, [candidate(0), candidate(1) | {"seed": "not a number"}], shards.CANDIDATES)
    assert path.read_bytes() == before
    assert [it.name for it in tmp_path.iterdir()] == [path.name]


def test_empty_shard(tmp_path):
    shards.write_shard(tmp_path / "scores-a-0.parquet", [], shards.SCORES)
    assert list(shards.read_rows(tmp_path)) == []


def test_files_come_in_order_and_hidden_ones_not_at_all(tmp_path):
    for name in ("b.parquet", "a/z.parquet", ".hidden.parquet", ".cache/c.parquet", "other.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"name": [name]}), path)
    assert [row["name"] for row in shards.read_rows(tmp_path)] == ["a/z.parquet", "b.parquet"]
    assert [row["name"] for row in shards.read_rows(tmp_path, pattern="z*.parquet")] == ["a/z.parquet"]


def test_missing_column_names_the_nearest(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"promt": ["x"], "chosen": [b"x"]}), path)
    with pytest.raises(
        ConfigError, match=r"a\.parquet has no column 'prompt'\. Did you mean 'promt'\? It has: promt, chosen"
    ):
        list(shards.read_rows(path, ["prompt"]))


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is empty, not a Parquet file"), (b"PAR1 rubbish", "cannot read"), (b"<html>404</html>", "cannot read")],
)
def test_unreadable_file_is_named(tmp_path, content, words):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"a\.parquet {words}|{words} .*a\.parquet"):
        list(shards.read_rows(path))


def test_damage_inside_a_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    shards.write_shard(path, [candidate(i) for i in range(40)], shards.CANDIDATES)
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"cannot read .*a\.parquet as Parquet"):
        list(shards.read_rows(path))


def test_no_such_folder_and_nothing_in_it(tmp_path):
    with pytest.raises(ConfigError, match="there is no file or folder"):
        list(shards.read_rows(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"holds no file \*\.parquet"):
        list(shards.read_rows(tmp_path))


def test_a_file_is_never_in_memory_as_a_whole(tmp_path):
    """Even where somebody else wrote it as one row group."""
    path = tmp_path / "big.parquet"
    noise = np.random.default_rng(0).bytes(1 << 20)
    pq.write_table(
        pa.table({"image": [noise] * 100}), path, row_group_size=100, compression="none", use_dictionary=False
    )
    start = pa.total_allocated_bytes()
    tracemalloc.start()
    most = max(pa.total_allocated_bytes() - start for _ in shards.read_rows(path, ["image"]))
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most + python_peak < 60 << 20
