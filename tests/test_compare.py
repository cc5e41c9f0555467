"""`compare` on tiny pipelines: with itself, swapped, added to, interrupted, and what training says of its pairs."""

import json
import os
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffusion_dpo import compare, train
from diffusion_dpo.comparing import drawing
from diffusion_dpo.config import ConfigError, dump, load, validate
from diffusion_dpo.data.comparisons import is_comparison, read_comparison
from diffusion_dpo.data.prompts import prompt_hash
from diffusion_dpo.data.shards import read_rows
from diffusion_dpo.files import write_json
from diffusion_dpo.label.items import make_items
from diffusion_dpo.label.log import Log
from diffusion_dpo.label.study import Study
from diffusion_dpo.pocket.world import distinct_scenes
from diffusion_dpo.report import MetricResult, Report
from diffusion_dpo.settings import CompareConfig, LabelConfig
from tests.fakes import make_stable_diffusion
from tests.runs import make_config
from tests.test_processes import ACCELERATE

PROMPTS = 34


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
        "baseline": {"pretrained": str(first)},
        "models": {"tuned": {"pretrained": str(second)}},
        "num_prompts": 4,
        "sampling": {"num_inference_steps": 1, "resolution_px": 32, "batch_size": 16},
        "scorers": ["brightness"],
        "distance": None,
        "diversity": None,
        "output_dir": str(output_dir),
    }
    return validate(CompareConfig, settings | changes, where="the test")


def run(settings: CompareConfig) -> Report:
    page = compare.run(settings)
    assert page.name == "report.html" and page.exists()
    return Report.model_validate_json((settings.output_dir / "report.json").read_text("utf-8"))


def result_of(report: Report, name: str, model: str = "tuned", category: str = "") -> MetricResult:
    (found,) = [result for result in report.of(model, category) if result.name == name]
    return found


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that is drawn."""
    draw, sizes = drawing.draw, []

    def counting(pipeline: Any, requests: Any, sampling: Any) -> Any:
        sizes.append(len(requests))
        return draw(pipeline, requests, sampling)

    monkeypatch.setattr(drawing, "draw", counting)
    return sizes


def test_a_model_against_itself_ties_everywhere(models: tuple[Path, Path], tmp_path: Path) -> None:
    report = run(config(models[0], models[0], tmp_path / "same"))
    metric = result_of(report, "brightness")
    assert (metric.wins, metric.ties, metric.losses) == (0, 8, 0)
    assert metric.mean_difference == 0 and metric.mean_difference_interval == (0, 0) and metric.win_rate == 0.5


def test_swapping_the_models_flips_every_sign(models: tuple[Path, Path], tmp_path: Path) -> None:
    there = result_of(run(config(*models, tmp_path / "ab")), "brightness")
    back = result_of(run(config(*models[::-1], tmp_path / "ba")), "brightness")
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
    draw, batches = drawing.draw, 0

    def failing(*arguments: object) -> object:
        nonlocal batches
        batches += 1
        if batches == 11:  # the baseline: 2 seeds of 3 batches; tuned: stopped within the second seed
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(drawing, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        compare.run(settings)
    assert [len(shards(tmp_path / "run", name)) for name in ("baseline", "tuned")] == [2, 1]
    resumed = run(settings)
    assert batches == 11 + 3  # only the second seed of the second model

    monkeypatch.setattr(drawing, "draw", draw)
    assert run(whole).results == resumed.results
    for name in ("baseline", "tuned"):
        rows = [list(map(uids, shards(tmp_path / folder, name))) for folder in ("run", "whole")]
        assert rows[0] == rows[1] and sum(map(len, rows[0])) == 2 * PROMPTS

    page = (tmp_path / "run" / "report.html").read_bytes()
    monkeypatch.setattr(drawing, "draw", None)
    monkeypatch.setattr("diffusion_dpo.scoring.Judge", None)
    assert run(settings) == resumed
    assert (tmp_path / "run" / "report.html").read_bytes() == page


def shards(folder: Path, model: str) -> list[Path]:
    return sorted((folder / "images").glob(f"{model}-*/images-*.parquet"))


def uids(shard: Path) -> list[str]:
    return [row["uid"] for row in read_rows(shard, ["uid"])]


def test_what_is_added_is_drawn_and_nothing_else(
    models: tuple[Path, Path], tmp_path: Path, drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(config(*models, tmp_path, seeds_per_prompt=1))
    assert drawn == [4, 4]
    two_seeds = run(config(*models, tmp_path))
    assert drawn[2:] == [4, 4]  # the second seed of both
    third = {"tuned": {"pretrained": str(models[1])}, "same": {"pretrained": str(models[0])}}
    report = run(config(*models, tmp_path, models=third, scorers=["brightness", "pocket_scene"]))
    assert drawn[4:] == [4, 4]  # the third model
    assert report.of("tuned")[0].win_rate_interval == two_seeds.of("tuned")[0].win_rate_interval
    assert [model.name for model in report.models] == ["tuned", "same"]
    assert result_of(report, "brightness", "same").ties == 8
    assert report.prompt_set == "held-out prompts"
    monkeypatch.setattr(drawing, "draw", None)
    assert run(config(*models, tmp_path, seeds_per_prompt=1)).results == first.results


def test_checkpoints_of_a_run_at_several_strengths(
    models: tuple[Path, Path], tiny_pairs: Path, tmp_path: Path, drawn: list[int]
) -> None:
    """The last checkpoint is the adapter that training ended with; at strength 0 it is the baseline."""
    overrides = ["checkpointing_steps=1", "max_steps=2", "evaluation.share=0.3", "evaluation.every_steps=1"]
    train.run(make_config(models[0], tiny_pairs, tmp_path / "lora", "ema_decay=0.5", *overrides))
    train.run(make_config(models[0], tiny_pairs, tmp_path / "full", "model.lora=null", *overrides))
    drawn.clear()
    steps = {
        f"{name}{step}": {"adapter_path": str(tmp_path / name / "checkpoints" / f"step-{step:08d}")}
        for name in ("lora", "full")
        for step in (1, 2)
    }
    ends = {f"{name}_end": {"adapter_path": str(tmp_path / name)} for name in ("lora", "full")}
    report = run(config(*models, tmp_path / "compare", models=steps | ends))
    images = {name: [uid for it in shards(tmp_path / "compare", name) for uid in uids(it)] for name in steps | ends}
    for name in ("lora", "full"):
        assert images[f"{name}2"] == images[f"{name}_end"] != images[f"{name}1"]
    signs = {(sign.model, sign.name): sign for sign in report.signs}
    lines = [json.loads(line) for line in (tmp_path / "lora" / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        assert signs[f"lora{step}", "implicit_accuracy"].value == lines[step - 1]["eval/accuracy"]

    drawn.clear()
    tuned = {"tuned": {"adapter_path": str(tmp_path / "lora")}}
    report = run(config(*models, tmp_path / "compare", models=tuned, adapter_scales=[0, 1], distance="clip_image"))
    assert [model.name for model in report.models] == ["tuned@0", "tuned@1"]
    signs = {(sign.model, sign.name): sign for sign in report.signs}
    assert "does nothing" in signs["tuned@0", "distance"].sentence
    assert not signs["tuned@1", "distance"].warns and signs["tuned@1", "distance"].value
    damaged = tmp_path / "lora" / "checkpoints" / "step-00000001"
    (damaged / "ema.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "compare" / "adapters")
    with pytest.raises(ConfigError, match=r"checkpoint .* is damaged"):
        compare.run(config(*models, tmp_path / "compare", models={"first": {"adapter_path": str(damaged)}}))


@pytest.mark.slow
def test_two_processes_draw_and_judge_as_one(models: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    changes = {"prompts_path": str(prompts), "num_prompts": PROMPTS, "scorers": ["brightness", "clip"]}
    one = config(*models, tmp_path / "one", **changes)
    two = config(*models, tmp_path / "two", **changes)
    alone = run(one)
    path = tmp_path / "two.yaml"
    path.write_text(dump(two))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*ACCELERATE, "diffusion_dpo", "compare", str(path)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    together = Report.model_validate_json((tmp_path / "two" / "report.json").read_text("utf-8"))
    assert together.results == alone.results and together.signs == alone.signs
    for name in ("baseline", "tuned"):
        assert list(map(uids, shards(tmp_path / "one", name))) == list(map(uids, shards(tmp_path / "two", name)))


def test_a_folder_of_another_comparison_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    run(config(*models, tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    for changes in ({"seed": 1}, {"num_prompts": 3}, {"sampling": {"num_inference_steps": 2, "resolution_px": 32}}):
        with pytest.raises(ConfigError, match="belongs to another run"):
            compare.run(config(*models, tmp_path, **changes))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_the_pairs_of_a_comparison_can_be_read_again(models: tuple[Path, Path], tmp_path: Path) -> None:
    assert not is_comparison(tmp_path)
    with pytest.raises(ConfigError, match="not a finished comparison"):
        list(read_comparison(tmp_path))
    settings = config(*models, tmp_path, models={"a": {}, "b": {"pretrained": str(models[1])}})
    run(settings)
    assert is_comparison(tmp_path)
    pairs = list(read_comparison(tmp_path))
    assert [(pair.model, pair.index) for pair in pairs] == [(m, i) for m in "ab" for i in (0, 1) for _ in range(4)]
    assert all((pair.baseline.uid == pair.other.uid) == (pair.model == "a") for pair in pairs)
    assert all(pair.baseline.seed == pair.other.seed and pair.baseline.data for pair in pairs)
    assert len({pair.prompt_id for pair in pairs}) == 4 and pairs[0].prompt == pairs[4].prompt


def test_peoples_votes_stand_beside_the_judges(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A rater who always prefers the second model's images, and cannot tell the first pair apart."""
    two = {"a": {"pretrained": str(models[1])}, "same": {}}
    run(config(*models, tmp_path / "compare", models=two))
    label_config = load(LabelConfig, None, [f"path={tmp_path / 'compare'}", f"output_dir={tmp_path / 'votes'}"])
    (tmp_path / "votes").mkdir()
    items = make_items(label_config, tmp_path / "votes")
    assert len(items) == 8 and {item.model for item in items} == {"a"}  # equal images are not asked about
    with Log(tmp_path / "votes" / "votes.jsonl") as log:
        study = Study(label_config, items, log)
        for number, task in enumerate(study.tasks("ann", 8)):
            answer = "tie" if number == 0 else "right" if task.left == "first" else "left"
            study.vote("ann", task.id, answer, key=f"vote-{number}", reason="", seconds=1)
    report = run(config(*models, tmp_path / "compare", models=two, human=str(tmp_path / "votes")))
    people = result_of(report, "people", "a")
    assert (people.role, people.wins, people.ties, people.losses) == ("human", 7, 1, 0)
    assert people.win_rate == pytest.approx(15 / 16)
    assert result_of(report, "people", "same").num_pairs == 0
    with pytest.raises(ConfigError, match="none of its 8 pairs with votes is of these images"):
        compare.run(config(*models, tmp_path / "other", seed=5, human=str(tmp_path / "votes")))
    with pytest.raises(ConfigError, match="is no folder of `label`"):
        compare.run(config(*models, tmp_path / "compare", human=str(tmp_path / "compare")))


def test_prompts_that_were_trained_on_are_counted(
    models: tuple[Path, Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(models[1] / "unet", trained / "unet")
    seen = prompts.read_text(encoding="utf-8").splitlines()[:3]
    write_json(trained / "manifest.json", {"made_by": "train", "prompt_hashes": [prompt_hash(text) for text in seen]})
    tuned = {"tuned": {"adapter_path": str(trained)}}
    report = run(config(*models, tmp_path / "run", prompts_path=str(prompts), models=tuned))
    assert (report.models[0].num_prompts_trained_on, report.num_prompts, report.prompt_set) == (3, 4, "prompts")
    assert "3 of 4 prompts were in the training pairs" in " ".join(capsys.readouterr().out.split())
    assert run(config(*models, tmp_path / "new", models=tuned)).models[0].num_prompts_trained_on == 0


def test_images_that_cannot_be_scored_are_counted_and_left_out(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle on a blue background\nno scene\n", encoding="utf-8")
    report = run(config(*models, tmp_path / "run", prompts_path=str(path), scorers=["pocket_scene"]))
    result = result_of(report, "pocket_scene")
    assert (result.num_prompts, result.num_missing) == (1, 2)
    assert result.mean_difference_interval is None and result.p_value is None


def test_other_weights_at_the_same_path_are_drawn_anew(
    models: tuple[Path, Path], tmp_path: Path, drawn: list[int]
) -> None:
    model = make_stable_diffusion(tmp_path / "model", seed=3)
    first = run(config(models[0], model, tmp_path / "run"))
    make_stable_diffusion(tmp_path / "model", seed=4)
    second = run(config(models[0], model, tmp_path / "run"))
    assert len(drawn) == 4 + 2
    assert second.results != first.results and second.models[0].weights != first.models[0].weights


def test_a_scorer_that_labelled_makes_all_of_its_metrics_trained_on(models: tuple[Path, Path], tmp_path: Path) -> None:
    scorers = ["brightness", "pocket_scene"]
    report = run(config(*models, tmp_path, scorers=scorers, trained_on=["pocket_scene"]))
    roles = [result_of(report, name).role for name in ("brightness", "pocket_scene", "pocket_scene_all")]
    assert roles == ["held_out", "trained_on", "trained_on"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"trained_on": ["brigthness"]}, "trained_on names 'brigthness'"),
        ({"models": {"tuned": {"adapter_path": "nowhere"}}}, r"models\.tuned: nowhere does not exist.*; train one"),
        ({"diversity": "brightness"}, "diversity=brightness: a judge is needed that compares the images of a prompt"),
        ({"distance": "brightness"}, "distance=brightness: a judge is needed"),
        ({"human": "nowhere"}, "nowhere is no folder of `label`"),
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


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("cut", r"models\.tuned: .* is cut off"),
        ("text", r"models\.tuned: .* cut off or no safetensors file"),
        ("other", r"models\.tuned: the LoRA .* takes text embeddings of width 56, not 32"),
        ("unet", r"models\.tuned: the UNet .* does not fit .*: its cross_attention_dim is 56, not 32"),
        ("weights", r"models\.tuned: .*diffusion_pytorch_model.safetensors is cut off"),
        ("base", r"models\.tuned: .* lacks the folder unet"),
        ("judge", "there is no file or folder nowhere"),
    ],
)
def test_what_cannot_be_opened_is_named_before_anything_is_drawn(
    models: tuple[Path, Path], tiny_sdxl: Path, tmp_path: Path, broken: str, message: str
) -> None:
    """All of the baseline used to be drawn first."""
    folder, changes = tmp_path / "tuned", {}
    folder.mkdir()
    width = 56 if broken == "other" else 32
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    if broken in ("cut", "text", "other"):
        data = safetensors.torch.save(lora)
        content = {"cut": data[:-1], "text": b"a text, and no tensors at all"}.get(broken, data)
        (folder / "pytorch_lora_weights.safetensors").write_bytes(content)
    elif broken in ("unet", "weights"):
        shutil.copytree((tiny_sdxl if broken == "unet" else models[1]) / "unet", folder / "unet")
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[: -1 if broken == "weights" else None])
    elif broken == "base":
        shutil.copytree(models[1], folder / "base", ignore=shutil.ignore_patterns("unet"))
        changes = {"models": {"tuned": {"pretrained": str(folder / "base")}}}
    else:
        changes = {"models": {"tuned": {}}, "distance": {"type": "dino", "pretrained": "nowhere"}}
    tuned = {"models": {"tuned": {"adapter_path": str(folder)}}}
    with pytest.raises(ConfigError, match=message):
        compare.run(config(*models, tmp_path / "run", **(tuned | changes)))
    assert not (tmp_path / "run").exists()


def test_a_broken_reference_is_named_before_anything_is_drawn(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "face.png").write_bytes(b"no image")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", "id": "anna", "references": ["face.png"]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"reference .face\.png.: not an image file"):
        compare.run(config(*models, tmp_path / "run", prompts_path=str(path)))
