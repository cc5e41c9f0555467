"""Images that were judged one by one: read, checked, looked at, and trained on by what needs no pairs."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo import train
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PreferencePair
from diffusion_dpo.data.collect import survey
from diffusion_dpo.data.labelled import LabelledData
from diffusion_dpo.data.rows import make_labelled_image, pair_id
from diffusion_dpo.inspect import run as inspect
from diffusion_dpo.settings import InspectConfig
from tests.photos import encode, folder_hash, jpeg, photo
from tests.runs import make_config, read_metrics

A, B, C = (jpeg(i) for i in range(3))
ROWS = [("a cat", A, True), ("a cat", B, False), ("a dog", C, True), ("a dog", A, False), ("a car", B, True)]


def parquet(path: Path, *rows: tuple) -> Path:
    """Write rows of (prompt, image, label)."""
    prompts, images, labels = zip(*rows, strict=True)
    structs = [{"bytes": image, "path": None} for image in images]
    pq.write_table(pa.table({"prompt": prompts, "image": structs, "label": labels}), path)
    return path


def folder(root: Path, *lines: dict | str) -> Path:
    """Write a metadata.jsonl, and files a.jpg to c.jpg."""
    root.mkdir(exist_ok=True)
    for name, data in zip("abc", (A, B, C), strict=True):
        (root / f"{name}.jpg").write_bytes(data)
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "metadata.jsonl").write_text("\n".join(text))
    return root


def line(label: object, *, prompt: str = "a cat", image: str = "a.jpg") -> dict:
    return {"prompt": prompt, "image": image, "label": label}


def drops(path: Path) -> dict[str, str]:
    """Where rows were dropped, and why."""
    return {drop.where: drop.reason for drop in survey(LabelledData(path=path)).dropped}


# --- one row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label, liked", [(True, True), (False, False), (1, True), (0, False), (1.0, True)])
def test_a_liked_image_is_chosen_and_a_disliked_one_rejected(label: object, liked: bool):
    image = make_labelled_image("row 3", "a cat", A, label, source="test")
    assert isinstance(image, PreferencePair)
    assert (image.chosen, image.rejected) == ((A, b"") if liked else (b"", A))
    assert (image.prompt, image.label_prob, image.source, image.where) == ("a cat", 1.0, "test", "row 3")
    assert image.pair_id == pair_id("a cat", image.chosen, image.rejected)


@pytest.mark.parametrize(
    "prompt, image, label, reason",
    [
        ("a cat", A, None, "no label"),
        *[("a cat", A, it, "the label is neither true nor false") for it in ("True", "false", "1", 2, -1, [1])],
        ("a cat", A, float("nan"), "the label is neither true nor false"),
        ("a cat", None, True, "image: no image"),
        ("a cat", b"", False, "image: no image"),
        ("a cat", {"bytes": None, "path": "a.jpg"}, True, "image: a path instead of image bytes"),
        ("", A, True, "no prompt"),
        (None, A, True, "no prompt"),
        (7, A, True, "the prompt is not text"),
    ],
)
def test_a_row_that_says_nothing_clear_is_dropped_with_the_reason(
    prompt: object, image: object, label: object, reason: str
):
    assert make_labelled_image("row 3", prompt, image, label, source="test") == Dropped("row 3", reason)


# --- two formats -----------------------------------------------------------------------------------------------------


def test_parquet_and_folder_hold_the_same_images(tmp_path: Path):
    names = {A: "a.jpg", B: "b.jpg", C: "c.jpg"}
    lines = [line(label, prompt=prompt, image=names[image]) for prompt, image, label in ROWS]
    sources = [
        LabelledData(path=folder(tmp_path / "folder", *lines)),
        LabelledData(path=parquet(tmp_path / "a.parquet", *ROWS)),
        LabelledData(path=parquet(tmp_path / "b.parquet", *((*row[:2], int(row[2])) for row in ROWS))),
    ]
    expected = [(prompt, *((image, b"") if label else (b"", image))) for prompt, image, label in ROWS]
    for source in sources:
        assert [(it.prompt, it.chosen, it.rejected) for it in source.read()] == expected
        assert source.num_rows() == 5
        found = survey(source)
        assert [(bool(it.chosen_uid), bool(it.rejected_uid)) for it in found.records] == [
            (label, not label) for *_, label in ROWS
        ]
        assert not any(it.is_pair for it in found.records)
        assert found.fingerprint == survey(sources[0]).fingerprint
        assert [(it.chosen, it.rejected) for it in found] == [row[1:] for row in expected]


def test_several_parquet_files_are_read_in_order_of_name(tmp_path: Path):
    for name, row in (("2", ROWS[1]), ("1", ROWS[0])):
        parquet(tmp_path / f"{name}.parquet", row)
    assert [it.where for it in LabelledData(path=tmp_path).read()] == ["1.parquet row 0", "2.parquet row 0"]
    assert LabelledData(path=tmp_path).num_rows() == 2


def test_broken_lines_of_a_folder_are_named_and_the_others_stay(tmp_path: Path):
    path = folder(
        tmp_path / "d",
        line(True),
        "",
        "{oops",
        line("True", image="b.jpg", prompt="a dog"),
        line(None, image="b.jpg"),
        line(True, image="d.jpg"),
        line(True, image="../a.jpg"),
        {"prompt": "a cat", "image": "b.jpg"},
        line(False, image="metadata.jsonl"),
        line(0, image="c.jpg"),
    )
    assert drops(path) == {
        "metadata.jsonl line 3": "not valid JSON",
        "metadata.jsonl line 5": "no label",
        "metadata.jsonl line 6: d.jpg": "image: no such file",
        "metadata.jsonl line 7: ../a.jpg": "image: the file name leaves the folder",
        "metadata.jsonl line 8": "no 'label'",
        "metadata.jsonl line 9": "rejected: not an image file",
    }
    assert LabelledData(path=path).num_rows() == 9
    assert [it.where for it in survey(LabelledData(path=path)).records] == [
        "metadata.jsonl line 1",
        "metadata.jsonl line 4",
        "metadata.jsonl line 10",
    ]


def test_broken_rows_of_parquet_are_named_and_the_others_stay(tmp_path: Path):
    rows = [("x", A, True), ("x", None, True), ("x", B[:600], False), (" ", B, True), ("x", C, None)]
    assert drops(parquet(tmp_path / "a.parquet", *rows)) == {
        "a.parquet row 1": "image: no image",
        "a.parquet row 2": "rejected: truncated image file",
        "a.parquet row 3": "no prompt",
        "a.parquet row 4": "no label",
    }


@pytest.mark.parametrize(
    "labels, liked",
    [
        (["1", "0", "1"], [True, False, True]),
        (["True", "false", "TRUE"], [True, False, True]),
        ([1, -1, -1], [True, False, False]),
        ([-1.0, 0.0, 1.0], [False, None, True]),
        (["-1", "-1", "1"], [False, False, True]),
        (["Good", "bad", "good"], [True, False, True]),
        (["yes", "No", "neither"], [True, False, None]),
        (["like", "dislike", None], [True, False]),
        (["thumbs up", "thumbs_down", "thumbs-up"], [True, False, True]),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_all_labels_together_say_which_images_are_liked(tmp_path: Path, labels: list, liked: list, as_text: bool):
    """-1 is not liked, and no broken row; a label that is neither costs nothing."""
    path = parquet(
        tmp_path / "a.parquet", *(("a cat", it, label) for it, label in zip((A, B, C), labels, strict=True))
    )
    if as_text:
        lines = ("" if it is None else it for it in labels)
        rows = "".join(f"a cat,{name}.jpg,{it}\n" for name, it in zip("abc", lines, strict=True))
        path = folder(tmp_path / "d")
        (path / "metadata.jsonl").unlink()
        (path / "metadata.csv").write_text(f"prompt,image,label\n{rows}")
    rows = list(LabelledData(path=path).read())
    assert [bool(it.chosen) for it in rows if isinstance(it, PreferencePair)] == [it for it in liked if it is not None]
    neither = [it.reason for it in rows if isinstance(it, Dropped) and not it.broken]
    assert neither == ["neither liked nor disliked"] * liked.count(None)


@pytest.mark.parametrize(
    "labels, shown", [([1, 2, 2], "2 x 2, 1 x 1"), ([3, 5, 1], "1 x 3"), (["cat", "dog", "cat"], "2 x cat, 1 x dog")]
)
def test_labels_that_do_not_say_what_is_liked_are_shown(tmp_path: Path, labels: list, shown: str):
    path = parquet(
        tmp_path / "a.parquet", *(("a cat", it, label) for it, label in zip((A, B, C), labels, strict=True))
    )
    with pytest.raises(ConfigError, match=f"the values of 'label' do not say which images are liked: {shown}"):
        list(LabelledData(path=path).read())


def test_a_column_that_is_not_there_is_an_error_with_the_nearest_name(tmp_path: Path):
    pq.write_table(pa.table({"prompt": ["x"], "image": [A], "labels": [True]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"has no column 'label'\. Did you mean 'labels'\?"):
        list(LabelledData(path=tmp_path).read())


# --- several rows ----------------------------------------------------------------------------------------------------


def test_an_image_that_is_liked_and_disliked_is_dropped_and_one_that_comes_again_counts_once(tmp_path: Path):
    png, bmp = (encode(photo(0), kind) for kind in ("PNG", "BMP"))
    rows = [
        ("x", png, True),
        ("x", bmp, False),
        ("y", png, True),
        ("y", bmp, True),
        ("x", B, False),
        ("z", png, False),
    ]
    found = survey(LabelledData(path=parquet(tmp_path / "a.parquet", *rows)))
    assert found.drops == {"labelled in both directions": 2, "the same pair again": 1}
    assert [(it.prompt, bool(it.chosen_uid)) for it in found.records] == [("y", True), ("x", False), ("z", False)]


# --- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "folder", "folder with a broken first line"])
def test_inspect_counts_them_draws_them_and_names_a_command_that_works(
    kind: str, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("diffusion_dpo.console._console.width", 300)
    (tmp_path / "d").mkdir()
    if kind == "parquet":
        parquet(tmp_path / "d" / "a.parquet", ("x", A, True), ("x", B, False), ("y", C, True), ("y", B, None))
    else:
        lines = [line(True), line(False, image="b.jpg"), line(True, image="c.jpg"), line(None)]
        folder(tmp_path / "d", *(lines if kind == "folder" else ["{oops", *lines[:3]]))
    before = folder_hash(tmp_path / "d")
    inspect(InspectConfig(path=tmp_path / "d", output_dir=tmp_path / "out"))
    assert (tmp_path / "out/contact-sheet.png").is_file()
    assert folder_hash(tmp_path / "d") == before
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("kind labelled images (data.type=labelled)", "rows 4", "liked images 2", "disliked images 1"):
        assert words in out
    assert "pairs 0" not in out
    assert "dropped: 1" in out
    command = out.split("next: diffusion-dpo train ")[1].split()
    assert command == ["data.type=labelled", f"data.path={tmp_path / 'd'}", "loss.type=kto", "max_broken_share=0.25"]


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "images.parquet"
    return parquet(path, *ROWS)


def settings(*overrides: str) -> list[str]:
    return ["data.type=labelled", "max_steps=2", "preview=null", *overrides]


@pytest.mark.parametrize("loss, num_examples", [("kto", 5), ("sft", 3), ("dco", 3)])
def test_objectives_over_images_train_on_them(
    tiny_sd: Path,
    labelled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loss: str,
    num_examples: int,
):
    train.run(make_config(tiny_sd, labelled, tmp_path, *settings(f"loss.type={loss}", "evaluation.share=0.5")))
    out = " ".join(capsys.readouterr().out.split())
    assert f"train: {loss} on {num_examples} " in out
    assert "no pairs are held out (too few, or single images)" in out
    metrics = read_metrics(tmp_path)
    assert [row["step"] for row in metrics] == [1, 2]
    assert ("errors/rejected" in metrics[0]) == (loss == "kto")
    assert (tmp_path / "adapter").is_dir()


def test_kto_starts_at_half_the_weight_of_each_image(tiny_sd: Path, labelled: Path, tmp_path: Path):
    weights = ["loss.desirable_weight=3", "loss.undesirable_weight=0.5"]
    whole = ["global_batch_size=5", "per_device_batch_size=5"]  # the three liked and the two disliked images
    train.run(make_config(tiny_sd, labelled, tmp_path, *settings("loss.type=kto", *weights, *whole)))
    first, second = read_metrics(tmp_path)
    assert first["loss"] == pytest.approx((3 * 3 + 2 * 0.5) / 2 / 5, abs=1e-5)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert second["rewards/chosen"] != 0 and second["rewards/rejected"] != 0


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_an_objective_over_pairs_refuses_them_in_one_sentence(
    tiny_sd: Path, labelled: Path, tmp_path: Path, loss: str
):
    config = make_config(tiny_sd, labelled, tmp_path, *settings(f"loss.type={loss}"))
    with pytest.raises(ConfigError, match=r"5 of 5 rows are single images .*loss\.type=kto, sft or dco") as error:
        train.run(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()
