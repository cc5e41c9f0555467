"""The model card: what it says is what happened, and nothing in it is interpreted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusion_dpo import registry
from diffusion_dpo.card.results import read_results
from diffusion_dpo.card.text import Shown, card_text, plain
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.settings import TrainConfig

FACTS: dict[str, Any] = {"num_pairs": 10, "num_held_out": 2, "drops": {"broken": 3}, "labelled_by": [], "steps": 200}
LOCAL = Shown(kind="adapter")
HOSTILE = [
    "<script>alert(1)</script>",
    "a\n---\nlicense: mit",
    "```\n# heading",
    "x: [y, {z}] # 'quotes' \"",
    "\u202egnp.exe\x1b[31m\x00",
    "![](javascript:alert(1)) {{7*7}}",
    "é" * 10_000,
]


def config(*settings: str) -> TrainConfig:
    return load(TrainConfig, None, ["output_dir=runs/mine", *settings])


def front_matter(text: str) -> dict[str, Any]:
    _, matter, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert body.startswith("\n\n# ")
    found = yaml.safe_load(matter)
    assert isinstance(found, dict)
    return found


def test_the_hub_finds_what_it_sorts_by() -> None:
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    settings = ("model.type=stable_diffusion_xl", f"model.pretrained={base}")
    found = front_matter(card_text(config(*settings), FACTS, LOCAL))
    assert found["base_model"] == base and found["base_model_relation"] == "adapter"
    assert found["license"] == "openrail++" and found["pipeline_tag"] == "text-to-image"
    assert found["library_name"] == "diffusers" and {"lora", "dpo", "diffusion-dpo"} <= set(found["tags"])
    whole = front_matter(card_text(config(*settings, "model.lora=null"), FACTS, Shown(kind="unet")))
    assert whole["base_model_relation"] == "finetune"
    unknown = front_matter(card_text(config("model.pretrained=/my/base"), FACTS, LOCAL))
    assert "license" not in unknown and "base_model" not in unknown, "what is not known is not said"


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_elsewhere_breaks_neither_the_page_nor_its_front_matter(text: str) -> None:
    shown = Shown(kind="adapter", repo_id="me/mine", previews=["images/00.png"])
    settings = [f"preview.prompts={json.dumps([text])}", f"data.path={json.dumps('/d/' + text.replace('/', ''))}"]
    facts = {**FACTS, "labelled_by": [text], "drops": {text: 1}}
    if "\x00" in text:
        settings = settings[:1]
    card = card_text(config(*settings), facts, shown)
    assert front_matter(card)["widget"][0]["text"] == text
    body = card.split("---\n", 2)[2]
    outside = "".join(re.split(r"^```\w*$", body, flags=re.MULTILINE)[::2])
    assert len(re.findall(r"^```", body, flags=re.MULTILINE)) == 4, "two fences: Python and BibTeX"
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[\]\(javascript|\x1b|\u202e|\x00", outside)
    assert outside.count("\n# ") == 1


def test_plain_text_is_one_line_without_markup() -> None:
    assert plain("a|b\n<i>*x*") == r"a\|b \<i\>\*x\*"


def test_every_scorer_that_labelled_is_named_with_its_licence() -> None:
    metrics = {}
    for name in ("pickscore", "sharpness", "aesthetic"):
        scorer = registry.resolve("scorers", name)(type=name)
        metrics[scorer.metrics[0].name] = scorer.licence
    text = card_text(config(), {**FACTS, "labelled_by": [*metrics, "someones_own"]}, LOCAL)
    for metric, licence in metrics.items():
        assert f"- {plain(metric)}, licence: {plain(licence)}" in text
    assert r"- someones\_own, licence: not known" in text


def test_every_objective_names_its_paper() -> None:
    for name in registry.TABLES["losses"]:
        text = card_text(config(f"loss.type={name}"), FACTS, LOCAL)
        assert "2311.12908" in text
        assert ("The objective: " in text) is (name != "dpo"), name


@pytest.mark.parametrize("version", [1, 2])
def test_results_come_with_their_intervals(version: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    numbers = {"mean_difference": 0.25, "mean_difference_interval": [0.1, 0.4], "win_rate": 0.61}
    entry = {"name": "clip|x", "role": "held_out", "win_rate_interval": [0.55, 0.67], **numbers}
    if version == 2:
        others = [
            {**entry, "model": "b", "win_rate": 0.9},
            {**entry, "model": "a", "category": "People"},
            {**entry, "model": "a", "auxiliary": True},
        ]
        report: dict[str, Any] = {"results": [*others, {**entry, "model": "a", "category": "", "p_holm": 0.004}]}
        report["made_with"] = {"models": {"b": {"adapter_path": "elsewhere"}, "a": {"adapter_path": str(run)}}}
        report["baseline"] = {"description": "a base"}
    else:
        report = {"metrics": [entry, {"name": "nothing", "role": "held_out", "win_rate": None}]}
    (tmp_path / "report.json").write_text(json.dumps({"num_prompts": 50, "seeds_per_prompt": 2, **report}))
    results = read_results(tmp_path, run)
    text = card_text(config(), FACTS, LOCAL, results=results)
    p = " 0.004 |" if version == 2 else "  |"
    assert f"| clip\\|x | held out | 61.0% (55.0% to 67.0%) | +0.25 (+0.1 to +0.4) |{p}" in text
    assert text.count("| held out |") == (1 if version == 2 else 2) and "50 prompts x 2 seeds" in text
    assert "Not measured yet" in card_text(config(), FACTS, LOCAL)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"results": 3}', '{"results": [{"name": "x", "win_rate": "y"}]}']
)
def test_a_report_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=r"is not the report\.json of a comparison"):
        read_results(tmp_path, tmp_path / "run")


def test_a_report_of_other_models_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()

    def read(**models: str | None) -> None:
        results = [{"name": "clip", "role": "held_out", "model": name, "category": ""} for name in models]
        made_with = {"models": {name: {"adapter_path": path} for name, path in models.items()}}
        report = {"num_prompts": 9, "seeds_per_prompt": 1, "results": results, "made_with": made_with}
        (tmp_path / "report.json").write_text(json.dumps(report))
        read_results(tmp_path, tmp_path / "run")

    read(tuned=str(tmp_path / "run" / "adapter"))
    read(tuned=str(tmp_path / "run-before-it-was-moved"))
    for others in ({"a": str(tmp_path / "other")}, {"a": None, "b": None}):
        with pytest.raises(ConfigError, match=r"does not say which one .*run is"):
            read(**others)


def test_the_same_run_gives_the_same_card_and_says_how_to_load_it() -> None:
    shown = Shown(kind="adapter", repo_id="me/mine", kohya_file="mine.safetensors")
    text = card_text(config(), FACTS, shown)
    assert text == card_text(config(), FACTS, shown)
    for words in (
        "pipe.load_lora_weights('me/mine')",
        "`models/loras`",
        "`<lora:mine:1>`",
        "## Limits",
        "wallace2023",
    ):
        assert words in text
    whole = card_text(config("model.lora=null"), FACTS, Shown(kind="unet", repo_id="me/mine"))
    assert "UNet2DConditionModel.from_pretrained('me/mine', subfolder='unet')" in whole
