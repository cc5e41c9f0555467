"""`pair`: the choice of pairs as a pure function, then the verb over scored candidates."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_dpo import pair, score
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import pixel_hash
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.shards import CANDIDATES, SCORES, encode_png, image_struct, read_rows, write_shard
from diffusion_dpo.pair import CAPPED, DUPLICATE, EQUAL, NARROW, NO_PROMPT, NO_SCORE, TOO_FEW, pick_pairs
from diffusion_dpo.settings import PairConfig, ScoreConfig

NAN = float("nan")


def _picks(values: list[float], **settings: object) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Pick with uids a, b, c, ...; return positions and drops."""
    uids = [chr(ord("a") + i) for i in range(len(values))]
    picks, drops = pick_pairs(uids, values, **{"higher_is_better": True, **settings})
    return [(pick.chosen, pick.rejected) for pick in picks], dict(drops)


def test_best_against_worst() -> None:
    assert _picks([0.2, 0.9, 0.1, 0.5]) == ([(1, 2)], {})
    assert _picks([0.2, 0.9, 0.1, 0.5], higher_is_better=False) == ([(2, 1)], {})


def test_top_against_bottom() -> None:
    picks, drops = _picks([4.0, 3.0, 2.0, 1.0, 0.0], top_k=2)
    assert picks == [(0, 4), (0, 3), (1, 4), (1, 3)]
    assert drops == {}


def test_the_halves_never_overlap() -> None:
    assert _picks([3.0, 2.0, 1.0], top_k=10) == ([(0, 2)], {})


def test_scores_are_numbers_not_words() -> None:
    assert _picks([9.0, 10.0]) == ([(1, 0)], {})


def test_missing_is_not_a_number() -> None:
    assert _picks([0.5, NAN, -3.0, float("inf")]) == ([(0, 2)], {NO_SCORE: 2})
    assert _picks([NAN, 1.0]) == ([], {NO_SCORE: 1, TOO_FEW: 1})
    assert _picks([]) == ([], {TOO_FEW: 1})


def test_equal_scores_make_no_pair() -> None:
    assert _picks([0.5, 0.5]) == ([], {EQUAL: 1})
    assert _picks([0.0, -0.0]) == ([], {EQUAL: 1})
    picks, drops = _picks([1.0, 1.0, 1.0, 0.0], top_k=2)
    assert picks == [(0, 3), (1, 3)]
    assert drops == {EQUAL: 2}


def test_the_same_image_counts_once() -> None:
    picks, drops = pick_pairs(["a", "a", "b"], [1.0, 1.0, 0.0], higher_is_better=True)
    assert [(p.chosen, p.rejected) for p in picks] == [(0, 2)]
    assert drops == {DUPLICATE: 1}
    assert pick_pairs(["a", "a"], [1.0, 1.0], higher_is_better=True) == ([], Counter({DUPLICATE: 1, TOO_FEW: 1}))


def test_margin_is_in_the_units_of_the_metric_and_inclusive() -> None:
    assert _picks([1.0, 0.5], min_margin=0.5) == ([(0, 1)], {})
    assert _picks([1.0, 0.5], min_margin=0.51) == ([], {NARROW: 1})
    assert pick_pairs(["a", "b"], [1.0, 3.5], higher_is_better=False)[0][0].margin == 2.5


def test_the_cap_keeps_the_widest() -> None:
    picks, drops = _picks([4.0, 3.0, 1.0, 0.0], top_k=2, max_pairs=2)
    assert picks == [(0, 3), (0, 2)]
    assert drops == {CAPPED: 2}


@pytest.mark.parametrize("seed", range(40))
def test_laws(seed: int) -> None:
    """Whatever the scores: order and direction are conventions, and every possible pair is kept or counted."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))
    values = rng.integers(0, 6, count).astype(float)  # ties are common
    values[rng.random(count) < 0.15] = NAN
    uids = [f"{i:02d}" for i in rng.permutation(count)]
    settings = {
        "top_k": [None, 1, 2, 3][seed % 4],
        "min_margin": [0.0, 2.0][seed % 2],
        "max_pairs": [None, 2][seed // 2 % 2],
    }

    def named(order: np.ndarray, sign: float, higher: bool) -> tuple[list[tuple[str, str, float]], Counter[str]]:
        names = [uids[i] for i in order]
        picks, drops = pick_pairs(names, list(sign * values[order]), higher_is_better=higher, **settings)
        return [(names[p.chosen], names[p.rejected], p.margin) for p in picks], drops

    straight = np.arange(count)
    picks, drops = named(straight, 1, True)
    assert named(rng.permutation(count), 1, True) == (picks, drops), "the order of the images"
    assert named(straight, -1, False) == (picks, drops), "the sign of the metric"
    flipped, flipped_drops = named(straight, 1, False)
    assert flipped_drops == drops
    if settings["max_pairs"] is None:
        assert sorted((b, a, m) for a, b, m in flipped) == sorted(picks), "the direction swaps chosen and rejected"
    score_of = dict(zip(uids, values, strict=True))
    for chosen, rejected, margin in picks:
        assert margin == score_of[chosen] - score_of[rejected] > 0
        assert margin >= settings["min_margin"]
    assert len(set(picks)) == len(picks)
    usable = int(np.isfinite(values).sum())
    k = min(settings["top_k"] or 1, usable // 2)
    assert len(picks) + drops[EQUAL] + drops[NARROW] + drops[CAPPED] == k * k
    assert drops[TOO_FEW] == (usable < 2)
    assert picks == sorted(picks, key=lambda p: -p[2])


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


def test_a_folder_of_other_pairs_is_left_alone(candidates: Path) -> None:
    _pair(candidates)
    with pytest.raises(ConfigError, match=r"min_margin: 0\.0 then, 0\.5 now"):
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
