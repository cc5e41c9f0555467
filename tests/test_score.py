"""`score` over candidates, foreign Parquet and folders: complete, cached, resumable, honest about broken images."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion_dpo import score, scoring
from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.data import PreferencePair
from diffusion_dpo.data.images import decode_rgb, pixel_hash
from diffusion_dpo.data.pairs import PairsData
from diffusion_dpo.data.shards import CANDIDATES, encode_png, image_struct, read_rows, write_shard
from diffusion_dpo.files import alone_in
from diffusion_dpo.pocket.world import distinct_scenes, render
from diffusion_dpo.scorers import Metric, Need, Scorer, ScoreRequest, Scores
from diffusion_dpo.settings import ScoreConfig
from tests.galleries import graph, infotext, png

ME = "tests.test_score:Counting" if __name__.startswith("tests.") else f"{__name__}:Counting"


class Counting(Scorer):
    """Brightness that counts what it is asked; `version` is its fingerprint, the two `after` are sudden ends."""

    licence = "none"
    version: str = "1"
    lower: bool = False
    stop_after: int = 10**9
    kill_after: int = 10**9
    hang_after: int = 10**9
    wants_prompt: bool = False
    fails: tuple[int, ...] = ()

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"prompt"}) if self.wants_prompt else frozenset()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (
            Metric("counting", higher_is_better=not self.lower, range=(0.0, float("inf"))),
            Metric("width_px", higher_is_better=True, range=(0.0, 1e6), auxiliary=True),
        )

    def fingerprint(self) -> str:
        return self.version

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        judged.extend(request.prompt for request in batch)
        if len(judged) > self.stop_after:
            raise KeyboardInterrupt
        if len(judged) > self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(judged) > self.hang_after:
            time.sleep(5)
        if any(hash_of(request.image) in self.fails for request in batch):
            raise RuntimeError("no")
        values = np.array([np.asarray(request.image).mean() for request in batch])
        return Scores({"counting": values, "width_px": np.array([float(r.image.width) for r in batch])})


judged: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_judged() -> None:
    judged.clear()


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Three shards of four candidates, two a prompt."""
    folder = tmp_path / "candidates"
    folder.mkdir()
    rng = np.random.default_rng(0)
    scenes = [scene for scene, _ in zip(distinct_scenes(0), range(6), strict=False)]
    rows = [_row(render(scene, rng), scene.caption, index) for scene in scenes for index in range(2)]
    for number in range(3):
        write_shard(folder / f"images-{number:05d}.parquet", rows[4 * number : 4 * number + 4], CANDIDATES)
    return folder


def hash_of(image: Image.Image) -> int:
    return int(pixel_hash(image)[:6], 16)


def _row(image: Image.Image, prompt: str, index: int) -> dict[str, Any]:
    return {
        "uid": pixel_hash(image),
        "prompt_id": f"id of {prompt}",
        "prompt": prompt,
        "index": index,
        "seed": index,
        "image": image_struct(encode_png(image)),
        "references": [],
        "origin": "",
        "settings_hash": "0",
    }


def _score(path: Path, *overrides: str) -> Path:
    return score.run(load(ScoreConfig, None, [f"path={path}", "device=cpu", *overrides]))


def _counting(**settings: object) -> str:
    return f"scorers={json.dumps([{'type': ME, **settings}])}"


def _snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.glob("*.parquet"))}


def _values(folder: Path, metric: str) -> list[float]:
    return [row["value"] for row in read_rows(folder, pattern="scores-*.parquet") if row["metric"] == metric]


def test_every_candidate_gets_every_metric(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _score(candidates, "scorers=[brightness, pocket_scene]", "batch_size=3") == candidates
    assert len(list(candidates.glob("scores-brightness-0000?.parquet"))) == 3
    images = list(read_rows(candidates, pattern="images-*.parquet"))
    for metric in ("brightness", "pocket_scene", "pocket_scene_all"):
        rows = [row for row in read_rows(candidates, pattern="scores-*.parquet") if row["metric"] == metric]
        assert [row["uid"] for row in rows] == [row["uid"] for row in images]
    assert _values(candidates, "pocket_scene_all") == [1.0] * 12
    expected = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("L")).mean() / 255 for row in images]
    np.testing.assert_allclose(_values(candidates, "brightness"), expected)
    out = capsys.readouterr().out
    assert "brightness " in out
    assert f"next: diffusion-dpo pair path={candidates} metric=brightness" in out


def test_a_rerun_judges_nothing_loads_nothing_and_touches_nothing(
    candidates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _score(candidates, _counting())
    before = _snapshot(candidates)
    judged.clear()
    monkeypatch.setattr(Counting, "load", lambda self, device: pytest.fail("loaded for nothing"))
    _score(candidates, _counting())
    assert judged == []
    assert _snapshot(candidates) == before


def test_a_changed_fingerprint_judges_again(candidates: Path) -> None:
    _score(candidates, _counting())
    judged.clear()
    _score(candidates, _counting(version="2"))
    assert len(judged) == 12
    assert {row["fingerprint"] for row in read_rows(candidates, pattern="scores-*.parquet")} == {"2"}
    assert len(_values(candidates, "counting")) == 12


def test_an_interrupted_run_leaves_whole_shards_and_continues(candidates: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _score(candidates, _counting(stop_after=6), "batch_size=2")
    shards = sorted(path.name for path in candidates.glob("*scores*.parquet*"))
    assert shards == ["scores-counting-00000.parquet"], "a shard is whole or absent, hidden files included"
    before = _snapshot(candidates)
    judged.clear()
    _score(candidates, _counting(), "batch_size=2")
    assert len(judged) == 8
    after = _snapshot(candidates)
    assert after["scores-counting-00000.parquet"] == before["scores-counting-00000.parquet"]
    assert len(_values(candidates, "counting")) == 12


def test_a_killed_process_leaves_whole_shards(candidates: Path) -> None:
    command = f"""
from diffusion_dpo import score, scoring
from diffusion_dpo.config import load
from diffusion_dpo.settings import ScoreConfig
score.run(load(ScoreConfig, None, ["path={candidates}", "device=cpu", {_counting(kill_after=6)!r}]))
"""
    here = Path(__file__).parents[ME.count(".")]
    done = subprocess.run([sys.executable, "-c", command], cwd=here, env={**os.environ, "PYTHONPATH": str(here)})
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in candidates.glob("scores-*.parquet")] == ["scores-counting-00000.parquet"]
    _score(candidates, _counting())
    assert len(judged) == 8
    assert len(_values(candidates, "counting")) == 12


def test_a_damaged_score_shard_is_made_again(candidates: Path) -> None:
    _score(candidates, _counting())
    before = _snapshot(candidates)
    (candidates / "scores-counting-00001.parquet").write_bytes(b"PAR1")
    judged.clear()
    _score(candidates, _counting())
    assert len(judged) == 4
    assert {k: v[1] for k, v in _snapshot(candidates).items()} == {k: v[1] for k, v in before.items()}


def test_the_same_image_costs_nothing_wherever_it_lies(tmp_path: Path, candidates: Path) -> None:
    rows = list(read_rows(candidates, pattern="images-*.parquet"))
    _score(candidates, _counting())
    judged.clear()
    (candidates / "images-00002.parquet").unlink()
    write_shard(candidates / "images-00001.parquet", rows[::-1][:6], CANDIDATES)  # another order, other portions
    _score(candidates, _counting())
    assert judged == []


def test_the_same_image_under_another_prompt_is_judged_by_that_prompt(tmp_path: Path) -> None:
    image = render(next(distinct_scenes(0)), np.random.default_rng(0))
    right = next(distinct_scenes(0)).caption
    rows = [_row(image, right, 0), _row(image, "a red circle on a red background", 0)]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    _score(tmp_path, "scorers=[pocket_scene]")
    first, second = _values(tmp_path, "pocket_scene")
    assert first == 1
    assert second < 1


def test_the_facts_of_the_metrics_lie_beside_the_scores(candidates: Path) -> None:
    _score(candidates, _counting(lower=True))
    facts = json.loads((candidates / "scores-counting.json").read_text())
    assert facts["fingerprint"] == "1"
    assert facts["licence"] == "none"
    assert facts["metrics"][0] == {
        "name": "counting",
        "higher_is_better": False,
        "range": [0.0, None],
        "auxiliary": False,
    }
    assert facts["metrics"][1]["auxiliary"] is True


def test_a_foreign_parquet_without_prompts(tmp_path: Path) -> None:
    images = [Image.new("RGB", (32 + i, 40), (20 * i, 9, 0)) for i in range(5)]
    file = tmp_path / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [encode_png(image) for image in images]}), file)
    _score(file, _counting())
    assert _values(tmp_path, "width_px") == [32, 33, 34, 35, 36]
    assert (tmp_path / "scores-counting-train-00000-of-00001.parquet").is_file()
    judged.clear()
    _score(tmp_path, _counting())
    assert judged == []
    with pytest.raises(ConfigError, match=r"pocket_scene needs a prompt .* 5 of 5 images have none"):
        _score(file, "scorers=[pocket_scene]")


def test_a_large_file_is_kept_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "IMAGES_PER_SHARD", 2)
    images = [Image.new("RGB", (32 + i, 40), (20 * i, 9, 0)) for i in range(5)]
    pq.write_table(pa.table({"image": [encode_png(image) for image in images]}), tmp_path / "train.parquet")
    with pytest.raises(KeyboardInterrupt):
        _score(tmp_path, _counting(stop_after=4), "batch_size=2")
    kept = [path.name for path in sorted(tmp_path.glob("scores-*.parquet"))]
    assert kept == ["scores-counting-train.0000.parquet", "scores-counting-train.0001.parquet"]
    judged.clear()
    _score(tmp_path, _counting(), "batch_size=2")
    assert len(judged) == 1
    assert _values(tmp_path, "width_px") == [32, 33, 34, 35, 36]
    before = _snapshot(tmp_path)
    _score(tmp_path, _counting())
    assert _snapshot(tmp_path) == before


def test_a_folder_of_image_files_with_captions(tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "scores"
    (folder / "more").mkdir(parents=True)
    Image.new("L", (40, 40), 200).save(folder / "a.png")
    Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(folder / "b.PNG")
    Image.new("CMYK", (60, 40)).save(folder / "more" / "c.jpg")
    (folder / "b.txt").write_text("a clear pane\n")
    before = sorted(folder.rglob("*"))
    _score(folder, _counting(), f"output_dir={out}")
    assert _values(out, "width_px") == [40, 50, 60]
    assert judged == ["", "a clear pane", ""]
    assert sorted(folder.rglob("*")) == before
    assert json.loads((out / "manifest.json").read_text())["made_by"] == "score"


def test_scores_elsewhere_go_by_the_images_wherever_they_lie(candidates: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    _score(candidates, _counting(), f"output_dir={out}")
    shard = next(out.glob("scores-*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-8])  # damaged: it is judged again, and is no reason to refuse
    candidates.rename(tmp_path / "moved")
    judged.clear()
    _score(tmp_path / "moved", _counting(), f"output_dir={out}")
    assert 0 < len(judged) < sum(1 for _ in read_rows(tmp_path / "moved", pattern="images-*.parquet"))
    other = tmp_path / "other"
    other.mkdir()
    write_shard(other / "images-00000.parquet", [_row(Image.new("RGB", (77, 32), "blue"), "p", 0)], CANDIDATES)
    with pytest.raises(ConfigError, match="holds scores of other images; choose another output_dir"):
        _score(other, _counting(), f"output_dir={out}")


def test_references_are_part_of_what_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (32, 32), "red")
    good = _row(image, "p", 0) | {"references": [image_struct(encode_png(image))]}
    bad = _row(image, "p", 1) | {"references": [{"bytes": None, "path": "/etc/passwd"}]}
    write_shard(tmp_path / "images-00000.parquet", [good, bad], CANDIDATES)
    _score(tmp_path, _counting(), "max_broken_share=0.5")
    assert _values(tmp_path, "width_px") == [32, None]
    assert "reference is broken" in capsys.readouterr().out


def test_broken_images_are_named_counted_and_never_a_number(
    candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = list(read_rows(candidates / "images-00001.parquet"))
    rows[1] |= {"uid": "x", "image": image_struct(rows[1]["image"]["bytes"][:60])}
    rows[2] |= {"uid": "y", "image": {"bytes": None, "path": "/etc/passwd"}}
    write_shard(candidates / "images-00001.parquet", rows, CANDIDATES)
    _score(candidates, _counting(), "max_broken_share=0.2")
    out = capsys.readouterr().out
    assert "skipped images-00001.parquet row 1:" in out
    assert "skipped images-00001.parquet row 2: a path instead of image bytes" in out
    assert "1 missing: broken image: a path instead of image bytes" in out
    assert _values(candidates, "counting").count(None) == 2
    with pytest.raises(ConfigError, match=r"2 of 12 images .* more than max_broken_share=0\.1"):
        _score(candidates, _counting(), "max_broken_share=0.1")


@pytest.mark.parametrize("name", ["nothing.parquet", "nowhere"])
def test_no_such_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"no file or folder .*{name}"):
        _score(tmp_path / name, "scorers=[brightness]")


def test_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither Parquet files nor images"):
        _score(tmp_path, "scorers=[brightness]")
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="has no column 'image'"):
        _score(tmp_path, "scorers=[brightness]")


class Contrast(Scorer):
    """How much brighter an image is than the other images of its prompt; fails on a red of `hates`."""

    licence = "none"
    hates: int = -1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rivals"})

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return (Metric("contrast", higher_is_better=True, range=(-255.0, 255.0)),)

    def fingerprint(self) -> str:
        return "1"

    def score(self, batch: Sequence[ScoreRequest]) -> Scores:
        values, reasons = [], []
        for request in batch:
            judged.append(request.prompt)
            if np.asarray(request.image)[0, 0, 0] == self.hates:
                raise RuntimeError("hated")
            others = [np.asarray(rival).mean() for rival in request.rivals]
            values.append(np.asarray(request.image).mean() - np.mean(others) if others else np.nan)
            reasons.append("" if others else "the only image of its prompt")
        return Scores({"contrast": np.array(values)}, tuple(reasons))


def _contrast(hates: int = -1) -> str:
    return f"scorers={json.dumps([{'type': ME.replace('Counting', 'Contrast'), 'hates': hates}])}"


def _grey(*values: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 32), (value, value, value)) for value in values]


def test_rivals_are_the_other_images_of_a_prompt_wherever_they_lie(tmp_path: Path) -> None:
    a, b, c = _grey(10, 20, 60)
    rows = [_row(a, "p", 0), _row(b, "p", 1), _row(b, "p", 2), _row(c, "p", 3), _row(c, "alone", 0)]
    write_shard(tmp_path / "images-00000.parquet", rows[:2], CANDIDATES)
    write_shard(tmp_path / "images-00001.parquet", rows[2:], CANDIDATES)
    _score(tmp_path, _contrast())
    assert _values(tmp_path, "contrast") == [10 - 40, 20 - 35, 20 - 35, 60 - 15, None]
    before = _snapshot(tmp_path)
    judged.clear()
    _score(tmp_path, _contrast())
    assert judged == []
    assert {k: v[1] for k, v in _snapshot(tmp_path).items()} == {k: v[1] for k, v in before.items()}
    write_shard(tmp_path / "images-00002.parquet", [_row(_grey(90)[0], "p", 4)], CANDIDATES)
    _score(tmp_path, _contrast())
    assert _values(tmp_path, "contrast")[0] == pytest.approx(10 - (20 + 60 + 90) / 3), "one rival more"


def test_an_image_that_makes_a_scorer_fail_is_marked_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_row(image, "p", i) for i, image in enumerate(_grey(10, 20, 60))]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    with pytest.raises(ConfigError, match=r"1 of 3 images .* make contrast fail.*RuntimeError: hated"):
        _score(tmp_path, _contrast(hates=20))
    _score(tmp_path, _contrast(hates=20), "max_broken_share=0.5")
    assert "1 missing: the scorer failed: RuntimeError: hated" in capsys.readouterr().out
    judged.clear()
    _score(tmp_path, _contrast())
    assert len(judged) == 1
    assert _values(tmp_path, "contrast") == [-30, -15, 45]


def test_a_black_image_is_no_image(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(candidates / "images-00003.parquet", [_row(_grey(0)[0], "p", 0)], CANDIDATES)
    _score(candidates, _counting())
    assert _values(candidates, "counting")[-1] is None
    assert "1 missing: black all over" in capsys.readouterr().out


def test_a_rerun_imports_nothing_heavy(candidates: Path) -> None:
    """Served from the cache it takes a tenth of a second; torch alone would take two."""
    _score(candidates, "scorers=[clip, pocket_scene]")
    before = _snapshot(candidates)
    code = (
        "import sys; from diffusion_dpo.__main__ import main; "
        f"assert main(['score', 'path={candidates}', 'scorers=[clip, pocket_scene]']) == 0; "
        "print('heavy:', {'torch', 'open_clip', 'transformers'} & sys.modules.keys())"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: set()" in again.stdout
    assert _snapshot(candidates) == before


def test_two_at_once_are_told_apart(candidates: Path) -> None:
    with alone_in(candidates), pytest.raises(ConfigError, match="another process is working in"):
        _score(candidates, _counting())
    _score(candidates, _counting())


def test_images_that_always_fail_do_not_fail_the_rerun(candidates: Path) -> None:
    images = [decode_rgb(row["image"]["bytes"]) for row in read_rows(candidates, pattern="images-*.parquet")]
    settings = {"fails": [hash_of(images[i]) for i in (0, 1, 5)]}
    for _ in range(2):
        _score(candidates, _counting(**settings), "batch_size=2", "max_broken_share=0.5")
        assert _values(candidates, "counting").count(None) == 3


def test_what_was_judged_before_the_end_is_kept(tmp_path: Path) -> None:
    rows = [_row(image, "p", i) for i, image in enumerate(_grey(*range(10, 34)))]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    with pytest.raises(ConfigError, match="gave no answer"):
        _score(tmp_path, _counting(hang_after=10), "batch_size=4", "batch_timeout_seconds=0.3")
    assert len(_values(tmp_path, "counting")) == 8
    judged.clear()
    _score(tmp_path, _counting(), "batch_size=4")
    assert len(judged) == 16
    assert len(_values(tmp_path, "counting")) == 24


def test_what_is_lacking_is_said_before_anything_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lacking, share, message in [
        ({20, 21}, 0.05, r"Counting needs a prompt, and 2 of 24 .*max_broken_share=0\.05: .* row 20 \(no prompt\), "),
        ({20}, 0, r"1 of 24 images have none"),
        (set(range(24)), 1, r"needs a prompt for every image, and 24 of 24 .* first .* row 0 .*prompt_column"),
    ]:
        rows = [_row(image, "" if i in lacking else "p", i) for i, image in enumerate(_grey(*range(10, 34)))]
        write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
        with pytest.raises(ConfigError, match=message):
            _score(tmp_path, _counting(wants_prompt=True), f"max_broken_share={share}")
        assert judged == []
    rows = [_row(image, "p" if i else "", i) for i, image in enumerate(_grey(10, 20, 30))]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    _score(tmp_path, _counting(wants_prompt=True))
    assert _values(tmp_path, "counting") == [None, 20, 30]
    out = capsys.readouterr().out
    assert "1 of 3 images have no prompt and get no counting: images-00000.parquet row 0 (no prompt)" in out
    assert "1 missing: without a prompt: no prompt" in out


def test_a_run_that_fails_does_not_hide_the_scores_that_are_there(candidates: Path) -> None:
    _score(candidates, _counting())
    facts = (candidates / "scores-counting.json").read_text()
    with pytest.raises(KeyboardInterrupt):
        _score(candidates, _counting(version="2", stop_after=0))
    assert (candidates / "scores-counting.json").read_text() == facts


def test_files_of_like_names_keep_their_scores_apart(tmp_path: Path) -> None:
    for name, value in (("images-a", 50), ("a", 60), ("b/train", 70), ("b-train", 80)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / f"{name}.parquet", [_row(_grey(value)[0], "p", 0)], CANDIDATES)
    for _ in range(2):
        _score(tmp_path, _counting())
        assert sorted(_values(tmp_path, "counting")) == [50, 60, 70, 80]
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(_grey(10, 20)):
        image.save(folder / f"{i}.png")
    _score(folder, _counting())
    _score(folder / "1.png", _counting())
    assert {10, 20} <= set(_values(folder, "counting"))


def test_the_same_prompt_under_two_ids_is_one_prompt(tmp_path: Path) -> None:
    rows = [_row(image, "p", i) | {"prompt_id": str(i % 2)} for i, image in enumerate(_grey(50, 60, 200))]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    _score(tmp_path, _contrast())
    assert _values(tmp_path, "contrast") == [50 - 130, 60 - 125, 200 - 55]


def test_a_black_image_is_no_rival(tmp_path: Path) -> None:
    rows = [_row(image, "p", i) for i, image in enumerate(_grey(0, 100, 200))]
    write_shard(tmp_path / "images-00000.parquet", rows, CANDIDATES)
    _score(tmp_path, _contrast())
    assert _values(tmp_path, "contrast") == [None, -100, 100]


def test_a_candidate_without_a_uid_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "images-00000.parquet", [_row(_grey(5)[0], "p", 0) | {"uid": None}], CANDIDATES)
    with pytest.raises(ConfigError, match=r"images-00000\.parquet row 0 has no uid"):
        _score(tmp_path, _counting())


def test_a_gallery_is_scored_and_paired_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        image = Image.new("RGB", (40, 40), (20 * number + 10, 0, 0))
        prompt = f"a prompt {number % 3}"
        texts = {"parameters": infotext(prompt, seed=number)} if number % 2 else {"prompt": json.dumps(graph(prompt))}
        name = Path("gallery") / f"{number % 2}" / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(png(texts, image))
    assert main(["score", "path=gallery", "scorers=[brightness]"]) == 0
    assert main(["pair", "path=gallery", "output_dir=pairs"]) == 0
    pairs = list(PairsData(path=Path("pairs")).read())
    assert sorted(it.prompt for it in pairs if isinstance(it, PreferencePair)) == [f"a prompt {i}" for i in range(3)]
    for pair in pairs:
        assert isinstance(pair, PreferencePair)
        models = {pair.chosen_origin["model"], pair.rejected_origin["model"]}
        assert models == {"dreamshaper_8", "v1-5.safetensors"}, "what made them is known to inspect"
