"""Any table of preferences by its columns: which image is better, told by labels, votes, shares or scores."""

import base64
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_dpo import inspect
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.hub import HubData
from diffusion_dpo.data.layout import describe_nearest, find_settings
from diffusion_dpo.data.recognise import recognise
from diffusion_dpo.settings import InspectConfig
from tests.photos import encode, jpeg, photo

A, B, C, D = (jpeg(i) for i in range(4))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(path: Path, **columns: Any) -> Path:
    """Write Parquet with an image_0 (A), an image_1 (B) and a prompt a row, beside the columns."""
    rows = len(next(iter(columns.values())))
    two = {"image_0": [{"bytes": A, "path": "a.jpg"}] * rows, "image_1": [{"bytes": B, "path": None}] * rows}
    images = {name: pa.array(two[name], IMAGE) for name in two if name not in columns}
    prompts = {} if "prompt" in columns else {"prompt": [f"prompt {i}" for i in range(rows)]}
    pq.write_table(pa.table(prompts | images | columns), path / "train.parquet")
    return path


def found(path: Path, **settings: Any) -> PairSource:
    source = recognise(path, settings).source
    assert source is not None
    return source


def outcomes(path: Path, **settings: Any) -> list[float | str]:
    """Of every row the probability that A is better, or why it was dropped."""
    source = found(path, **settings)
    items = list(source.read())
    assert source.num_rows() == len(items)
    return [
        it.reason if isinstance(it, Dropped) else it.label_prob if it.chosen == A else 1 - it.label_prob
        for it in items
    ]


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False, None, True], [1, 0, "no label", 1]),
        (["1", "0", "0.5", "1"], [1, 0, "tie", 1]),
        (["true", "False", "TRUE"], [1, 0, 1]),
        ([1, 2, 2, 1], [1, 0, 0, 1]),
        (["1", "2", "tie", "2"], [1, 0, "tie", 0]),
        ([-1, 1, 0, 1], [0, 1, "tie", 1]),
        ([1.0, float("nan"), 0.25], [1, "no label", 0.25]),
        ([Decimal("1.00"), Decimal("0.00"), None], [1, 0, "no label"]),
        (pa.array(["left", "right", "left"]).dictionary_encode(), [1, 0, 1]),
        (pa.array(["first", "Second", "draw"], pa.large_string()), [1, 0, "tie"]),
        (["A", "b", " a "], [1, 0, 1]),
        (["image_0", "image_1", "image_0"], [1, 0, 1]),
        (["image_1", "image_2", "image_1"], [1, 0, 1]),
        (["Image A", "image b", "both"], [1, 0, "tie"]),
        (["left image", "the right", "neither"], [1, 0, "tie"]),
        (pa.array([1, 0, 1], pa.int8()), [1, 0, 1]),
        (pa.array([1, 0, 1], pa.uint64()), [1, 0, 1]),
        (pa.array([1, 0.5, 0], pa.float16()), [1, "tie", 0]),
        ([1, 1, 1], [1, 1, 1]),
        (pa.nulls(2), ["no label", "no label"]),
    ],
    ids=str,
)
def test_a_label_is_read_as_what_all_values_together_say(tmp_path: Path, values: Any, expected: list) -> None:
    assert outcomes(table(tmp_path, label=values)) == expected


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 1, 2, 1], "2 x 1, 1 x 0, 1 x 2"),
        (["good", "bad", "good"], "2 x good, 1 x bad"),
        ([2, 2], "2 x 2, and one value alone does not say what it counts from"),
        ([5, 7, 1], "1 x 5, 1 x 7, 1 x 1"),
        (["image_1"] * 3, "3 x image_1, and one value alone does not say what it counts from"),
    ],
    ids=str,
)
def test_labels_that_do_not_say_which_is_better_are_shown_before_an_image_is_read(
    tmp_path: Path, values: list, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path, label=values)
    monkeypatch.setattr("diffusion_dpo.data.rows.image_bytes", lambda value: pytest.fail("an image was read"))
    with pytest.raises(ConfigError, match="values of 'label' do not say which image is better: ") as error:
        next(found(path).read())
    assert f"{shown}." in str(error.value) and "left and right" in str(error.value)


def test_one_strange_label_costs_its_row_alone(tmp_path: Path) -> None:
    assert outcomes(table(tmp_path, label=[1, 0] * 15 + [7])) == [1, 0] * 15 + ["a label unlike the others"]
    assert outcomes(table(tmp_path, label=["left", "right"] * 15 + ["?"]))[-1] == "a label unlike the others"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 1, 1], [1, 0, 0]), ([1, 2, 2], [1, 0, 0]), (["0", "1", "tie"], [1, 0, "tie"]), ([0, 0], [1, 1])],
)
def test_the_index_of_the_winner_is_asked_for_or_known_by_its_name(
    tmp_path: Path, values: list, expected: list
) -> None:
    assert outcomes(table(tmp_path, winner=values)) == expected
    assert outcomes(table(tmp_path, label=values), label_meaning="winner_index") == expected


def test_what_a_label_was_taken_for_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = found(table(tmp_path, label=[1, 1, 0]))
    assert list(source.read()) == list(source.read())
    out = capsys.readouterr().out
    assert out.count("label: read as the probability that the first image is better; image_0 is better in 2 rows") == 1
    assert "where 0 stands for image_0, set data.label_meaning=winner_index" in out
    list(found(table(tmp_path, label=[1, 1, 1])).read())
    assert "label is 1 in every row, so nothing shows that it means what is taken here" in capsys.readouterr().out


def test_a_winner_may_be_named_by_its_id_or_its_model(tmp_path: Path) -> None:
    names = {"model_0": ["x", "y", "x"], "model_1": ["y", "x", "x"]}
    path = table(tmp_path, winner=["x", "x", "x"], **names)
    with pytest.raises(ConfigError, match="3 x x"):  # of the third row both images are of x
        outcomes(path)
    path = table(tmp_path, winner=["x", "x", "tie"], **names)
    assert outcomes(path) == [1, 0, "tie"]
    ids = {"image_0_uid": ["p", "q"], "image_1_uid": ["r", "s"]}
    assert outcomes(table(tmp_path, best_image_uid=["r", "q"], **ids)) == [0, 1]


# --- votes, shares, scores -------------------------------------------------------------------------------------------


def rapidata(path: Path, **columns: Any) -> Path:
    rows = len(next(iter(columns.values())))
    images = {f"image{i}": pa.array([{"bytes": it, "path": None}] * rows, IMAGE) for i, it in ((1, A), (2, B))}
    models = {"model1": ["flux"] * rows, "model2": ["sd3"] * rows}
    paths = {"image1_path": ["flux/1.jpg"] * rows, "image2_path": ["sd3/1.jpg"] * rows}
    pq.write_table(
        pa.table({"prompt": [f"p{i}" for i in range(rows)], **images, **models, **paths, **columns}),
        path / "train_0001-00000-of-00001.parquet",
    )
    return path


def test_rapidatas_votes_are_soft_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = rapidata(tmp_path, votes_image1=[26, 1, 0, 13, 0, None], votes_image2=[0, 0, 3, 13, 0, 1])
    assert outcomes(path) == [27 / 28, 2 / 3, pytest.approx(1 / 5), "tie", "no votes", "no label"]
    first = next(found(path).read())
    assert isinstance(first, PreferencePair)
    assert first.chosen_origin == {"position": 0, "model": "flux"}
    assert first.rejected_origin == {"position": 1, "model": "sd3"}
    assert "(votes for its better image + 1) / (all its votes + 2)" in capsys.readouterr().out


def test_rapidatas_weighted_shares_are_smoothed_by_the_votes_behind_them(tmp_path: Path) -> None:
    votes = [json.dumps([{"votedFor": "x"}] * 4), json.dumps({"votes": [{}] * 8}), None, "?"]
    path = rapidata(
        tmp_path,
        weighted_results_image1_coherence=pa.array([0.0, 0.0, 0.0, 0.0], pa.float32()),
        weighted_results_image2_coherence=pa.array([1.0, 1.0, 1.0, 1.0], pa.float32()),
        weighted_results_image1_preference=pa.array([1.0, 0.25, 1.0, 0.5], pa.float32()),
        weighted_results_image2_preference=pa.array([0.0, 0.75, 0.0, 0.5], pa.float32()),
        detailed_results_preference=votes,
    )
    assert outcomes(path) == pytest.approx([5 / 6, 3 / 10, 11 / 12, "tie"])
    assert outcomes(path, share_votes=2)[2] == 3 / 4


def test_the_higher_score_wins_by_the_difference(tmp_path: Path) -> None:
    path = table(tmp_path, score_0=[3.0, 1.0, 2.0, None], score_1=[1.0, 7.5, 2.0, 1.0])
    source = found(path)
    first, second, third, fourth = source.read()
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.chosen, first.margin, first.label_prob) == (A, 2.0, 1.0)
    assert (second.chosen, second.margin, second.chosen_scores) == (B, 6.5, {"score": 7.5})
    assert second.rejected_scores == {"score": 1.0} and second.chosen_origin == {"position": 1}
    assert third == Dropped("train.parquet row 2", "tie", broken=False)
    assert fourth == Dropped("train.parquet row 3", "a score is missing or not a number")
    assert source.labelled_by() == ("score",)
    kept = list(found(path, ties="keep").read())[2]
    assert isinstance(kept, PreferencePair) and (kept.label_prob, kept.margin) == (0.5, None)


def test_scores_and_models_beside_chosen_and_rejected_are_kept_and_decide_nothing(tmp_path: Path) -> None:
    columns = {
        "caption": ["x", "y"],
        "chosen": [A, B],
        "rejected": [B, C],
        "chosen_model": ["m", None],
        "rejected_model": ["n", "n"],
        "chosen_score": [2, 1],
        "rejected_score": [1, 4],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = found(tmp_path)
    first, second = source.read()
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.margin, first.chosen_origin, first.rejected_origin) == (1.0, {"model": "m"}, {"model": "n"})
    assert (second.chosen, second.margin, second.chosen_scores) == (B, None, {"score": 1.0})
    assert second.chosen_origin == {} and source.labelled_by() == ()


# --- values ----------------------------------------------------------------------------------------------------------

_PNG = encode(photo(0), "PNG")


@pytest.mark.parametrize(
    "value",
    [
        base64.b64encode(_PNG).decode(),
        base64.encodebytes(_PNG).decode(),
        base64.urlsafe_b64encode(_PNG).decode().rstrip("="),
        "data:image/png;base64," + base64.b64encode(_PNG).decode(),
        base64.b64encode(_PNG),
        {"bytes": _PNG, "path": "/etc/passwd"},
        list(_PNG),
    ],
    ids=["plain", "lines", "url-safe", "data-uri", "bytes", "struct", "numbers"],
)
def test_an_image_in_whatever_dress(tmp_path: Path, value: Any) -> None:
    pq.write_table(pa.table({"prompt": ["x"], "chosen": [value], "rejected": [B]}), tmp_path / "a.parquet")
    [pair] = found(tmp_path).read()
    assert isinstance(pair, PreferencePair) and pair.chosen == _PNG


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("https://example.com/a.png", "a URL instead of image bytes"),
        ("images/a.png", "a path instead of image bytes"),
        ("x" * 5000, "text instead of image bytes, and no base64 of an image"),
        ("data:image/png,abc", "text instead of image bytes, and no base64 of an image"),
        (None, "no image"),
        ("", "no image"),
        ([], "no image"),
    ],
)
def test_what_is_no_image_is_said(tmp_path: Path, value: Any, reason: str) -> None:
    pq.write_table(pa.table({"prompt": ["x"], "chosen": [B], "rejected": [value]}), tmp_path / "a.parquet")
    assert [it.reason for it in found(tmp_path).read() if isinstance(it, Dropped)] == [f"rejected: {reason}"]


def test_a_chat_is_its_users_message(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": "a cat"}],
        [{"role": "system", "content": "draw"}, {"role": "user", "content": "a dog"}],
        [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
        [{"role": "system", "content": "draw"}],
        [],
    ]
    columns = {"prompt": chats, "chosen": [A] * 5, "rejected": [B] * 5}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    said = [it.prompt if isinstance(it, PreferencePair) else it.reason for it in found(tmp_path).read()]
    assert said[:2] == ["a cat", "a dog"]
    assert said[2:] == ["prompt: a chat without a message of the user, or with several"] * 2 + [
        "the prompt is not text"
    ]
    parts = [[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "text": None}]}]]
    text = [json.dumps([{"role": "user", "content": "as text"}])]
    for prompt, expected in ((parts, "a"), (text, "as text")):
        pq.write_table(pa.table({"prompt": prompt, "chosen": [A], "rejected": [B]}), tmp_path / "a.parquet")
        [pair] = found(tmp_path).read()
        assert isinstance(pair, PreferencePair) and pair.prompt == expected


@pytest.mark.parametrize("extra", [{}, {"chosen_model": ["m", "m"], "rejected_model": ["n", "n"]}], ids=str)
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list], ids=["list", "large_list"])
def test_a_list_of_images_makes_a_pair_of_each(tmp_path: Path, kind: Any, extra: dict) -> None:
    rejected = pa.array([[{"bytes": B, "path": None}, {"bytes": C, "path": None}], []], pa.list_(IMAGE))
    columns = {"prompt": ["x", "y"], "chosen": [A, A], "rejected": rejected, **extra}
    columns["rejected"] = rejected.cast(kind(IMAGE))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = found(tmp_path)
    items = list(source.read())
    assert source.num_rows() == len(items) == 3
    assert [it.rejected for it in items[:2] if isinstance(it, PreferencePair)] == [B, C]
    assert [it.where for it in items] == [
        "a.parquet row 0, rejected 0",
        "a.parquet row 0, rejected 1",
        "a.parquet row 1",
    ]
    assert isinstance(items[2], Dropped) and items[2].reason == "rejected: no image"


# --- which columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ("prompt image_a image_b label", {"image_0_column": "image_a", "label_column": "label"}),
        ("caption jpg_0 jpg_1 label_0 label_1", {"prompt_column": "caption", "label_column": "label_0"}),
        ("text imageLeft imageRight winner", {"image_0_column": "imageLeft", "label_meaning": "winner_index"}),
        ("prompt left right preferred", {"image_1_column": "right", "label_column": "preferred"}),
        ("prompt img_1 img_2 num_votes_1 num_votes_2", {"votes_columns": ("num_votes_1", "num_votes_2")}),
        ("prompt image_0 image_1 reward_0 reward_1", {"score_columns": ("reward_0", "reward_1")}),
        ("prompt image_0 image_1 score_image_0 score_image_1", {"score_columns": ("score_image_0", "score_image_1")}),
        ("prompt win_image lose_image win_score lose_score", {"chosen_column": "win_image"}),
        ("prompt image_w image_l", {"chosen_column": "image_w", "rejected_column": "image_l"}),
        ("caption preferred_image dispreferred_image", {"chosen_column": "preferred_image"}),
        ("prompt image_0 image_1 label model_a model_b", {"label_column": "label"}),
        ("prompt image_0 image_1", None),
        ("prompt image_0 image_1 image_2 label", None),
        ("image_0 image_1 label", None),
        ("prompt image label", None),
        ("prompt chosen rejected_by", None),
    ],
)
def test_columns_are_known_by_their_names(columns: str, settings: dict | None) -> None:
    found = find_settings(columns.split())
    if settings is None:
        assert found is None
    else:
        assert found is not None and settings.items() <= found.items()
        HubData(path="x", **found)


@pytest.mark.parametrize(
    ("columns", "lacking"),
    [
        ("prompt image_0 image_1", "no column says which is better"),
        ("chosen rejected id", "there is no prompt"),
        ("prompt win flop", "no two columns whose names differ only in the side"),
    ],
)
def test_the_nearest_layout_is_named(columns: str, lacking: str) -> None:
    assert lacking in describe_nearest(columns.split())


def test_rows_of_json_name_files_or_hold_base64(tmp_path: Path) -> None:
    for name, data in {"a.jpg": A, "b.jpg": B}.items():
        (tmp_path / name).write_bytes(data)
    rows = [
        {"prompt": "x", "image_a": "a.jpg", "image_b": "b.jpg", "winner": "image_b", "model_a": "m", "model_b": "n"},
        {"prompt": "y", "image_a": base64.b64encode(A).decode(), "image_b": "c.jpg", "winner": "image_a"},
        {"prompt": "z", "image_a": "../a.jpg", "image_b": "b.jpg", "winner": "image_a", "model_a": None, "model_b": 1},
    ]
    rows[1] |= {"model_a": "m", "model_b": "n"}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = found(tmp_path)
    first, second, third = source.read()
    assert source.num_rows() == 3
    assert isinstance(first, PreferencePair) and (first.chosen, first.rejected) == (B, A)
    assert first.chosen_origin == {"position": 1, "model": "n"}
    assert second == Dropped("metadata.jsonl line 2: c.jpg", "rejected: no such file")
    assert third == Dropped("metadata.jsonl line 3: ../a.jpg", "chosen: the file name leaves the folder")
    before = source.stamp()
    (tmp_path / "b.jpg").write_bytes(C + b" ")
    assert source.stamp() != before, "the files that rows name count"


def test_inspect_says_when_the_model_predicts_the_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which model drew an image decides nine labels of ten here; the same images without their models say nothing."""
    rng = np.random.default_rng(0)
    images = [encode(Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)), "PNG") for _ in range(120)]
    rows = [
        {
            "prompt": f"prompt {i}",
            "image1": images[2 * i],
            "image2": images[2 * i + 1],
            "model1": ("flux", "sd3")[i % 2],
            "model2": ("sd3", "flux")[i % 2],
            "preference": ("left", "right")[(i % 2) ^ (i % 10 == 0)],
        }
        for i in range(60)
    ]
    (tmp_path / "d").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d" / "train.parquet")
    inspect.run(InspectConfig(path=tmp_path / "d", output_dir=tmp_path / "out", num_images=0))
    out = " ".join(capsys.readouterr().out.split())
    assert "model (origin) predicts which image is chosen (AUC 0.9" in out and "flux is chosen in 90 %" in out
