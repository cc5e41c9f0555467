"""What a path holds is decided in one place, and every verb takes or refuses it in the same words."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo import train
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, dump, load
from diffusion_dpo.data.holding import look_into
from diffusion_dpo.data.recognise import AutoData, recognise, settle
from diffusion_dpo.data.two_folders import TwoFoldersData
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


# --- what is not pairs, or none that can be used ---------------------------------------------------------------------

OWN = {
    "train": "a training run",
    "compare": "a comparison",
    "label": "a labelling study",
    "demo": "the demo",
    "find-beta": "the probes of train --find-beta",
}


def own(folder: Path, made_by: str) -> Path:
    """Write the manifest of a folder that a verb made, with images in it that are no candidates."""
    images(folder, "previews/step-00000000/0.png", "x.png")
    (folder / "manifest.json").write_text(json.dumps({"made_by": made_by, "complete": True, "identity": {}}))
    return folder


@pytest.mark.parametrize("made_by", OWN)
def test_our_own_folders_are_named_and_never_trained_on_or_judged(made_by: str, tmp_path: Path, capsys) -> None:
    path = own(tmp_path / "own", made_by)
    assert main(["inspect", str(path), f"output_dir={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert f"holds {OWN[made_by]}" in out and "next: diffusion-dpo train" not in out
    assert not (tmp_path / "out").exists()
    for arguments in (["train", str(path)], ["score", f"path={path}"], ["pair", f"path={path}"]):
        assert main(arguments) == 2
        assert f"{path} holds {OWN[made_by]}, and " in capsys.readouterr().err


def test_the_previews_of_a_run_are_no_candidates(tmp_path: Path) -> None:
    found = recognise(own(tmp_path / "run", "train") / "previews")
    assert (found.kind, found.source, found.advice) == (
        "the previews of a training run",
        None,
        f"next: diffusion-dpo report path={tmp_path / 'run'}",
    )


def test_pairs_are_refused_where_images_are_judged_in_the_same_words(tmp_path: Path, capsys) -> None:
    path = LAYOUTS["pickapic"](tmp_path / "d").parent
    for verb in ("score", "pair"):
        assert main([verb, f"path={path}"]) == 2
        assert (
            f"{path} holds pairs in the columns of Pick-a-Pic, and images to be judged are" in capsys.readouterr().err
        )


def test_data_of_which_nothing_is_left_is_an_error_of_the_right_kind(tmp_path: Path, capsys) -> None:
    path = rows(tmp_path / "d" / "metadata.jsonl", PAIR, PAIR).parent
    assert main(["inspect", str(path), f"output_dir={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert "preference pairs (data.type=folder)" in captured.out and "no such file (metadata.jsonl line 1: a.jpg" in (
        " ".join(captured.out.replace("│", "").split())
    )
    assert "next:" not in captured.out
    assert f"nothing of {path} can be used" in captured.err


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"prompt": ["x"], "image": [b"no image"]}, "every row was dropped"),
        ({"prompt": [], "chosen": [], "rejected": []}, "it has no rows"),
    ],
)
def test_nothing_of_candidates_or_no_rows_at_all_is_an_error_too(
    columns: dict[str, list], why: str, tmp_path: Path, capsys
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert main(["inspect", str(tmp_path / "a.parquet"), f"output_dir={tmp_path / 'out'}"]) == 2
    captured = capsys.readouterr()
    assert "next:" not in captured.out and f"can be used: {why}" in captured.err


def test_inspect_names_the_share_that_training_would_refuse(tmp_path: Path, capsys) -> None:
    path = rows(images(tmp_path / "d", "a.jpg", "b.jpg") / "metadata.jsonl", PAIR, {**PAIR, "chosen": "c.jpg"}).parent
    assert main(["inspect", str(path), f"output_dir={tmp_path / 'out'}"]) == 0
    captured = capsys.readouterr()
    assert "training takes 5" in captured.out + captured.err
    assert captured.out.rstrip().endswith("max_broken_share=0.5")


def test_metadata_that_nobody_reads_is_named_with_its_columns(tmp_path: Path) -> None:
    path = rows(images(tmp_path, "a.jpg") / "metadata.jsonl", {"first": "a.jpg", "second": "a.jpg"}).parent
    with pytest.raises(ConfigError, match=r"metadata\.jsonl has the columns first, second"):
        recognise(path)


def test_links_to_folders_are_named(tmp_path: Path) -> None:
    images(tmp_path / "disk", "chosen/a.jpg", "rejected/a.jpg")
    (tmp_path / "d").mkdir()
    for side in ("chosen", "rejected"):
        (tmp_path / "d" / side).symlink_to(tmp_path / "disk" / side)
    with pytest.raises(ConfigError, match="links to folders, which are not followed: chosen, rejected; copy"):
        recognise(tmp_path / "d")


def test_settings_that_one_reader_has_name_it(tmp_path: Path) -> None:
    path = images(tmp_path, "up/a.jpg", "down/a.jpg")
    found = recognise(path, {"chosen_dir": "up", "rejected_dir": "down"})
    assert found.source is not None and found.source.type == "two_folders"
    assert recognise(path).are_candidates


def test_a_wrong_path_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom diffusion_dpo.cli import main\n"
        f"codes = [main(['train', {str(tmp_path / 'no')!r}]), main(['train', {str(tmp_path)!r}])]\n"
        "assert codes == [2, 2] and 'torch' not in sys.modules, codes"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == 2


def test_all_rows_are_looked_at_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(self: object, **settings: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("diffusion_dpo.models.stable_diffusion.StableDiffusion.load", load_model)
    path = rows(tmp_path / "d" / "metadata.jsonl", PAIR).parent
    with pytest.raises(ConfigError, match=r"100% of the 1 rows of the data \(folder\) are broken"):
        train.run(load(TrainConfig, None, [f"data.path={path}", f"output_dir={tmp_path / 'out'}"]))


def test_the_id_of_a_data_set_on_the_hub_is_answered_with_its_type() -> None:
    with pytest.raises(ConfigError, match=r"no file or folder owner/name; .* data\.type=hub"):
        recognise(Path("owner/name"))


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = LAYOUTS["two_folders"](tmp_path)
    (root / "chosen" / "locked").mkdir()
    scandir = os.scandir

    def locked(folder: str | Path) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", locked)
    for look in (recognise, lambda path: list(TwoFoldersData(path=path, type="two_folders").read())):
        with pytest.raises(ConfigError, match=r"cannot list .*chosen.locked: Permission denied"):
            look(root)
