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
from tests.comparisons import made_report

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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    return tmp_path / "run"


def test_results_are_those_of_the_very_weights_with_their_intervals(run: Path) -> None:
    (run.parent / "report.json").write_text(made_report(run).model_dump_json())
    text = card_text(config(), FACTS, LOCAL, results=read_results(run.parent, run))
    assert "| clip\\|x | held out | 100.0% (92.9% to 100.0%) | +1 (+1 to +1) |" in text
    assert text.count("| held out |") == 1 and "Against the base, on 50 prompts x 2 seeds" in text
    assert "secret" not in text and "+9" not in text
    assert "Not measured yet" in card_text(config(), FACTS, LOCAL)


def test_a_report_of_other_weights_is_refused(run: Path) -> None:
    for report in (made_report(run, scale=0.5), made_report(run)):
        (run.parent / "report.json").write_text(report.model_dump_json())
        if report.models[1].adapter_scale == 1:
            (run / "adapter" / "pytorch_lora_weights.safetensors").write_bytes(b"trained further")
        with pytest.raises(ConfigError, match=r"says nothing of what .*run holds now, at strength 1"):
            read_results(run.parent, run)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"results": 3}', '{"results": [{"name": "x"}]}'])
def test_a_report_that_is_none_is_refused(content: str, run: Path) -> None:
    (run.parent / "report.json").write_text(content)
    with pytest.raises(ConfigError, match=r"is not the report\.json of a comparison"):
        read_results(run.parent, run)


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
