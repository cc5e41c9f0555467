"""Four ways in: each yields every row once, as a pair or with the reason why not, and never reads what it must not."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import Dropped, PairSource, PreferencePair
from diffusion_dpo.data.folder import FolderData
from diffusion_dpo.data.hub import HubData
from diffusion_dpo.data.pairs import PairsData, pair_row
from diffusion_dpo.data.pickapic import PickapicData
from diffusion_dpo.data.rows import pair_id
from diffusion_dpo.data.shards import PAIRS, write_shard
from diffusion_dpo.settings import TrainConfig
from tests.photos import jpeg

A, B = jpeg(0), jpeg(1)
LINK = "a link; copy what it leads to, or set data.images_dir to it"


def pickapic(path: Path, *rows: tuple, label_type: pa.DataType | None = None) -> Path:
    """Write rows of (caption, jpg_0, jpg_1, label_0)."""
    captions, first, second, labels = zip(*rows, strict=True)
    columns = {"caption": captions, "jpg_0": first, "jpg_1": second, "label_0": pa.array(labels, label_type)}
    pq.write_table(pa.table(columns), path)
    return path


def reason(item: PreferencePair | Dropped) -> str:
    assert isinstance(item, Dropped), item
    return item.reason


# --- pickapic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label, better, label_prob", [(1, A, 1.0), (0, B, 1.0), (0.75, A, 0.75), (0.25, B, 0.75)])
def test_pickapic_label_says_which_image_is_better(tmp_path, label, better, label_prob):
    [pair] = PickapicData(path=pickapic(tmp_path / "a.parquet", ("a cat", A, B, label))).read()
    assert isinstance(pair, PreferencePair)
    assert (pair.chosen, pair.rejected) == (better, B if better is A else A)
    assert (pair.prompt, pair.label_prob, pair.where) == ("a cat", label_prob, "a.parquet row 0")
    assert pair.pair_id == pair_id("a cat", pair.chosen, pair.rejected)


def test_pickapic_ties_are_dropped_or_kept_as_soft_labels(tmp_path):
    path = pickapic(tmp_path / "a.parquet", ("a cat", A, B, 0.5))
    assert list(PickapicData(path=path).read()) == [Dropped("a.parquet row 0", "tie", broken=False)]
    [pair] = PickapicData(path=path, ties="keep").read()
    assert isinstance(pair, PreferencePair)
    assert (pair.label_prob, pair.chosen) == (0.5, A)


@pytest.mark.parametrize(
    "label, why",
    [
        (None, "no label"),
        (float("nan"), "no label"),
        (-1.0, "the label is not between 0 and 1"),
        (2.0, "the label is not between 0 and 1"),
    ],
)
def test_pickapic_labels_are_strict(tmp_path, label, why):
    [item] = PickapicData(path=pickapic(tmp_path / "a.parquet", ("x", A, B, label), label_type=pa.float64())).read()
    assert (reason(item), item.broken) == (why, True)


@pytest.mark.parametrize(("label", "chosen"), [("1", A), ("0", B), (True, A), (False, B), ("left", None)])
def test_pickapic_labels_are_numbers_or_stand_for_them(tmp_path, label, chosen):
    [item] = PickapicData(path=pickapic(tmp_path / "a.parquet", ("x", A, B, label))).read()
    assert reason(item) == "the label is not a number" if chosen is None else item.chosen == chosen


def test_pickapic_keeps_which_image_was_where_and_of_which_model(tmp_path):
    columns = {"caption": ["x", "y", "z"], "jpg_0": [A] * 3, "jpg_1": [B] * 3, "label_0": [1.0, 0.0, 0.0]}
    models = {"model_0": ["m", "m", None], "model_1": ["n", "n", ""], "num_example_per_prompt": [7, 7, 7]}
    pq.write_table(pa.table(columns | models), tmp_path / "a.parquet")
    first, second, third = PickapicData(path=tmp_path).read()
    zero, one = {"position": 0, "model": "m"}, {"position": 1, "model": "n"}
    assert (first.chosen, first.chosen_origin, first.rejected_origin) == (A, zero, one)
    assert (second.chosen, second.chosen_origin, second.rejected_origin) == (B, one, zero)
    assert (third.chosen_origin, third.rejected_origin) == ({"position": 1}, {"position": 0})


def test_pickapic_rows_without_a_label_are_fine_and_not_wanted(tmp_path):
    columns = {"caption": ["x"] * 2, "jpg_0": [A] * 2, "jpg_1": [B] * 2, "label_0": [1.0, 1.0]}
    pq.write_table(pa.table(columns | {"has_label": [False, True]}), tmp_path / "a.parquet")
    first, second = PickapicData(path=tmp_path).read()
    assert first == Dropped("a.parquet row 0", "no label", broken=False)
    assert isinstance(second, PreferencePair)


@pytest.mark.parametrize("label, other", [(1.0, 1.0), (0.0, 0.0), (0.5, 0.0), (1.0, None), (1.0, float("nan"))])
def test_pickapic_labels_that_contradict_each_other_are_broken(tmp_path, label, other):
    columns = {"caption": ["x"] * 2, "jpg_0": [A] * 2, "jpg_1": [B] * 2, "label_0": [label, 0.3]}
    pq.write_table(pa.table(columns | {"label_1": [other, 0.7 + 1e-7]}), tmp_path / "a.parquet")
    first, second = PickapicData(path=tmp_path).read()
    assert (reason(first), first.broken) == ("label_0 and label_1 do not add up to 1", True)
    assert isinstance(second, PreferencePair)


def test_pickapic_rows_keep_their_partners_around_a_bad_one(tmp_path):
    images = [jpeg(i % 4, (64 + i, 64)) for i in range(10)]
    rows = [(f"prompt {i}", images[2 * i], images[2 * i + 1], i % 2) for i in range(5)]
    rows[2] = ("prompt 2", None, images[5], 1)
    path = pickapic(tmp_path / "a.parquet", *rows)
    items = list(PickapicData(path=path).read())
    assert reason(items[2]) == "chosen: no image"
    for i in (0, 1, 3, 4):
        pair = items[i]
        assert isinstance(pair, PreferencePair)
        assert pair.prompt == f"prompt {i}"
        assert {pair.chosen, pair.rejected} == {images[2 * i], images[2 * i + 1]}


def test_path_instead_of_bytes_is_refused(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(A)
    good, bad = {"bytes": B, "path": "b.jpg"}, {"bytes": None, "path": str(secret)}
    path = pickapic(tmp_path / "a.parquet", ("x", good, bad, 1), ("y", bad, good, 1), ("z", good, good, 1))
    first, second, third = PickapicData(path=path).read()
    assert reason(first) == "rejected: a path instead of image bytes"
    assert reason(second) == "chosen: a path instead of image bytes"
    assert isinstance(third, PreferencePair)


@pytest.mark.parametrize("prompt, why", [(None, "no prompt"), ("", "no prompt"), (" \n", "no prompt")])
def test_empty_prompts_are_refused(tmp_path, prompt, why):
    path = pickapic(tmp_path / "a.parquet", (prompt, A, B, 1), ("x", A, B, 1))
    assert reason(next(iter(PickapicData(path=path).read()))) == why


def test_missing_columns_name_the_nearest(tmp_path):
    pq.write_table(pa.table({"kaption": ["x"], "jpg_0": [A], "jpg_1": [B], "label_0": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"no column 'caption'\. Did you mean 'kaption'\?"):
        list(PickapicData(path=tmp_path).read())


def test_rows_are_counted_without_reading_them(tmp_path):
    for name in ("a", "b"):
        pickapic(tmp_path / f"{name}.parquet", ("x", A, B, 1), ("y", A, B, 0))
    source = PickapicData(path=tmp_path)
    assert source.num_rows() == PairSource.num_rows(source) == 4


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_come_back_as_they_were_written(tmp_path):
    pair = PreferencePair(
        pair_id("a cat", A, B),
        "a cat",
        A,
        B,
        label_prob=0.9,
        chosen_uid="u1",
        rejected_uid="u2",
        chosen_scores={"clip": 0.5},
        rejected_scores={"clip": 0.25},
        chosen_origin={"model": "a", "position": 0},
        rejected_origin={"model": "b", "position": 1},
        margin=0.25,
        margin_norm=1.5,
        strategy="best_worst",
        source="cand",
    )
    write_shard(tmp_path / "pairs-00000.parquet", [pair_row(pair, seeds=[1, 2])], PAIRS)
    assert list(PairsData(path=tmp_path).read()) == [pair]


@pytest.mark.parametrize("manifest", ["[1]", "{}", '{"labelled_by": 7}', '{"labelled_by": [null]}', "oops"])
def test_a_manifest_of_another_make_says_nothing(tmp_path, manifest):
    pickapic(tmp_path / "a.parquet", ("x", A, B, 1))
    (tmp_path / "manifest.json").write_text(manifest)
    assert PairsData(path=tmp_path).labelled_by() == PairsData(path=tmp_path / "a.parquet").labelled_by() == ()


def test_what_labelled_the_pairs_is_gathered_from_all_folders(tmp_path):
    for name, metrics in (("a", ["clip"]), ("b", ["warmth", "clip"]), ("c", None)):
        (tmp_path / name).mkdir()
        pickapic(tmp_path / name / "pairs.parquet", ("x", A, B, 1))
        if metrics:
            (tmp_path / name / "manifest.json").write_text(json.dumps({"labelled_by": metrics}))
    assert PairsData(path=tmp_path).labelled_by() == ("clip", "warmth")


def test_pairs_need_three_columns_only_and_ids_come_from_the_content(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["x"], "chosen": [A], "rejected": [B], "pair_id": ["stale"]}), tmp_path / "a.parquet"
    )
    assert list(PairsData(path=tmp_path).read()) == [PreferencePair(pair_id("x", A, B), "x", A, B)]


@pytest.mark.parametrize(
    "column, value, why",
    [
        ("label_prob", 0.2, "label_prob is not between 0.5 and 1"),
        ("label_prob", "high", "label_prob is not between 0.5 and 1"),
        ("margin", "wide", "the margin is not a number"),
        ("chosen_scores", "{", "the scores are not a JSON object of numbers"),
        ("chosen_scores", '{"clip": "0.3"}', "the scores are not a JSON object of numbers"),
    ],
)
def test_pairs_with_wrong_numbers_are_refused(tmp_path, column, value, why):
    pq.write_table(
        pa.table({"prompt": ["x"], "chosen": [A], "rejected": [B], column: [value]}), tmp_path / "a.parquet"
    )
    [item] = PairsData(path=tmp_path).read()
    assert reason(item) == why


# --- folder ----------------------------------------------------------------------------------------------------------


def folder(path: Path, *lines: str) -> Path:
    (path / "images").mkdir(parents=True)
    (path / "images" / "a b.jpg").write_bytes(A)
    (path / "c.jpg").write_bytes(B)
    (path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


def entry(chosen: str, rejected: str = "c.jpg") -> str:
    return json.dumps({"prompt": "a cat", "chosen": chosen, "rejected": rejected})


def test_folder_reads_its_lines(tmp_path):
    data = FolderData(path=folder(tmp_path / "d", "", entry("images/a b.jpg"), "  ", entry("c.jpg", "images/a b.jpg")))
    first, second = data.read()
    assert isinstance(first, PreferencePair) and isinstance(second, PreferencePair)
    assert (first.prompt, first.chosen, first.rejected) == ("a cat", A, B)
    assert (second.chosen, second.rejected, second.where) == (B, A, "metadata.jsonl line 4")
    assert data.num_rows() == 2


@pytest.mark.parametrize(
    "name, why",
    [
        ("/etc/passwd", "the file name leaves the folder"),
        ("../secret.jpg", "the file name leaves the folder"),
        ("images/../../secret.jpg", "the file name leaves the folder"),
        ("..\\secret.jpg", "the file name leaves the folder"),
        ("C:\\secret.jpg", "the file name leaves the folder"),
        ("\\\\host\\secret.jpg", "the file name leaves the folder"),
        ("link.jpg", f"the file leaves the folder: {LINK}"),
        (
            "linked/secret.jpg",
            "linked/ leaves the folder: a link; copy what it leads to, or set data.images_dir to it",
        ),
        ("https://example.org/a.jpg", "a URL instead of a file name"),
        ("file:///etc/passwd", "a URL instead of a file name"),
        ("zip://a.zip", "a URL instead of a file name"),
        ("a\0.jpg", "not a file name"),
        ("", "not a file name"),
        ("images", "no such file"),
        ("missing.jpg", "no such file"),
        ("x" * 5000, "the file cannot be read"),
        ("loop.jpg", "the file cannot be read"),
    ],
)
def test_folder_reads_nothing_outside_itself(tmp_path, name, why):
    path = folder(tmp_path / "d", entry(name), entry("c.jpg", name))
    (tmp_path / "secret.jpg").write_bytes(A)
    (path / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (path / "linked").symlink_to(tmp_path)
    (path / "loop.jpg").symlink_to(path / "loop.jpg")
    assert [reason(item) for item in FolderData(path=path).read()] == [f"chosen: {why}", f"rejected: {why}"]


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "x", "chosen": "c.jpg"}', "no 'rejected'"),
        ('{"prompt": 7, "chosen": "c.jpg", "rejected": "images/a b.jpg"}', "the prompt is not text"),
        ('{"prompt": "\\ud800", "chosen": "c.jpg", "rejected": "images/a b.jpg"}', "the prompt is not valid Unicode"),
    ],
)
def test_folder_names_bad_lines(tmp_path, line, why):
    items = list(FolderData(path=folder(tmp_path / "d", entry("images/a b.jpg"), line)).read())
    assert items[1] == Dropped("metadata.jsonl line 2", why)


def test_folder_without_metadata_shows_an_example(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r'holds neither metadata\.jsonl, nor \.csv, nor Parquet; write one line per row, such as \{"prompt"',
    ):
        list(FolderData(path=tmp_path).read())


# --- hub -------------------------------------------------------------------------------------------------------------


def test_hub_reads_local_columns_of_any_name(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "win": [A], "lose": [B]}), tmp_path / "train-0.parquet")
    names = {"prompt_column": "text", "chosen_column": "win", "rejected_column": "lose"}
    [pair] = HubData(path=str(tmp_path), **names).read()
    assert isinstance(pair, PreferencePair)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("x", A, B)


def test_hub_reads_labels_like_pickapic(tmp_path):
    path = pickapic(tmp_path / "a.parquet", ("x", A, B, 0.0), ("y", A, B, 0.5), ("z", A, B, 1.0))
    names = {
        "prompt_column": "caption",
        "image_0_column": "jpg_0",
        "image_1_column": "jpg_1",
        "label_column": "label_0",
    }
    ours = [getattr(item, "pair_id", "") for item in HubData(path=str(path), **names).read()]
    assert ours == [getattr(item, "pair_id", "") for item in PickapicData(path=path).read()]


def test_hub_takes_the_files_of_a_split_and_the_first_rows(tmp_path):
    for name, prompt in (("train-0", "a"), ("train-1", "b"), ("test-0", "c")):
        pq.write_table(
            pa.table({"prompt": [prompt] * 2, "chosen": [A] * 2, "rejected": [B] * 2}), tmp_path / f"{name}.parquet"
        )

    def prompts(**settings) -> str:
        return "".join(item.prompt for item in HubData(path=str(tmp_path), **settings).read())

    assert prompts() == "aabb"
    assert prompts(split="test") == "cc"
    assert prompts(max_rows=3) == "aab"
    assert HubData(path=str(tmp_path), max_rows=3).num_rows() == 3
    with pytest.raises(ConfigError, match=r"has no split 'validation'; those there are test, train"):
        prompts(split="validation")


def test_hub_settings_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match="go together; missing: image_1_column, label_column"):
        load(TrainConfig, None, ["data.type=hub", "data.path=x/y", "data.image_0_column=a"])
    with pytest.raises(ConfigError, match=r"data\.path: is required"):
        load(TrainConfig, None, ["data.type=pickapic"])
    with pytest.raises(ConfigError, match="there is no file or folder /no/such/place"):
        list(HubData(path="/no/such/place").read())


class _FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as listing and downloading one data set needs."""

    files: dict[str, bytes] = {}

    def do_GET(self) -> None:
        status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if "/o/gated" in self.path:
            status, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif self.path.startswith("/api/datasets/o/good/tree/main"):
            listing = [
                {"type": "file", "path": name, "size": len(it), "oid": "0" * 40} for name, it in self.files.items()
            ]
            status, headers, body = 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        elif self.path.startswith("/datasets/o/good/resolve/main/"):
            name = self.path.removeprefix("/datasets/o/good/resolve/main/")
            status, headers, body = (
                200,
                {"X-Repo-Commit": "1" * 40, "ETag": f'"{name.replace("/", "")}"'},
                self.files[name],
            )
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def log_message(self, *_: object) -> None:
        pass


_READ_HUB = """
import json, sys
from diffusion_dpo.config import ConfigError
from diffusion_dpo.data.hub import HubData
for path in sys.argv[1:]:
    try:
        print(json.dumps([item.prompt for item in HubData(path=path, max_rows=2).read()]))
    except ConfigError as error:
        print(json.dumps(str(error)))
"""


def read_hub(cache: Path, *paths: str, **environment: str) -> list:
    command = [sys.executable, "-c", _READ_HUB, *paths]
    env = os.environ | {"HF_HOME": str(cache), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']


def test_hub_downloads_what_it_needs_and_explains_what_it_cannot(tmp_path):
    for name in ("train-0", "train-1"):
        pq.write_table(
            pa.table({"prompt": [name] * 2, "chosen": [A] * 2, "rejected": [B] * 2}), tmp_path / f"{name}.parquet"
        )
    _FakeHub.files = {f"data/{it.name}": it.read_bytes() for it in tmp_path.glob("*.parquet")} | {"README.md": b"hi"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    cache = tmp_path / "cache"
    try:
        good, missing, gated = read_hub(
            cache, "o/good", "o/missing", "o/gated", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0"
        )
    finally:
        server.shutdown()
    assert good == ["train-0", "train-0"]
    assert not list(cache.rglob("train-1.parquet")), "two rows need one file"
    assert missing.startswith("there is no local folder o/missing and no public data set")
    assert gated.startswith("o/gated is gated: accept its terms at")
    offline, unknown = read_hub(cache, "o/good", "o/missing", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    assert offline == ["train-0", "train-0"]
    assert unknown.startswith("o/missing is not in the cache")
