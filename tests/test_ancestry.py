"""A run on top of others stands on all of them: their judges, data and prompts, and how far it is from the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusion_dpo import export, train
from diffusion_dpo.card import ancestry
from diffusion_dpo.card.ancestry import Ancestry
from diffusion_dpo.comparing.lineup import line_up, num_trained_on
from diffusion_dpo.comparing.roles import roles_of
from diffusion_dpo.config import load, validate
from diffusion_dpo.data.prompts import Prompt, prompt_hash
from diffusion_dpo.data.shards import PAIRS, read_rows, write_shard
from diffusion_dpo.files import read_manifest, write_json
from diffusion_dpo.processes import Processes
from diffusion_dpo.settings import CompareConfig, ExportConfig
from tests.runs import make_config, read_metrics

SHORT = ("preview=null", "max_steps=1", "evaluation.share=0.3", "learning_rate=1e-2")


def pairs_by(folder: Path, rows: list[dict[str, Any]], judge: str) -> Path:
    folder.mkdir()
    write_shard(folder / "pairs-00000.parquet", rows, PAIRS)
    write_json(folder / "manifest.json", {"made_by": "pair", "labelled_by": [judge]})
    return folder


@pytest.fixture(scope="module")
def rounds(tiny_sd: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rounds, each on top of the one before, by another judge and on other prompts; the middle one is exported.

    The first one's folder, and all pairs, are gone in the end.
    """
    root = tmp_path_factory.mktemp("rounds")
    rows = list(read_rows(tiny_pairs))
    judges = ("brightness", "clip_text", "sharpness")
    for number, (judge, part) in enumerate(zip(judges, (rows[:2], rows[2:6], rows[6:]), strict=True), start=1):
        pairs = pairs_by(root / f"pairs{number}", part, judge)
        start = (None, root / "round1", root / "kohya" / "round2.safetensors")[number - 1]
        on_top = [] if start is None else [f"model.adapter_path={start}"]
        train.run(make_config(tiny_sd, pairs, root / f"round{number}", *SHORT, *on_top))
        if number == 2:
            shutil.rmtree(root / "round1")
            exported = [f"adapter_path={root}/round2", "format=kohya", "dtype=fp32", f"output_dir={root}/kohya"]
            export.run(load(ExportConfig, None, exported))
        shutil.rmtree(pairs)
    return root


def test_a_run_inherits_what_its_ancestors_learnt_from(rounds: Path, tiny_pairs: Path) -> None:
    facts = read_manifest(rounds / "round3")
    assert facts["labelled_by"] == ["sharpness", "clip_text", "brightness"] and facts["judges_not_known"] == []
    assert facts["prompt_hashes"] == sorted({prompt_hash(row["prompt"]) for row in read_rows(tiny_pairs)})
    assert facts["num_pairs"] < 10 and facts["start"] == "round2.safetensors"
    card = (rounds / "round3" / "README.md").read_text()
    assert "Trained on from round2.safetensors" in card and all(
        judge in card.replace("\\", "") for judge in facts["labelled_by"]
    )


def compared(rounds: Path, name: str, **changes: Any) -> tuple[Any, dict[str, str]]:
    settings = {
        "models": {"tuned": {"adapter_path": str(rounds / name)}},
        "scorers": ["clip", "pocket_scene"],
        **changes,
    }
    config = validate(CompareConfig, settings, where="the test")
    lineup = line_up(config, Processes.join("cpu"))
    return lineup[1], roles_of(config, lineup)["tuned"]


@pytest.mark.parametrize(
    "name", ["round3", "round3/adapter", "round3/checkpoints/step-00000001", "kohya/round2.safetensors"]
)
def test_a_judge_of_any_round_is_not_held_out(rounds: Path, name: str, tmp_path: Path) -> None:
    model, roles = compared(rounds, name, output_dir=str(tmp_path))
    assert roles["clip_text"] == roles["brightness"] == "trained_on"
    assert roles["pocket_scene"] == "held_out" and model.judges_not_known == ()
    assert roles["sharpness"] == ("held_out" if name.startswith("kohya") else "trained_on")


def test_prompts_of_any_round_count_as_trained_on(rounds: Path, tiny_pairs: Path) -> None:
    model, _ = compared(rounds, "round3")
    prompts = [Prompt(row["prompt"], row["prompt"]) for row in read_rows(tiny_pairs)]
    assert num_trained_on(model, [*prompts, Prompt("new", "new")]) == len(prompts)


@pytest.mark.parametrize("reference", ["auto", "frozen_copy"])
def test_the_distance_to_the_base_is_measured_beside_that_to_the_start(
    tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, reference: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second round that learns nothing is as far from the base as the first one was, on the same pairs."""
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "first", *SHORT))
    again = [*SHORT, "learning_rate=1e-12", f"model.adapter_path={tmp_path}/first", f"reference.type={reference}"]
    train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "second", *again))
    first, second = (read_manifest(tmp_path / name) for name in ("first", "second"))
    assert first["kl"] == first["kl_base"] > 1e-3 and second["kl"] < 1e-6
    assert second["kl_base"] == pytest.approx(first["kl"], rel=1e-4)
    (row,) = read_metrics(tmp_path / "second")
    assert (row["eval/kl"], row["eval/kl_base"]) == (second["kl"], second["kl_base"])
    assert "eval/kl_base" not in read_metrics(tmp_path / "first")[0]
    assert f"nats, {second['kl_base']:.2g} from the base" in " ".join(capsys.readouterr().out.split())


def test_a_start_of_unknown_origin_is_said_once(
    rounds: Path, tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied out of its run folder, a LoRA of plain names says nothing."""
    shutil.copy(rounds / "round3" / "adapter" / "pytorch_lora_weights.safetensors", tmp_path / "found.safetensors")
    pairs = pairs_by(tmp_path / "pairs", list(read_rows(tiny_pairs)), "sharpness")
    train.run(
        make_config(tiny_sd, pairs, tmp_path / "run", *SHORT, f"model.adapter_path={tmp_path}/found.safetensors")
    )
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("its judges are not known") == 1 and "from found.safetensors: its judges" in out
    assert read_manifest(tmp_path / "run")["judges_not_known"] == ["found.safetensors"]
    model, _ = compared(tmp_path, "run")
    assert (model.labelled_by, model.judges_not_known) == (("sharpness",), ("found.safetensors",))
    model, _ = compared(tmp_path, "run", trained_on=["clip_text"])
    assert (model.labelled_by, model.judges_not_known) == (("clip_text",), ())


@pytest.mark.parametrize(
    ("kind", "says"), [("full", "whole UNet"), ("added", "part of the weights"), ("merged", "merged")]
)
def test_a_base_that_is_not_there_is_said_to_be_missing(
    rounds: Path, tiny_sd: Path, tiny_pairs: Path, tmp_path: Path, kind: str, says: str
) -> None:
    start, base = [f"model.adapter_path={rounds}/round3"], tiny_sd
    if kind == "added":
        start.append("model.lora=null")
    elif kind == "full":
        train.run(make_config(tiny_sd, tiny_pairs, tmp_path / "whole", *SHORT, "model.lora=null"))
        start = [f"model.adapter_path={tmp_path}/whole"]
    else:
        base, start = tmp_path / "merged", []
        merged = ["format=merged", "dtype=fp32", f"adapter_path={rounds}/round3", f"output_dir={base}"]
        export.run(load(ExportConfig, None, merged))
    train.run(make_config(base, tiny_pairs, tmp_path / "run", *SHORT, *start))
    facts = read_manifest(tmp_path / "run")
    assert facts["kl"] > 0 and facts["kl_base"] is None and says in facts["kl_base_missing"]
    assert "eval/kl_base" not in read_metrics(tmp_path / "run")[-1]
    if kind != "full":
        assert {"sharpness", "clip_text", "brightness"} <= set(facts["labelled_by"])


def test_what_was_known_once_stays_known(rounds: Path, tiny_sd: Path, tiny_pairs: Path, tmp_path: Path) -> None:
    """The pairs are continued from a copy without its manifest."""
    pairs = pairs_by(tmp_path / "pairs", list(read_rows(tiny_pairs)), "sharpness")
    train.run(make_config(tiny_sd, pairs, tmp_path / "run", *SHORT))
    (pairs / "manifest.json").unlink()
    train.run(make_config(tiny_sd, pairs, tmp_path / "run", *SHORT, "max_steps=2"))
    facts = read_manifest(tmp_path / "run")
    assert (facts["steps"], facts["labelled_by"], facts["judges_not_known"]) == (2, ["sharpness"], [])


@pytest.mark.parametrize("damage", [b"", b"\xff" * 20, b"\x05\0\0\0\0\0\0\0[[[[[", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_says_nothing_is_of_unknown_origin(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(damage)
    assert ancestry.of_adapter(tmp_path / "a.safetensors") == Ancestry(judges_not_known=("a.safetensors",))


def test_an_exported_file_says_by_itself_which_judges_it_learnt_from(rounds: Path, tmp_path: Path) -> None:
    """Alone in another folder; the hashes of prompts are nobody else's business."""
    known = Ancestry(("clip_text",), frozenset({"data: Pick-a-Pic"}), frozenset({"0" * 16}), ("older",))
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata=known.header())
    found = ancestry.of_adapter(tmp_path / "b.safetensors")
    assert found == Ancestry(("clip_text",), frozenset({"data: Pick-a-Pic"}), frozenset(), ("older",))
    assert "0" * 16 not in json.dumps(known.header())
    shutil.copy(rounds / "kohya" / "round2.safetensors", tmp_path / "mine.safetensors")
    assert ancestry.of_adapter(tmp_path / "mine.safetensors").labelled_by == ("clip_text", "brightness")
