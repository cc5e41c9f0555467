"""Rows in JSON or Parquet with images beside them: HPDv3, ranks, invoke-training; hostile ones, too."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data import records as module
from diffusion_dpo.data.collect import collect, survey
from diffusion_dpo.data.folder import FolderData
from diffusion_dpo.data.hpdv3 import HPDv3Data
from diffusion_dpo.data.invoke import InvokeData
from diffusion_dpo.data.ranked import RankedData, pick_by_rank
from diffusion_dpo.data.recognise import recognise
from diffusion_dpo.data.records import read_file
from tests.photos import jpeg

IMAGES = [jpeg(i) for i in range(4)]
A, B, C, D = IMAGES
FORMATS = ["list", "lines", "parquet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """images/0.jpg to images/3.jpg, and beside the folder a file that nobody may read."""
    path = tmp_path / "set"
    (path / "images").mkdir(parents=True)
    for number, data in enumerate(IMAGES):
        (path / "images" / f"{number}.jpg").write_bytes(data)
    (tmp_path / "secret.jpg").write_bytes(A)
    (path / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (path / "short.jpg").write_bytes(A[:300])
    return path


def write(folder: Path, rows: list, kind: str = "list") -> Path:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "lines":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return folder / "rows.jsonl"
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    return folder / "rows.json"


def reasons(source: PairSource) -> list[str]:
    """The reason of every dropped row, "" for a pair; and that rows are counted as they are read."""
    items = list(source.read())
    assert source.num_rows() == len(items)
    return [item.reason if isinstance(item, Dropped) else "" for item in items]


def pairs(source: PairSource) -> list[PreferencePair]:
    items = list(source.read())
    assert source.num_rows() == len(items)
    assert all(isinstance(item, PreferencePair) for item in items), items
    return items  # type: ignore[return-value]


def hpd(prompt: object = "a cat", first: object = "images/0.jpg", second: object = "images/1.jpg", **more) -> dict:
    return {"prompt": prompt, "path1": first, "path2": second, **more}


# --- HPDv3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_hpdv3_prefers_the_first_path_and_keeps_what_is_known(folder: Path, kind: str) -> None:
    more = {"confidence": 0.9, "choice_dist": [12, 7]}
    rows = [hpd(model1="m", model2="n", **more), hpd("a dog", "images/3.jpg", "images/2.jpg", **more)]
    rows[1] |= {"model1": None, "model2": None, "confidence": None}
    first, second = pairs(HPDv3Data(path=write(folder, rows, kind)))
    assert (first.prompt, first.chosen, first.rejected, first.label_prob) == ("a cat", A, B, 1.0)
    assert first.chosen_origin == {"model": "m", "confidence": 0.9}, "and no position: it is the label"
    assert first.rejected_origin == {"model": "n", "confidence": 0.9}
    assert (second.chosen, second.rejected, second.chosen_origin) == (D, C, {})
    assert (
        second.where
        == {"list": "rows.json item 1", "lines": "rows.jsonl line 2", "parquet": "rows.parquet row 1"}[kind]
    )


def test_hpdv3_confidence_is_a_label_only_when_asked_for(folder: Path) -> None:
    rows = [hpd(confidence=it) for it in (0.75, None, 0.4, 7)]
    path = write(folder, rows)
    assert [pair.label_prob for pair in pairs(HPDv3Data(path=path))] == [1.0] * 4
    first, *others = HPDv3Data(path=path, soft_labels=True).read()
    assert isinstance(first, PreferencePair) and first.label_prob == 0.75
    outside = "the confidence is not between 0.5 and 1"
    assert [it.reason for it in others if isinstance(it, Dropped)] == ["no confidence", outside, outside]


@pytest.mark.parametrize("value", ["0.9", True, float("nan"), float("inf"), 10**400, [1]], ids=lambda it: str(it)[:9])
def test_hpdv3_confidence_is_a_number(folder: Path, value: object) -> None:
    assert reasons(HPDv3Data(path=write(folder, [hpd(confidence=value)]))) == ["the confidence is not a number"]


def test_images_may_lie_elsewhere_and_inside_parquet(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    path = write(tmp_path / "meta", [hpd()])
    assert reasons(HPDv3Data(path=path)) == ["path1: no such file"]
    assert pairs(HPDv3Data(path=path, images_dir=folder))[0].chosen == A
    path = write(tmp_path / "meta", [hpd("x", A, B)], "parquet")
    assert pairs(HPDv3Data(path=path))[0].rejected == B


@pytest.mark.parametrize(
    "name, why",
    [
        ("/etc/passwd", "the file name leaves the folder"),
        ("../secret.jpg", "the file name leaves the folder"),
        ("images/../../secret.jpg", "the file name leaves the folder"),
        ("C:\\secret.jpg", "the file name leaves the folder"),
        ("link.jpg", "the file leaves the folder: a link; copy what it leads to, or set data.images_dir to it"),
        ("https://example.org/a.jpg", "a URL instead of a file name"),
        ("a\0.jpg", "not a file name"),
        ("\ud800.jpg", "the file cannot be read"),
        ("", "not a file name"),
        ("images", "no such file"),
        ("missing.jpg", "no such file"),
    ],
)
def test_nothing_outside_the_folder_is_read(folder: Path, name: str, why: str) -> None:
    assert reasons(HPDv3Data(path=write(folder, [hpd(first=name)]))) == [f"path1: {why}"]
    assert reasons(HPDv3Data(path=write(folder, [hpd(second=name)], "lines"))) == [f"path2: {why}"]
    invoke = {"prompt": "x", "image_0": "images/0.jpg", "image_1": name, "prefer_0": True, "prefer_1": False}
    assert reasons(InvokeData(path=write(folder, [invoke]))) == [f"image_1: {why}"]
    ranked = [{"prompt": "x", "rank": rank, "image_path": it} for rank, it in enumerate(("images/0.jpg", name))]
    assert reasons(RankedData(path=write(folder, ranked))) == [f"image_path: {why}"]
    assert HPDv3Data(path=folder / "rows.json").stamp(), "a name that is none has a state, too"


@pytest.mark.parametrize("value", [{"bytes": None, "path": "images/0.jpg"}, None, 7, ["images/0.jpg"]])
def test_a_value_that_is_neither_bytes_nor_a_name_is_no_image(folder: Path, value: object) -> None:
    [why] = reasons(HPDv3Data(path=write(folder, [hpd(first=value)])))
    assert why in {
        *("chosen: a path instead of image bytes", "chosen: no image", "chosen: not image bytes"),
        "chosen: a list instead of one image",
    }


def test_prompts_of_any_kind(folder: Path) -> None:
    prompts = ["a\0b", "x" * 100_000, "\ud800", " ", None, 7, "ü 猫"]
    rows = [hpd(prompt) for prompt in prompts]
    expected = ["", "", "the prompt is not valid Unicode", "no prompt", "no prompt", "the prompt is not text", ""]
    for kind in ("list", "lines"):
        source = HPDv3Data(path=write(folder, rows, kind))
        assert reasons(source) == expected
        found = survey(source)
        assert [record.prompt for record in found.records] == [prompts[0], prompts[1], prompts[-1]]


def test_a_truncated_image_is_named(folder: Path) -> None:
    found = survey(HPDv3Data(path=write(folder, [hpd(), hpd("b", "short.jpg")])))
    assert (len(found), found.drops) == (1, {"chosen: truncated image file": 1})


# --- files of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_read_in_parts_of_any_size(folder: Path, monkeypatch, size: int, indent: int | None) -> None:
    rows = [{"a": [number, 1.5, 'x]",\\ü'], "b": {"c": None}} for number in range(5)]
    path = folder / "rows.json"
    path.write_text("\ufeff \n" + json.dumps([*rows, 1234567, "text", None], indent=indent, ensure_ascii=False) + "\n")
    monkeypatch.setattr(module, "_PART", size)
    found = [entry for _, entry in read_file(path)]
    assert found == [*rows, *["not a JSON object"] * 3]


@pytest.mark.parametrize(
    "text, why",
    [
        ('[{"a": 1}', "it ends too early"),
        ('[{"a": 1},', "it ends too early"),
        ("[", "it ends too early"),
        ('[{"a": 1} {"a": 2}]', "after an item"),
        ('[{"a": 1}]\n[{"a": 2}]', "there is more after it"),
        ("[] 7", "there is more after it"),
        ('[{"a": 1}, oops]', "Expecting value"),
        ('[{"a": "', "Unterminated string"),
        ("[" * 100_000, "recursion|Expecting value|maximum"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(folder: Path, text: str, why: str) -> None:
    (folder / "rows.json").write_text(text)
    with pytest.raises(ConfigError, match=f"rows.json is no list of JSON objects: .*({why}).*; write or download"):
        list(read_file(folder / "rows.json"))


def test_a_list_that_is_wrong_early_is_not_read_to_its_end(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PART", 16)
    monkeypatch.setattr(module, "_LONGEST_ITEM", 256)
    taken: list[int] = []
    with pytest.raises(ValueError, match="Expecting"):
        list(module._items(lambda size: taken.append(size) or ("[oops" if len(taken) == 1 else "x" * size)))
    assert sum(taken) < 2048


@pytest.mark.parametrize("line, why", [("{", "not valid JSON"), ("7", "not a JSON object"), ("{}", "no 'prompt'")])
def test_bad_lines_are_named_and_the_others_read(folder: Path, line: str, why: str) -> None:
    path = folder / "rows.jsonl"
    path.write_text("\n".join([line, "", json.dumps(hpd() | {"unknown": 1})]))
    bad, good = HPDv3Data(path=path).read()
    assert bad == Dropped("rows.jsonl line 1", why)
    assert isinstance(good, PreferencePair) and good.where == "rows.jsonl line 3"


def test_files_that_are_not_there_or_empty(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file or folder .*nowhere"):
        list(HPDv3Data(path=folder / "nowhere").read())
    with pytest.raises(ConfigError, match=r"set holds neither metadata\.jsonl, nor \.csv, nor Parquet"):
        list(HPDv3Data(path=folder).read())
    (folder / "rows.json").touch()
    with pytest.raises(ConfigError, match="it has no rows"):
        collect(HPDv3Data(path=folder / "rows.json"), max_broken_share=1)
    write(folder, [{"prompt": "x", "path1": "a"}], "parquet")
    with pytest.raises(ConfigError, match=r"no column 'path2'\. Did you mean 'path1'"):
        list(HPDv3Data(path=folder).read())
    (folder / "metadata.jsonl").write_text(json.dumps(hpd()))
    assert pairs(HPDv3Data(path=folder))[0].where == "metadata.jsonl line 1"


def test_the_stamp_changes_with_rows_and_images(folder: Path) -> None:
    source = HPDv3Data(path=write(folder, [hpd()]))
    stamps = [source.stamp()]
    (folder / "images" / "1.jpg").write_bytes(C)
    stamps.append(source.stamp())
    write(folder, [hpd("another")])
    stamps.append(source.stamp())
    assert len(set(stamps)) == 3
    (folder / "images" / "2.jpg").write_bytes(A)
    assert source.stamp() == stamps[-1], "an image that no row names"


# --- ranks -----------------------------------------------------------------------------------------------------------


def ranked(rank: object, image: object, prompt: str = "a cat", prompt_id: object = "p", **more) -> dict:
    name = f"images/{image}.jpg" if isinstance(image, int) else image
    return {"prompt": prompt, "prompt_id": prompt_id, "rank": rank, "image_path": name, **more}


@pytest.mark.parametrize("kind", FORMATS)
def test_ranks_become_pairs_with_margins_and_scores(folder: Path, kind: str) -> None:
    ratings = [{"overall_rating": 7 - i, "fidelity_rating": 0.5 * i, "other": 1} for i in range(3)]
    rows = [ranked(rank, i, **ratings[i]) for i, rank in enumerate((2, 1, 4))]
    one, two, three = pairs(RankedData(path=write(folder, rows, kind)))
    assert [(it.chosen, it.rejected, it.margin) for it in (one, two, three)] == [(B, A, 1), (B, C, 3), (A, C, 2)]
    assert one.chosen_scores == {"overall_rating": 6, "fidelity_rating": 0.5}
    assert one.rejected_scores == {"overall_rating": 7, "fidelity_rating": 0}


def test_ranks_are_numbers_and_never_compared_as_text(folder: Path) -> None:
    [pair] = pairs(RankedData(path=write(folder, [ranked(10, 0), ranked(9, 1)])))
    assert pair.chosen == B
    rows = [ranked(rank, 0) for rank in ("10", "9", True, None, float("nan"), 10**400)]
    assert reasons(RankedData(path=write(folder, rows))) == ["the rank is not a number"] * 6
    assert set(reasons(RankedData(path=write(folder, rows[:2], "parquet")))) == {"the rank is not a number"}


def test_prompts_are_kept_apart_wherever_their_rows_are(folder: Path) -> None:
    rows = [ranked(1, 0), ranked(2, 1, "a dog"), ranked(2, 2), ranked(1, 3, "a dog"), ranked(1, 3, prompt_id="q")]
    first, second, third = RankedData(path=write(folder, rows)).read()
    assert isinstance(first, PreferencePair) and (first.prompt, first.chosen, first.rejected) == ("a cat", A, C)
    assert isinstance(second, PreferencePair) and (second.prompt, second.chosen) == ("a dog", D)
    assert second.where == "rows.json item 3 and rows.json item 1"
    assert third == Dropped("rows.json item 4", "the only image of its prompt", broken=False)


@pytest.mark.parametrize("strategy", ["all", "best_worst", "adjacent"])
@pytest.mark.parametrize("ranks", list(itertools.product((1, 2, 3), repeat=4)))
def test_laws_of_picking(ranks: tuple[int, ...], strategy: str) -> None:
    picks = pick_by_rank(ranks, strategy)
    assert all(ranks[i] <= ranks[j] and i != j for i, j in picks)
    assert len({frozenset(pick) for pick in picks}) == len(picks)
    levels = sorted(set(ranks))
    if strategy == "all":
        assert len(picks) == 6
    elif strategy == "best_worst":
        [(best, worst)] = picks
        assert (best, ranks[worst]) == (ranks.index(min(ranks)), max(ranks))
        assert len(levels) == 1 or worst == ranks.index(max(ranks))
    else:
        steps = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
        assert sorted(picks) == [(i, j) for i, j in steps if not any(ranks[i] < it < ranks[j] for it in levels)]


def test_equal_ranks_make_no_pair_and_are_counted(folder: Path) -> None:
    path = write(folder, [ranked(1, 0), ranked(1, 1), ranked(2, 2)])
    assert reasons(RankedData(path=path)) == ["equal ranks", "", ""]
    assert reasons(RankedData(path=path, pairs="adjacent")) == ["", ""]
    assert reasons(RankedData(path=path, pairs="best_worst")) == [""]
    path = write(folder, [ranked(1, 0), ranked(1, 1)])
    for strategy in ("all", "adjacent", "best_worst"):
        [item] = RankedData(path=path, pairs=strategy).read()
        assert isinstance(item, Dropped) and (item.reason, item.broken) == ("equal ranks", False)
        assert RankedData(path=path, pairs=strategy).num_rows() == 1


def test_ranked_images_may_be_inside_parquet(folder: Path) -> None:
    rows = [ranked(i, i) | {"image": {"bytes": IMAGES[i], "path": f"{i}.jpg"}} for i in (1, 0)]
    for row in rows:
        row["image_path"] = "nowhere.jpg"
    [pair] = pairs(RankedData(path=write(folder, rows, "parquet")))
    assert (pair.chosen, pair.rejected) == (A, B)


NAMES = [f"images/{i}.jpg" for i in range(4)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image_path": NAMES[:3], "rank": [1, 0, 2]}, [(B, A, 1), (B, C, 2), (A, C, 1)]),
        ({"images": NAMES[:2], "rank": [0.5, 0.25]}, [(B, A, 0.25)]),
        ({"file_path": NAMES[:2], "human_preference": [1, 0]}, [(A, B, 1)]),
        ({"image_path": NAMES[:2], "human_preference": [0, 1]}, [(B, A, 1)]),
        ({"file_path": NAMES[:2], "human_preference": [1, 1]}, ["equal ranks"]),
        ({"image_path": NAMES[:3], "rank": [1, 0]}, ["not as many ranks as images"]),
        ({"image_path": [NAMES[0], "images/9.jpg"], "rank": [1, 0]}, ["image_path: no such file"]),
        ({"image_path": NAMES[:3], "rank": [1, None, 2]}, [(A, C, 1), "the rank is not a number"]),
    ],
    ids=str,
)
def test_lists_of_images_and_ranks_in_a_row_are_compared_among_themselves(
    folder: Path, kind: str, row: dict, expected: list
) -> None:
    """The test and the training file of HPDv2; a second row of the same prompt is another comparison."""
    other = {
        key: [*NAMES[2:], *NAMES[2:]][: len(value)] if isinstance(value[0], str) else value
        for key, value in row.items()
    }
    path = write(folder, [{"prompt": "x", **row}, {"prompt": "x", **other}], kind)
    source = recognise(path).source
    assert isinstance(source, RankedData)
    found = [
        it.reason if isinstance(it, Dropped) else (it.chosen, it.rejected, it.margin)
        for it in source.read()
        if " row 0" in it.where or " line 1" in it.where or " item 0" in it.where
    ]
    assert sorted(found, key=str) == sorted(expected, key=str)
    if kind != "parquet":
        assert source.num_rows() == len(list(source.read()))


def test_images_in_lists_of_parquet_are_bytes(folder: Path) -> None:
    struct = [{"bytes": it, "path": None} for it in (A, B)]
    path = write(folder, [{"prompt": "x", "image": struct, "rank": [2, 1]}], "parquet")
    [pair] = pairs(RankedData(path=path))
    assert (pair.chosen, pair.rejected, pair.where) == (
        B,
        A,
        "rows.parquet row 0 image 1 and rows.parquet row 0 image 0",
    )


# --- lists in a folder's rows ----------------------------------------------------------------------------------------


def test_one_winner_and_several_losers_make_a_pair_of_each(folder: Path) -> None:
    rows = [
        {"prompt": "x", "chosen": NAMES[0], "rejected": NAMES[1:3], "chosen_model": "m", "rejected_model": "n"},
        {"prompt": "y", "chosen": NAMES[:2], "rejected": [NAMES[3], "images/9.jpg"]},
        {"prompt": "z", "chosen": NAMES[0], "rejected": []},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = recognise(folder).source
    assert isinstance(source, FolderData)
    items = list(source.read())
    assert source.num_rows() == len(items) == 7
    good = [it for it in items if isinstance(it, PreferencePair)]
    assert [(it.chosen, it.rejected) for it in good] == [(A, B), (A, C), (A, D), (B, D)]
    assert good[1].where == "metadata.jsonl line 1, rejected 1"
    assert (good[1].chosen_origin, good[1].rejected_origin) == ({"model": "m"}, {"model": "n"})
    assert [it.reason for it in items if isinstance(it, Dropped)] == [
        *["rejected: no such file"] * 2,
        "rejected: no image",
    ]
    before = source.stamp()
    (folder / NAMES[2]).write_bytes(D)
    assert source.stamp() != before, "a file that a list names counts"


# --- invoke-training -------------------------------------------------------------------------------------------------


def invoke(first: object, second: object) -> dict:
    images = {"image_0": "images/0.jpg", "image_1": "images/1.jpg"}
    return {**images, "prompt": "a cat", "prefer_0": first, "prefer_1": second}


@pytest.mark.parametrize("kind", FORMATS)
def test_invoke_preferences(folder: Path, kind: str) -> None:
    rows = [invoke(True, False), invoke(False, True), invoke(True, True), invoke(False, False)]
    path = write(folder, rows, kind)
    first, second, *ties = InvokeData(path=path).read()
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.chosen, first.chosen_origin, first.rejected_origin) == (A, {"position": 0}, {"position": 1})
    assert (second.chosen, second.chosen_origin, second.rejected_origin) == (B, {"position": 1}, {"position": 0})
    assert [(it.reason, it.broken) for it in ties if isinstance(it, Dropped)] == [("tie", False)] * 2
    assert [pair.label_prob for pair in pairs(InvokeData(path=path, ties="keep"))] == [1, 1, 0.5, 0.5]


@pytest.mark.parametrize("value", ["false", 1, None])
def test_invoke_preferences_are_true_or_false(folder: Path, value: object) -> None:
    assert reasons(InvokeData(path=write(folder, [invoke(False, value)]))) == ["prefer_1 is neither true nor false"]
