"""What a path holds is decided in one place, and every verb takes or refuses it in the same words."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, dump, load
from diffusion_dpo.data.holding import look_into
from diffusion_dpo.data.recognise import AutoData, recognise, settle
from diffusion_dpo.settings import InspectConfig, LabelConfig, TrainConfig
from tests.photos import jpeg

A, B = jpeg(0), jpeg(1)


def images(folder: Path, *names: str) -> Path:
    """Write images, the first of them A, the others B."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(A if name == names[0] else B)
    return folder


def rows(file: Path, *rows: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def parquet(file: Path, **columns: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), file)
    return file


PAIR = {"prompt": "x", "chosen": "a.jpg", "rejected": "b.jpg"}
LAYOUTS = {
    "folder": lambda root: rows(images(root, "a.jpg", "b.jpg") / "metadata.jsonl", PAIR),
    "labelled": lambda root: rows(images(root, "a.jpg") / "metadata.jsonl", {"prompt": "x", "image": "a", "label": 1}),
    "two_folders": lambda root: images(root, "chosen/a.jpg", "rejected/a.jpg"),
    "pairs": lambda root: parquet(root / "p.parquet", prompt="x", chosen=A, rejected=B),
    "pickapic": lambda root: parquet(root / "p.parquet", caption="x", jpg_0=A, jpg_1=B, label_0=1.0),
    "hpdv3": lambda root: rows(
        images(root, "a.jpg", "b.jpg") / "rows.jsonl", {"prompt": "", "path1": "", "path2": ""}
    ),
    "ranked": lambda root: parquet(root / "p.parquet", prompt="x", image=A, rank=1),
    "invoke": lambda root: rows(
        root / "rows.jsonl", {"prompt": "x", "image_0": "", "image_1": "", "prefer_0": True, "prefer_1": False}
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_is_found_by_its_names_and_columns_and_recorded(kind: str, tmp_path: Path) -> None:
    LAYOUTS[kind](tmp_path / "d")
    config = load(TrainConfig, None, [f"data.path={tmp_path / 'd'}"])
    assert isinstance(config.data, AutoData)
    settled = settle(config)
    assert settled.data.type == kind
    (tmp_path / "config.yaml").write_text(dump(settled))
    assert load(TrainConfig, tmp_path / "config.yaml") == settled
    (tmp_path / "open.yaml").write_text(dump(config))
    assert load(TrainConfig, tmp_path / "open.yaml") == config


def test_settings_beside_the_path_reach_the_reader_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    LAYOUTS["pickapic"](path)
    kept = settle(load(TrainConfig, None, [f"data.path={path}", "data.ties=keep"]))
    assert kept.data.ties == "keep"
    with pytest.raises(ConfigError, match=r"pickapic.*\n.*images_dir: there is no such setting; known here: .*ties"):
        settle(load(TrainConfig, None, [f"data.path={path}", "data.images_dir=x"]))
    with pytest.raises(ConfigError, match=r"data\.tie: there is no such setting\. Did you mean data\.ties\?"):
        load(TrainConfig, None, [f"data.path={path}", "data.tie=keep"])
    named = load(TrainConfig, None, [f"data.path={path}", "data.type=pickapic"])
    assert (named.data.type, named.data.path) == ("pickapic", path)


@pytest.mark.parametrize("config", [InspectConfig, LabelConfig])
def test_settings_of_data_go_with_the_path_of_a_verb_that_has_one(config: type, tmp_path: Path) -> None:
    assert load(config, None, [f"path={tmp_path}", "data.ties=keep"]).data.model_extra == {"ties": "keep"}


def test_what_is_no_pairs_is_named_in_the_same_words_by_every_verb(tmp_path: Path, capsys) -> None:
    path = images(tmp_path / "gallery", "a.jpg", "b.jpg")
    assert recognise(path).are_candidates
    for arguments in (["train", str(path)], ["train", "--dry-run", str(path)], ["train", "--find-beta", str(path)]):
        assert main(arguments) == 2
        assert f"{path} holds candidates, and preference pairs are needed here" in capsys.readouterr().err


def test_a_walk_sees_the_top_first_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, *(f"{i:02d}/{j}.jpg" for i in range(5) for j in range(5)), "metadata.jsonl", ".hidden/a.jpg")
    assert len(look_into(tmp_path).files) == 26
    monkeypatch.setattr("diffusion_dpo.data.holding._MOST_ENTRIES", 7)
    seen = [str(file) for file in look_into(tmp_path).files]
    assert "metadata.jsonl" in seen
    assert len(seen) == 7
