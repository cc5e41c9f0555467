"""A LoRA file's own arithmetic beside what diffusers computes with it: where they differ, the user is told how far."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models import lora_file
from diffusion_dpo.models.lora_file import LoraLayer, read_lora
from diffusion_dpo.models.lora_layers import peft_layers
from tests.models.lora_files import Weights, kohya, plain, save, targets, tucker, with_alphas

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL = (*ATTENTION, "conv1", "conv_in", "conv_shortcut", "samplers.0.conv", "proj_in", "ff.net.2", "time_emb_proj")
NOTHING, REFUSED = "finds none of the layers", "does not load"
OTHER = "computes something else"

Maker = Callable[[torch.nn.Module], tuple[Weights, Weights]]
KINDS: dict[str, tuple[Maker, str | None, float]] = {
    "kohya, one alpha": (lambda unet: with_alphas(unet, ALL, lambda _: 1.0), None, 1e-6),
    "kohya, no alpha": (lambda unet: plain(unet, ALL), None, 1e-6),
    "kohya, ranks differ": (lambda unet: with_alphas(unet, ATTENTION, lambda _: 2.0, lambda k: 2 + k % 3), None, 1e-6),
    "kohya, alphas differ": (lambda unet: with_alphas(unet, ATTENTION, lambda k: 1 + k % 4), OTHER, 3.0),
    "kohya, alphas differ beside the attention": (
        lambda unet: with_alphas(unet, ("conv1", "ff.net.2"), lambda k: 1 + k % 4),
        None,
        1e-6,
    ),
    "kohya, alpha on some": (lambda unet: with_alphas(unet, ATTENTION, lambda k: None if k % 2 else 0.5), OTHER, 0.76),
    "kohya, Tucker": (lambda unet: tucker(unet, ("conv1", "conv2")), REFUSED, 1.0),
    "kohya, bundled embedding": (lambda unet: _bundled(*plain(unet, ALL)), REFUSED, 1.0),
    "diffusers": (lambda unet: plain(unet, ALL, "diffusers"), None, 1e-6),
    "diffusers of 2023": (lambda unet: plain(unet, ATTENTION, "diffusers of 2023"), None, 1e-6),
    "diffusers of 2023, bare": (lambda unet: plain(unet, ATTENTION, "diffusers of 2023, bare"), NOTHING, 1.0),
    "peft": (lambda unet: plain(unet, ALL, "peft"), NOTHING, 1.0),
    "lycoris_ in front": (lambda unet: plain(unet, ALL, "lycoris"), NOTHING, 1.0),
    "ComfyUI": (lambda unet: plain(unet, ALL, "ComfyUI"), NOTHING, 1.0),
}
"""What makes a file of each kind, what is said of it, and the largest difference of a layer's update between the file
and diffusers, relative to the largest of the file's own."""


def _bundled(weights: Weights, deltas: Weights) -> tuple[Weights, Weights]:
    return weights | {"bundle_emb.token.string_to_param.*": torch.ones(2, 32)}, deltas


@pytest.fixture(scope="module")
def pipeline(bases: dict[str, Path]) -> Any:
    return StableDiffusionPipeline.from_pretrained(bases["sd"])


def largest_difference(pipeline: Any, file: Path, expected: Weights) -> float:
    """Over all layers, the largest |public - file| over the file's largest |s B A| in that layer."""
    try:
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        there = peft_layers(pipeline.unet)
        found = {path: there[path].get_delta_weight("default_0").detach() for path in expected if path in there}
    except ValueError:
        found = {}
    finally:
        pipeline.unload_lora_weights()
    return max(
        float((found.get(path, torch.zeros(())) - delta).abs().max() / delta.abs().max())
        for path, delta in expected.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_where_diffusers_differs_from_a_file_is_said(
    kind: str, pipeline: Any, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says, most = KINDS[kind]
    weights, expected = make(pipeline.unet)
    file = save(tmp_path, weights)
    off = largest_difference(pipeline, file, expected)
    assert off <= most and (says is None or off >= most / 3), off
    capsys.readouterr()
    assert main(["export", "--check", str(file), f"pretrained={bases['sd']}"]) == 0
    out = capsys.readouterr().out
    assert ("warning: diffusers" in out) == (says is not None), out
    assert says is None or says in out
    assert says != OTHER or "of its output, " in out, "how far off"


def test_diffusers_takes_a_dora_of_kohya_for_the_lora_beside_its_magnitudes(pipeline: Any, tmp_path: Path) -> None:
    """Which is why such a file is refused here, and not handed on."""
    weights, expected = plain(pipeline.unet, ATTENTION)
    for key in [key for key in weights if key.endswith(".lora_up.weight")]:
        weights[key.replace("lora_up.weight", "dora_scale")] = torch.full((len(weights[key]), 1), 7.0)
    file = save(tmp_path, weights)
    assert largest_difference(pipeline, file, expected) < 1e-6, "the magnitudes are left out"
    with pytest.raises(ConfigError, match="dora_scale"):
        read_lora(file)


def test_where_two_readings_differ_for_no_known_reason_nothing_is_exported(
    pipeline: Any,
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reader that gets one strength wrong: the export of what it read would be as wrong, and agree with itself."""
    weights, expected = with_alphas(pipeline.unet, ATTENTION, lambda _: 1.0)
    file, wrong = save(tmp_path, weights), kohya("lora_unet_", next(iter(expected)))
    read = lora_file._layer

    def misread(file: Path, name: str, *rest: Any) -> LoraLayer:
        layer = read(file, name, *rest)
        return replace(layer, alpha=2 * layer.alpha) if name == wrong else layer

    monkeypatch.setattr(lora_file, "_layer", misread)
    settings = [f"adapter_path={file}", f"pretrained={bases['sd']}", f"output_dir={tmp_path / 'out'}", "dtype=fp32"]
    assert main(["export", "format=kohya", *settings]) == 2
    said = capsys.readouterr().err
    assert "of what the LoRA changes, for no reason that is known" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("format_", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["kohya, alphas differ", "kohya, alpha on some", "kohya, Tucker", "peft"])
def test_an_export_is_what_the_file_says_even_where_diffusers_is_wrong_on_it(
    kind: str, format_: str, pipeline: Any, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, expected = KINDS[kind][0](pipeline.unet)
    file, out = save(tmp_path, weights), tmp_path / "out"
    settings = [f"adapter_path={file}", f"pretrained={bases['sd']}", f"output_dir={out}", "dtype=fp32"]
    assert main(["export", f"format={format_}", *settings]) == 0
    text = capsys.readouterr().out
    assert "; what is written here is right" in text and "computes what the weights of the adapter say" in text
    (written,) = out.glob("*.safetensors")
    assert largest_difference(pipeline, written, expected) < 1e-5
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["changes"]["unet"] > 100 * facts["differences"]["unet"]


def test_merged_weights_are_those_of_the_base_plus_what_the_file_says(
    pipeline: Any, bases: dict[str, Path], tmp_path: Path
) -> None:
    weights, expected = with_alphas(pipeline.unet, ALL, lambda k: 1 + k % 4, lambda k: 2 + k % 3)
    for path, module in targets(pipeline.text_encoder, "fc1").items():
        key = kohya("lora_te_", f"text_model.{path.removeprefix('text_model.')}")
        weights |= {f"{key}.lora_down.weight": torch.ones(2, module.in_features) * 0.01}
        weights |= {f"{key}.lora_up.weight": torch.ones(module.out_features, 2), f"{key}.alpha": torch.tensor(1.0)}
    file, out = save(tmp_path, weights), tmp_path / "out"
    settings = [f"adapter_path={file}", f"pretrained={bases['sd']}", f"output_dir={out}", "dtype=fp32"]
    assert main(["export", "format=merged", *settings]) == 0
    merged = StableDiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    before, after = pipeline.unet.state_dict(), merged.unet.state_dict()
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        f"{path}.weight" for path in expected
    }
    for path, delta in expected.items():
        torch.testing.assert_close(after[f"{path}.weight"], before[f"{path}.weight"] + delta, rtol=1e-5, atol=1e-6)
    for path, module in targets(pipeline.text_encoder, "fc1").items():
        torch.testing.assert_close(merged.text_encoder.get_submodule(path).weight, module.weight + 0.01)
