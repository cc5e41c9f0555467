"""`compare` on tiny pipelines: with itself, swapped, repeated, interrupted, and what training says of its pairs."""

import json
import shutil
from itertools import islice
from pathlib import Path

import pytest

from diffusion_dpo import compare
from diffusion_dpo.compare import trained_on_metrics
from diffusion_dpo.config import ConfigError, validate
from diffusion_dpo.data.prompts import prompt_hash
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.files import write_json
from diffusion_dpo.pocket.world import distinct_scenes
from diffusion_dpo.report import Report
from diffusion_dpo.settings import CompareConfig
from tests.fakes import make_stable_diffusion

PROMPTS = 34  # with two seeds: a whole shard of 64 and a rest


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return make_stable_diffusion(root / "a", seed=0), make_stable_diffusion(root / "b", seed=1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{chr(97 + i % 26)} {chr(97 + i // 26)}" for i in range(PROMPTS)), encoding="utf-8")
    return path


def config(first: Path, second: Path, output_dir: Path, **changes: object) -> CompareConfig:
    """A comparison on four held-out captions of the pocket world."""
    captions = first.parent / "captions.txt"
    captions.write_text("\n".join(scene.caption for scene in islice(distinct_scenes(0, held_out=True), 4)))
    settings = {
        "prompts_path": str(captions),
        "before": {"pretrained": str(first)},
        "after": {"pretrained": str(second)},
        "num_prompts": 4,
        "sampling": {"num_inference_steps": 1, "resolution_px": 32, "batch_size": 16},
        "scorers": ["brightness"],
        "output_dir": str(output_dir),
    }
    return validate(CompareConfig, settings | changes, where="the test")


def run(settings: CompareConfig) -> Report:
    page = compare.run(settings)
    assert page.name == "report.html" and page.exists()
    return Report.model_validate_json((settings.output_dir / "report.json").read_text("utf-8"))


def test_a_model_against_itself_ties_everywhere(models: tuple[Path, Path], tmp_path: Path) -> None:
    report = run(config(models[0], models[0], tmp_path / "same"))
    (metric,) = report.metrics
    assert (metric.wins, metric.ties, metric.losses) == (0, 8, 0)
    assert metric.mean_difference == 0 and metric.mean_difference_interval == (0, 0) and metric.win_rate == 0.5


def test_swapping_the_models_flips_every_sign(models: tuple[Path, Path], tmp_path: Path) -> None:
    (there,) = run(config(*models, tmp_path / "ab")).metrics
    (back,) = run(config(*models[::-1], tmp_path / "ba")).metrics
    assert there.mean_difference and back.mean_difference == -there.mean_difference
    assert there.mean_difference_interval and back.mean_difference_interval
    assert back.mean_difference_interval == tuple(-bound for bound in reversed(there.mean_difference_interval))
    assert (back.wins, back.losses) == (there.losses, there.wins)
    assert back.win_rate == pytest.approx(1 - (there.win_rate or 0))


def test_a_rerun_draws_and_judges_nothing_and_an_interrupted_run_goes_on(
    models: tuple[Path, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(*models, tmp_path / "run", prompts_path=str(prompts), num_prompts=PROMPTS)
    whole = config(*models, tmp_path / "whole", prompts_path=str(prompts), num_prompts=PROMPTS)
    draw, batches = compare.draw, 0

    def failing(*arguments: object) -> object:
        nonlocal batches
        batches += 1
        if batches == 7:  # before: 4 batches and 1; after: stopped in the first shard
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(compare, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        compare.run(settings)
    assert sorted(p.name for p in (tmp_path / "run" / "before").iterdir()) == [
        "images-00000.parquet",
        "images-00001.parquet",
    ]
    assert not list((tmp_path / "run" / "after").iterdir())
    resumed = run(settings)
    assert batches == 7 + 5  # only the second model's

    monkeypatch.setattr(compare, "draw", draw)
    assert run(whole).metrics == resumed.metrics
    uids = [
        [row["uid"] for row in read_rows(tmp_path / name, ["uid"], "images-*.parquet")] for name in ("run", "whole")
    ]
    assert uids[0] == uids[1] and len(uids[0]) == 2 * 2 * PROMPTS

    page = (tmp_path / "run" / "report.html").read_bytes()
    monkeypatch.setattr(compare, "draw", None)
    monkeypatch.setattr("diffusion_dpo.scoring.Judge", None)
    assert run(settings) == resumed
    assert (tmp_path / "run" / "report.html").read_bytes() == page


def test_a_new_scorer_reuses_the_images(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(*models, tmp_path))
    monkeypatch.setattr(compare, "draw", None)
    report = run(config(*models, tmp_path, scorers=["brightness", "pocket_scene"]))
    assert [metric.name for metric in report.metrics] == ["brightness", "pocket_scene", "pocket_scene_all"]
    assert report.prompt_set == "held-out prompts"


def test_prompts_that_were_trained_on_are_counted(
    models: tuple[Path, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(models[1] / "unet", trained / "unet")
    seen = prompts.read_text(encoding="utf-8").splitlines()[:3]
    write_json(trained / "manifest.json", {"made_by": "train", "prompt_hashes": [prompt_hash(text) for text in seen]})
    after = {"pretrained": str(models[0]), "adapter_path": str(trained)}
    report = run(config(*models, tmp_path / "run", prompts_path=str(prompts), after=after))
    assert (report.num_prompts_trained_on, report.num_prompts, report.prompt_set) == (3, 4, "prompts")
    assert "3 of 4 prompts were in the training pairs" in " ".join(capsys.readouterr().out.split())
    assert run(config(*models, tmp_path / "new", after=after)).num_prompts_trained_on == 0


def test_images_that_cannot_be_scored_are_counted_and_left_out(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\nno scene\n", encoding="utf-8")
    report = run(config(*models, tmp_path / "run", prompts_path=str(path), scorers=["pocket_scene"]))
    assert (report.metrics[0].num_prompts, report.metrics[0].num_missing) == (1, 2)
    assert report.metrics[0].mean_difference_interval is None


def test_other_weights_at_the_same_path_are_another_comparison(models: tuple[Path, Path], tmp_path: Path) -> None:
    model = make_stable_diffusion(tmp_path / "model", seed=3)
    run(config(models[0], model, tmp_path / "run"))
    make_stable_diffusion(tmp_path / "model", seed=4)
    with pytest.raises(ConfigError, match="belongs to another run"):
        compare.run(config(models[0], model, tmp_path / "run"))


def test_roles_come_from_the_training_run(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"made_by": "train", "labelled_by": ["clip"]})
    (tmp_path / "adapter").mkdir()
    weights = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"")
    for path in (tmp_path, tmp_path / "adapter", weights):
        assert trained_on_metrics(path) == ("clip",)
    assert trained_on_metrics(tmp_path / "adapter" / "deeper" / "still") == ()


def test_a_scorer_that_labelled_makes_all_of_its_metrics_trained_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    scorers = ["brightness", "pocket_scene"]
    report = run(config(*models, tmp_path, scorers=scorers, trained_on=["pocket_scene"]))
    assert [metric.role for metric in report.metrics] == ["held_out", "trained_on", "trained_on"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"trained_on": ["brigthness"]}, "trained_on names 'brigthness'"),
        ({"after": {"adapter_path": "nowhere"}}, "adapter_path nowhere does not exist"),
        ({"prompts_path": None}, "give prompts_path"),
        ({"prompts_path": "nowhere.txt"}, "there is no file nowhere.txt"),
    ],
)
def test_mistakes_are_named_before_anything_is_drawn(
    models: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare.run(config(*models, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_broken_reference_is_named_before_anything_is_drawn(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(b"no image")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "id": "anna", "references": ["face.png"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"reference .face\.png.: not an image file"):
        compare.run(config(*models, tmp_path / "run", prompts_path=str(path)))
