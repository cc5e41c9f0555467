"""Arrow files, as `datasets.save_to_disk` and others write them, are read as Parquet is."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PreferencePair, shards
from diffusion_dpo.data.candidates import find_units
from diffusion_dpo.data.collect import collect
from diffusion_dpo.data.hub import HubData
from diffusion_dpo.data.recognise import recognise
from tests.photos import encode, jpeg, photo

A, B, C, D = (jpeg(i) for i in range(4))


def data_set(rows: int = 3, start: int = 0) -> datasets.Dataset:
    """Pairs with images as `datasets` keeps them."""
    images = [encode(photo(i % 4, (40 + start + i, 40)), "JPEG") for i in range(rows)]
    columns = {"prompt": [f"p{i}" for i in range(rows)], "chosen": images, "rejected": [D] * rows}
    features = {"prompt": datasets.Value("string"), "chosen": datasets.Image(), "rejected": datasets.Image()}
    return datasets.Dataset.from_dict(
        {
            name: [{"bytes": it, "path": None} if isinstance(it, bytes) else it for it in column]
            for name, column in columns.items()
        },
        features=datasets.Features(features),
    )


def test_a_saved_data_set_is_read_from_its_own_files_alone(tmp_path: Path) -> None:
    data = data_set(40)
    data.save_to_disk(tmp_path / "ds", num_shards=2)
    (tmp_path / "ds" / "cache-0123.arrow").write_bytes((tmp_path / "ds" / "data-00000-of-00002.arrow").read_bytes())
    source = recognise(tmp_path / "ds").source
    assert source is not None
    items = list(source.read())
    assert source.num_rows() == len(items) == 40
    assert [it.prompt for it in items if isinstance(it, PreferencePair)] == data["prompt"][:]
    assert len(collect(source, max_broken_share=0)) == 40
    assert isinstance(items[20], PreferencePair) and items[20].where == "data-00001-of-00002.arrow row 0"
    again = HubData(path=str(tmp_path / "ds"))
    assert [it.pair_id for it in again.read() if isinstance(it, PreferencePair)] == [
        it.pair_id for it in items if isinstance(it, PreferencePair)
    ]


def test_of_splits_the_train_split_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": data_set(3), "test": data_set(2, start=7)}).save_to_disk(tmp_path / "ds")
    source = recognise(tmp_path / "ds").source
    assert source is not None and len(list(source.read())) == 3
    source = recognise(tmp_path / "ds", {"split": "test"}).source
    assert source is not None and len(list(source.read())) == 2


def test_image_files_are_embedded_or_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(A)
    columns = {"prompt": ["x"], "chosen": [str(tmp_path / "a.jpg")], "rejected": [{"bytes": B, "path": None}]}
    data = datasets.Dataset.from_dict({"prompt": ["x"], "chosen": columns["chosen"]}).cast_column(
        "chosen", datasets.Image()
    )
    data.add_column("rejected", [B]).save_to_disk(tmp_path / "ds")
    source = recognise(tmp_path / "ds").source
    assert source is not None
    [pair] = source.read()
    assert isinstance(pair, PreferencePair) and pair.chosen == A, "save_to_disk puts the bytes inside"


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_every_form_of_arrow(tmp_path: Path, kind: str) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["x", "y"]).dictionary_encode(),
            "chosen": pa.array([A, B], pa.large_binary()),
            "rejected": pa.array([[B, C], [D]], pa.list_view(pa.binary())),
            "mask": pa.nulls(2),
        }
    )
    path = tmp_path / f"a.{'feather' if kind == 'feather' else 'arrow'}"
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table)
    source = recognise(tmp_path).source
    assert source is not None
    items = list(source.read())
    assert [it.rejected for it in items if isinstance(it, PreferencePair)] == [B, C, D]
    assert source.num_rows() == 3


def test_candidates_are_found_in_a_saved_data_set(tmp_path: Path) -> None:
    data_set(3).remove_columns("rejected").rename_columns({"chosen": "image", "prompt": "text"}).save_to_disk(
        tmp_path / "ds"
    )
    assert recognise(tmp_path / "ds").are_candidates
    [unit] = find_units(tmp_path / "ds")
    assert [it.prompt for it in unit.read()] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("data", "why"), [(b"", "is empty, not an Arrow file"), (b"nonsense" * 9, "cannot read .* as Arrow")]
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "a.arrow").write_bytes(data)
    with pytest.raises(ConfigError, match=why):
        shards.column_names(tmp_path / "a.arrow")
    with pytest.raises(ConfigError, match=why):
        shards.num_rows(tmp_path / "a.arrow")


def test_paths_in_place_of_bytes_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(A)
    image = {"bytes": None, "path": str(tmp_path / "a.jpg")}
    table = pa.table({"prompt": ["x"], "chosen": [image], "rejected": [B]})
    (tmp_path / "d").mkdir()
    with pa.ipc.new_stream(str(tmp_path / "d" / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = recognise(tmp_path / "d").source
    assert source is not None
    [item] = source.read()
    assert isinstance(item, Dropped) and item.reason == "chosen: a path instead of image bytes"
