"""`export` of tuned models: each format comes back, through diffusers' own loaders, as the model that went out."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusion_dpo import export
from diffusion_dpo.config import ConfigError, load
from diffusion_dpo.models.checkpoint_file import header_settings
from diffusion_dpo.models.original_layout import as_original
from diffusion_dpo.models.pipeline import POCKET_DIR, load_base
from diffusion_dpo.settings import ExportConfig
from tests.exporting.loras import ATTENTION, FORMATS, TEXT, Made, image, load_plainly, lora, nothing_left, run
from tests.fakes import make_stable_diffusion


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(("family", "what"), [("sd", "plain"), ("sd", "all"), ("xl", "all")])
def test_every_format_draws_the_same_images(
    made: Callable[[str, str], Made], family: str, what: str, format_: str, tmp_path: Path
) -> None:
    model = made(family, what)
    assert np.abs(model.after - model.before).mean() > 3, "an adapter that does nothing would prove nothing"
    out = run(model, tmp_path / "out", f"format={format_}", "dtype=fp32")
    assert np.abs(image(load_plainly(model, out, format_)) - model.after).max() <= 1
    assert not list(out.glob(".staging*"))
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["complete"] and facts["changes"]["unet"] > 100 * facts["differences"]["unet"]


def test_kohyas_names_carry_the_true_alpha(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    weights = load_file(run(made("sd", "plain"), tmp_path / "a", "format=kohya") / "sd-plain.safetensors")
    alphas = {key: float(value) for key, value in weights.items() if key.endswith(".alpha")}
    assert set(alphas.values()) == {16.0}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert weights[f"{key}.lora_down.weight"].shape == (4, 16) and weights[f"{key}.lora_up.weight"].shape == (16, 4)
    assert {value.dtype for name, value in weights.items() if "lora_" in name[10:]} == {torch.float16}
    half = run(made("sd", "plain"), tmp_path / "b", "format=kohya", "adapter_scale=0.5")
    assert float(load_file(half / "sd-plain.safetensors")[f"{key}.alpha"]) == 8.0


def test_layers_of_every_kind_keep_their_product(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """Alpha over rank times B A, layer by layer, whatever the patterns: what every reader of the format computes."""
    model = made("xl", "all")
    source = load_file(model.folder / "pytorch_lora_weights.safetensors")
    out = load_file(run(model, tmp_path / "out", "format=kohya", "dtype=fp32") / "xl-all.safetensors")
    assert {name.split("_")[1] for name in out} == {"unet", "te1", "te2"}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    seen = 0
    for key, down in source.items():
        if not key.endswith(".lora_A.weight"):
            continue
        part, _, path = key.removesuffix(".lora_A.weight").partition(".")
        up = source[key.replace("lora_A", "lora_B")]
        path_there = path if part == "unet" or path.startswith("text_model.") else f"text_model.{path}"
        name = prefixes[part] + path_there.replace(".", "_")
        alpha = 6 if part != "unet" else 2 if "to_q" in path else 5 if "conv1" in path else 16
        expected = alpha / len(down) * up.flatten(1) @ down.flatten(1)
        there_down, there_up = out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"]
        found = float(out[f"{name}.alpha"]) / len(there_down) * there_up.flatten(1) @ there_down.flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        seen += 1
    assert seen * 3 == len(out)


def test_the_header_says_what_people_look_for_and_is_the_same_every_time(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model = made("xl", "all")
    first, second = (run(model, tmp_path / name, "format=kohya") / "xl-all.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    with safe_open(first, framework="pt") as file:
        header = file.metadata()
    assert str(tmp_path) not in json.dumps(header) and str(model.base) not in json.dumps(header)
    assert header["ss_network_module"] == "networks.lora" and header["ss_output_name"] == "xl-all"
    assert (header["ss_network_dim"], header["ss_base_model_version"]) == ("Dynamic", "sdxl_base_v1-0")
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (header["modelspec.prediction_type"], header["modelspec.resolution"]) == ("epsilon", "64x64")
    data = first.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data[start:]).hexdigest()


def test_dora_stays_itself_or_is_merged_and_is_refused_by_name(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    model = made("sd", "dora")
    with pytest.raises(ConfigError, match=r"a DoRA \(unet\..*a DoRA can be merged"):
        run(model, tmp_path / "kohya", "format=kohya")
    assert nothing_left(tmp_path / "kohya")
    for format_ in ("diffusers", "merged"):
        out = run(model, tmp_path / format_, f"format={format_}", "dtype=fp32")
        assert np.abs(image(load_plainly(model, out, format_)) - model.after).max() <= 1


def test_a_whole_unet_becomes_a_checkpoint_and_no_lora(bases: dict[str, Path], tmp_path: Path) -> None:
    other = make_stable_diffusion(tmp_path / "other", seed=7)
    settings = [f"adapter_path={other / 'unet'}", f"pretrained={bases['sd']}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(ConfigError, match=r"a whole UNet, not a LoRA; export it with format=single_file"):
        export.run(load(ExportConfig, None, [*settings, "format=kohya"]))
    export.run(load(ExportConfig, None, [*settings, "format=single_file", "dtype=fp32"]))
    (file,) = (tmp_path / "out").glob("*.safetensors")
    loaded = StableDiffusionPipeline.from_single_file(str(file), config=str(bases["sd"]), dtype=torch.float32)
    expected = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    found = loaded.unet.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_pocket_model_has_the_original_layout_too(tmp_path: Path) -> None:
    model = Made(POCKET_DIR, tmp_path / "lora", lora(*ATTENTION))
    out = run(model, tmp_path / "out", "format=single_file", "dtype=fp32")
    assert np.abs(image(load_plainly(model, out, "single_file")) - model.after).max() <= 1


def test_the_text_encoder_of_stable_diffusion_2_gets_open_clips_names(tmp_path: Path) -> None:
    base = make_stable_diffusion(tmp_path / "base", prediction_type="v_prediction")
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    settings = pipeline.text_encoder.config
    settings.hidden_act = "gelu"
    pipeline.register_modules(text_encoder=CLIPTextModel(settings))
    pipeline.save_pretrained(base)
    model = Made(base, tmp_path / "lora", lora(*ATTENTION), lora(*TEXT))
    out = run(model, tmp_path / "out", "format=single_file", "dtype=fp32")
    names = set(load_file(out / "lora.safetensors"))
    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight" in names
    assert np.abs(image(load_plainly(model, out, "single_file")) - model.after).max() <= 1


def test_a_merged_folder_is_read_plainly_by_every_version(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """In half precision: one number format after a plain load, transformers 4's names and files, no local path."""
    model = made("xl", "all")
    out = run(model, tmp_path / "out", "format=merged")
    pipeline = DiffusionPipeline.from_pretrained(out)
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    assert {pipeline.components[part].dtype for part in parts} == {torch.float32}
    assert np.abs(image(pipeline) - model.after).mean() < 3
    for part in parts[2:]:
        weights = load_file(out / part / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float16}
        assert all(key.startswith(("text_model.", "text_projection.")) for key in weights)
        folder = out / part.replace("text_encoder", "tokenizer")
        vocab = json.loads((folder / "vocab.json").read_text())
        assert vocab == pipeline.tokenizer.get_vocab() and (folder / "merges.txt").read_text().startswith("#version")
    for file in out.rglob("*"):
        assert file.is_dir() or str(model.base).encode() not in file.read_bytes(), file


def test_a_run_on_a_checkpoint_is_exported_as_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """A single-file base, without a folder of settings: its LoRA becomes a checkpoint that diffusers reads."""
    model = Made(bases["sd"], tmp_path / "lora", lora(*ATTENTION))
    pipeline = load_base(str(bases["sd"]), device=torch.device("cpu"), dtype=torch.float32)
    weights = {key: value.contiguous() for key, value in as_original(pipeline.components).items()}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "any.safetensors", metadata=header_settings(pipeline))
    file = tmp_path / "base" / "any.safetensors"
    out = run(model, tmp_path / "out", f"pretrained={file}", "format=single_file", "dtype=fp32")
    again = load_base(str(out), device=torch.device("cpu"), dtype=torch.float32)
    assert np.abs(image(again) - model.after).max() <= 1


def test_what_a_base_is_said_to_predict_is_in_what_is_written(
    made: Callable[[str, str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files say epsilon; with the setting the folder says v, as does the printed check, and another is refused."""
    model, says_v = made("sd", "plain"), "prediction_type=v_prediction"
    out = run(model, tmp_path / "out", "format=merged", says_v)
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    with pytest.raises(ConfigError, match=r"model\.prediction_type: v_prediction -> null"):
        run(model, out, "format=merged")
    run(model, tmp_path / "kohya", "format=kohya", says_v)
    assert f"pretrained={model.base} {says_v}" in " ".join(capsys.readouterr().out.split())
