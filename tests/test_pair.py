"""`pair` over scored candidates; the strategies themselves are in tests/strategies."""

import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo import pair, score
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.shards import CANDIDATES, SCORES, encode_png, image_struct, read_rows, write_shard
from diffusion_dpo.pairing import DUPLICATE, NO_PROMPT
from diffusion_dpo.settings import PairConfig, ScoreConfig
from diffusion_dpo.strategies.plan import NARROW, TOO_FEW

# --- the verb --------------------------------------------------------------------------------------------------------


def _image(value: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (value, value, value))


def _row(prompt: str, index: int, value: int) -> dict[str, object]:
    image = _image(value)
    return {
        "uid": pixel_hash(image),
        "prompt_id": f"id of {prompt}" if prompt else "",
        "prompt": prompt,
        "index": index,
        "seed": 100 * value,
        "image": image_struct(encode_png(image)),
        "references": [],
        "origin": "",
        "settings_hash": "0",
    }


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Prompts A (over two shards), B with a duplicate, C all equal, D with one image; one image without a prompt."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [_row("A", i, value) for i, value in enumerate((40, 200, 10, 90))]
    rows += [_row("B", i, value) for i, value in enumerate((70, 70, 60))]
    rows += [_row("C", i, 50) for i in range(2)] + [_row("D", 0, 30), _row("", 0, 30)]
    write_shard(folder / "images-00000.parquet", rows[:3], CANDIDATES)
    write_shard(folder / "images-00001.parquet", rows[3:], CANDIDATES)
    score.run(load(ScoreConfig, None, [f"path={folder}", "scorers=[brightness]", "device=cpu"]))
    return folder


def _pair(path: Path, out: str = "pairs", *overrides: str) -> Path:
    return pair.run(load(PairConfig, None, [f"path={path}", f"output_dir={path.parent / out}", *overrides]))


def test_pairs_of_scored_candidates(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _pair(candidates)
    first, second = read_rows(folder, pattern="pairs-*.parquet")
    assert (first["prompt"], second["prompt"]) == ("A", "B")
    assert first["chosen_uid"] == pixel_hash(_image(200))
    assert first["rejected_uid"] == pixel_hash(_image(10))
    assert first["chosen"]["bytes"] == encode_png(_image(200))
    assert first["rejected"]["bytes"] == encode_png(_image(10))
    assert first["seeds"] == [20000, 1000]
    assert json.loads(first["chosen_scores"]) == {"brightness": pytest.approx(200 / 255)}
    assert first["margin"] == pytest.approx(190 / 255)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["labelled_by"] == ["brightness"]
    assert manifest["num_pairs"] == manifest["num_prompts"] == 2
    assert manifest["drops"] == {DUPLICATE: 2, NO_PROMPT: 1, TOO_FEW: 2}
    out = capsys.readouterr().out
    assert f"2 {DUPLICATE}; 1 {NO_PROMPT}; 2 {TOO_FEW}" in out
    assert f"next: diffusion-dpo train data.path={folder}" in out


def test_runs_with_the_same_ids_are_not_mixed(tmp_path: Path) -> None:
    folder = tmp_path / "candidates"
    folder.mkdir()
    reference = [image_struct(encode_png(_image(5)))]
    for number, (prompt, references) in enumerate((("A", []), ("B", []), ("B", reference))):
        rows = [_row(prompt, i, 40 * i + number) | {"prompt_id": "0", "references": references} for i in range(1, 3)]
        write_shard(folder / f"images-{number:05d}.parquet", rows, CANDIDATES)
    score.run(load(ScoreConfig, None, [f"path={folder}", "scorers=[brightness]", "device=cpu"]))
    pairs = list(PairsData(path=_pair(folder)).read())
    assert all(isinstance(it, PreferencePair) for it in pairs)
    values = [(it.prompt, it.chosen_uid, it.rejected_uid) for it in pairs if isinstance(it, PreferencePair)]
    uids = [[pixel_hash(_image(40 * i + number)) for i in (2, 1)] for number in range(3)]
    assert values == [("A", *uids[0]), ("B", *uids[1]), ("B", *uids[2])]


def test_a_rerun_changes_nothing_and_says_so(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _pair(candidates)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    _pair(candidates)
    assert "all 2 pairs are there already" in capsys.readouterr().out
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    (folder / "pairs-00000.parquet").unlink()
    _pair(candidates)
    assert (folder / "pairs-00000.parquet").read_bytes() == before["pairs-00000.parquet"][1]


def test_a_folder_of_other_pairs_is_left_alone(candidates: Path) -> None:
    _pair(candidates)
    with pytest.raises(ConfigError, match=r"min_margin: 0\.0 -> 0\.5"):
        _pair(candidates, "pairs", "min_margin=0.5")


def test_an_interrupted_run_is_finished(candidates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_PAIRS_PER_SHARD", 1)
    expected = list(read_rows(_pair(candidates, "whole"), pattern="pairs-*.parquet"))
    written = itertools.count()

    def failing(path: Path, rows: list[dict[str, object]], schema: object) -> None:
        if next(written) == 1:
            raise KeyboardInterrupt
        write_shard(path, rows, schema)

    with monkeypatch.context() as patch:
        patch.setattr(pair, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            _pair(candidates)
    assert list(read_rows(_pair(candidates), pattern="pairs-*.parquet")) == expected


def test_the_direction_can_be_turned(candidates: Path) -> None:
    rows = list(read_rows(_pair(candidates, "dark", "higher_is_better=false"), pattern="pairs-*.parquet"))
    assert rows[0]["chosen_uid"] == pixel_hash(_image(10))
    assert json.loads(rows[0]["chosen_scores"])["brightness"] == pytest.approx(10 / 255), "raw, not oriented"
    assert rows[0]["margin"] > 0


def test_no_pairs_left_leaves_no_folder(candidates: Path) -> None:
    with pytest.raises(ConfigError, match=f"no pairs are left .* 2 {NARROW}"):
        _pair(candidates, "pairs", "min_margin=2")
    assert not (candidates.parent / "pairs").exists()


def test_which_metric(candidates: Path) -> None:
    with pytest.raises(ConfigError, match="metric=clip_text has not been scored; there are: brightness"):
        _pair(candidates, "pairs", "metric=clip_text")
    facts = json.loads((candidates / "scores-brightness.json").read_text())
    facts |= {"scorer": "other", "metrics": [{"name": "other", "higher_is_better": False, "auxiliary": False}]}
    (candidates / "scores-other.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="several metrics have been scored; set metric to one of: brightness, other"):
        _pair(candidates)
    assert _pair(candidates, "pairs", "metric=brightness").is_dir()


def test_unscored_and_outdated_images_are_said_not_guessed(
    candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (candidates / "scores-brightness-00000.parquet").unlink()
    with pytest.raises(ConfigError, match=f"4 {TOO_FEW}|no pairs"):
        _pair(candidates, "pairs", "min_margin=1")
    assert "3 images were not scored by brightness in its present version" in capsys.readouterr().out
    facts = json.loads((candidates / "scores-brightness.json").read_text())
    (candidates / "scores-brightness.json").write_text(json.dumps(facts | {"fingerprint": "newer"}))
    with pytest.raises(ConfigError, match="no pairs"):
        _pair(candidates)
    assert "11 images were not scored" in capsys.readouterr().out


def test_no_scores_at_all(tmp_path: Path) -> None:
    write_shard(tmp_path / "images-00000.parquet", [_row("A", 0, 1)], CANDIDATES)
    with pytest.raises(ConfigError, match=r"no scores .* run: diffusion-dpo score path="):
        _pair(tmp_path)


def test_scores_may_lie_elsewhere(candidates: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "scores"
    elsewhere.mkdir()
    for path in candidates.glob("scores-*"):
        path.rename(elsewhere / path.name)
    assert len(list(read_rows(_pair(candidates, "pairs", f"scores_dir={elsewhere}"), pattern="pairs-*"))) == 2


def test_all_scores_of_both_sides_are_kept(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score.run(load(ScoreConfig, None, [f"path={candidates}", "scorers=[brightness]", "device=cpu"]))
    for path in candidates.glob("scores-brightness*"):
        text = path.name.replace("brightness", "twin")
        if path.suffix == ".json":
            (candidates / text).write_text(path.read_text().replace('"brightness"', '"twin"'))
        else:
            rows = [row | {"metric": "twin", "value": -row["value"]} for row in read_rows(path)]
            write_shard(candidates / text, rows, SCORES)
    row = next(read_rows(_pair(candidates, "pairs", "metric=twin"), pattern="pairs-*.parquet"))
    scores = json.loads(row["chosen_scores"])
    assert scores["twin"] == -scores["brightness"]
    assert row["chosen_uid"] == pixel_hash(_image(10))


def test_pairs_are_read_back_as_training_reads_them(candidates: Path) -> None:
    folder = _pair(candidates)
    pairs = list(PairsData(type="pairs", path=folder).read())
    assert all(isinstance(found, PreferencePair) for found in pairs)
    ids = [row["pair_id"] for row in read_rows(folder, pattern="pairs-*.parquet")]
    assert [found.pair_id for found in pairs if isinstance(found, PreferencePair)] == ids


def test_a_strategy_of_several_metrics(candidates: Path) -> None:
    with pytest.raises(ConfigError, match=r"metric=sharpnes has not been scored; there are: brightness"):
        _pair(candidates, "pairs", "strategy={type: pareto, metrics: [brightness, sharpnes]}")
    gate = "strategy={type: gate, gates: [{metric: brightness, max: 0.5}], then: top_bottom}"
    folder = _pair(candidates, "gated", gate, "metric=brightness")
    assert {row["prompt"]: row["chosen_uid"] for row in read_rows(folder, pattern="pairs-*.parquet")} == {
        "A": pixel_hash(_image(90)),
        "B": pixel_hash(_image(70)),
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["labelled_by"] == ["brightness"]
    assert manifest["drops"]["images that do not pass the gate on brightness"] == 1


def test_soft_labels_follow_the_margin(candidates: Path) -> None:
    rows = list(read_rows(_pair(candidates, "soft", "label_temperature=2"), pattern="pairs-*.parquet"))
    for row in rows:
        assert row["label_prob"] == pytest.approx(1 / (1 + math.exp(-row["margin_norm"] / 2)))
    assert rows[0]["margin_norm"] / rows[1]["margin_norm"] == pytest.approx(rows[0]["margin"] / rows[1]["margin"])
    deviations = [(40, 200, 10, 90), (70, 60), (50,), (30,)]
    squares = sum(((np.array(values) / 255 - np.mean(values) / 255) ** 2).sum() for values in deviations)
    assert rows[0]["margin"] / rows[0]["margin_norm"] == pytest.approx(math.sqrt(squares / (8 - 4)))


def test_prompts_are_held_out_whole(tmp_path: Path) -> None:
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [_row(f"prompt {i}", k, 20 + i + 100 * k) for i in range(40) for k in range(2)]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    score.run(load(ScoreConfig, None, [f"path={folder}", "scorers=[brightness]", "device=cpu"]))
    train = _pair(folder, "pairs", "test_share=0.3", "strategy=all_pairs")
    test = train.with_name("pairs-test")
    prompts = [{row["prompt"] for row in read_rows(it, pattern="pairs-*.parquet")} for it in (train, test)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 40
    assert 4 <= len(prompts[1]) <= 20
    other = _pair(folder, "other", "test_share=0.3", "seed=1").with_name("other-test")
    assert {row["prompt"] for row in read_rows(other, pattern="pairs-*.parquet")} != prompts[1]
    assert next(iter(PairsData(path=train).read())).prompt not in prompts[1], "training reads one folder, not both"


def test_shuffled_labels_are_right_half_of_the_time(tmp_path: Path) -> None:
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [_row(f"prompt {i}", k, 1 + i % 50 + 100 * k) for i in range(200) for k in range(2)]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    score.run(load(ScoreConfig, None, [f"path={folder}", "scorers=[brightness]", "device=cpu"]))
    shuffled = _pair(folder, "shuffled", "shuffle_labels=true")
    found = [pair for pair in PairsData(path=shuffled).read() if isinstance(pair, PreferencePair)]
    right = [it.chosen_scores["brightness"] > it.rejected_scores["brightness"] for it in found]
    assert 70 <= sum(right) <= 130, "five standard deviations"
    assert all(it.margin is None for it in found)
    assert all(
        decode_rgb(it.chosen).getpixel((0, 0)) == (round(it.chosen_scores["brightness"] * 255),) * 3 for it in found
    )
    assert json.loads((shuffled / "manifest.json").read_text())["labelled_by"] == []


def test_the_users_photograph_is_chosen_as_a_generated_image_is_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "candidates"
    folder.mkdir()
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    file = io.BytesIO()
    wide.save(file, "JPEG", quality=95)
    references = [image_struct(file.getvalue()), image_struct(b"not an image")]
    rows = [_row("A", k, 40 * k + 9) | {"references": references} for k in range(2)] + [_row("B", 0, 8)]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    pairs = list(PairsData(path=_pair(folder, "pairs", "strategy=real_vs_generated")).read())
    assert "pairs with a broken photograph" in capsys.readouterr().out
    assert {it.rejected_uid for it in pairs} == {pixel_hash(_image(9)), pixel_hash(_image(49))}
    chosen = decode_rgb(pairs[0].chosen)
    assert chosen.size == (32, 32)
    assert pairs[0].chosen.startswith(b"\x89PNG")
    assert np.abs(np.asarray(chosen)[8:24, 8:24] - np.array([0, 0, 255])).mean() < 10, "its middle, not squashed"
    assert pairs[0].chosen_origin == {"model": "photograph"}
    assert json.loads((folder.parent / "pairs" / "manifest.json").read_text())["num_pairs"] == 2


def test_images_of_other_settings_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [_row("A", k, 40 * k + 9) | {"settings_hash": str(k)} for k in range(2)]
    write_shard(folder / "images-00000.parquet", rows, CANDIDATES)
    score.run(load(ScoreConfig, None, [f"path={folder}", "scorers=[brightness]", "device=cpu"]))
    _pair(folder)
    assert "made with 2 different settings" in capsys.readouterr().out


def test_the_blind_sheet_may_be_asked_for_later(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _pair(candidates)
    assert not (folder / "audit.html").exists()
    _pair(candidates, "pairs", "audit=1")
    out = capsys.readouterr().out
    assert "all 2 pairs are there already" in out
    assert f"blind sheet: {folder / 'audit.html'}" in out
    (key,) = map(json.loads, (folder / "audit.jsonl").read_text().splitlines())
    assert key["pair_id"] in {row["pair_id"] for row in read_rows(folder, pattern="pairs-*.parquet")}
    assert len(list(PairsData(path=folder).read())) == 2


def test_settings_that_would_do_nothing_are_refused(candidates: Path) -> None:
    with pytest.raises(ConfigError, match="metric=brightness would do nothing: weighted names its metrics itself"):
        _pair(candidates, "x", "metric=brightness", "strategy={type: weighted, weights: {brightness: 1}}")
    with pytest.raises(ConfigError, match="higher_is_better=False would do nothing: weighted"):
        _pair(candidates, "x", "higher_is_better=false", "strategy={type: weighted, weights: {brightness: 1}}")
    with pytest.raises(ConfigError, match=r"output_dir .* lies inside .*; choose another one"):
        pair.run(load(PairConfig, None, [f"path={candidates}", f"output_dir={candidates / 'pairs'}"]))
    with pytest.raises(ConfigError, match=r"leaves no prompts to (train on|test with): only 2 prompts have pairs"):
        _pair(candidates, "x", "test_share=0.001")
    assert not (candidates.parent / "x").exists()


def test_a_gate_has_a_say_in_the_labels_and_may_be_unscored(
    candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in candidates.glob("scores-brightness*"):  # a second judge, whose scores of one shard are lost
        text = path.name.replace("brightness", "twin")
        if path.suffix == ".json":
            (candidates / text).write_text(
                path.read_text().replace('"brightness"', '"twin"').replace("none", "no use")
            )
        elif "00001" not in text:
            write_shard(candidates / text, [row | {"metric": "twin"} for row in read_rows(path)], SCORES)
    gate = "strategy={type: gate, gates: [{metric: twin, min: 0.1}], failed: lose, then: all_pairs}"
    folder = _pair(candidates, "pairs", "metric=brightness", gate)
    assert "8 images were not scored by twin" in capsys.readouterr().out
    rows = list(read_rows(folder, pattern="pairs-*.parquet"))
    scored = {pixel_hash(_image(value)) for value in (40, 200, 10)}
    assert {row[side] for row in rows for side in ("chosen_uid", "rejected_uid")} <= scored
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["labelled_by"] == ["brightness", "twin"]
    assert "no use" in manifest["licence"]
