"""Single-file checkpoints as bases: the same networks, tokens and schedule as the folder that they were made from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models import pipeline as loading
from diffusion_dpo.models.base import read_base
from diffusion_dpo.models.checkpoint_file import header_settings
from diffusion_dpo.models.checkpoint_settings import SETTINGS
from diffusion_dpo.models.original_layout import as_original
from diffusion_dpo.models.pipeline import POCKET_DIR, load_base
from diffusion_dpo.models.requirements import require_trainable

CPU = torch.device("cpu")
KINDS = ("v1", "v2", "xl")
Made = dict[str, tuple[DiffusionPipeline, Path]]


def text(kind: str, width: int, layers: int, **settings: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
        hidden_act="quick_gelu" if kind == "clip" else "gelu",
        **settings,
    )


def make(kind: str) -> DiffusionPipeline:
    """A pipeline whose heads and norms are divided as the family's are, narrow and shallow, of random weights."""
    torch.manual_seed(0)
    widths = (64, 128) if kind == "xl" else (64, 64)
    cross = {"v1": 64, "v2": 64, "xl": 128}[kind]
    unet: dict[str, Any] = {"layers_per_block": 1, "cross_attention_dim": cross, "use_linear_projection": kind != "v1"}
    unet |= {"attention_head_dim": 8 if kind == "v1" else [width // 64 for width in widths], "sample_size": 64}
    plain = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    reverse = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    down, up = plain if kind == "xl" else reverse
    if kind == "xl":
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": [1, 2],
        }
        unet |= {"projection_class_embeddings_input_dim": 6 * 8 + 64}
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(block_out_channels=widths, down_block_types=down, up_block_types=up, **unet),
        "vae": AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            scaling_factor=0.13025 if kind == "xl" else 0.18215,
        ),
        "text_encoder": CLIPTextModel(text("open" if kind == "v2" else "clip", 64, 2)),
        "tokenizer": None,
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction" if kind == "v2" else "epsilon",
        ),
    }
    if kind == "xl":
        parts |= {
            "text_encoder_2": CLIPTextModelWithProjection(text("open", 64, 2, projection_dim=64)),
            "tokenizer_2": None,
        }
        return StableDiffusionXLPipeline(**parts)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DiffusionPipeline, Path]]:
    """A pipeline of each family and its checkpoint as other programs write it: no word on settings in the header."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for kind in KINDS:
        pipeline = make(kind)
        weights = {key: value.contiguous() for key, value in as_original(pipeline.components).items()}
        # what real files hold besides: averages, schedules, a logit scale, numbers of positions
        weights |= {"model_ema.decay": torch.tensor(0.999), "betas": torch.ones(1000)}
        weights |= {"cond_stage_model.logit_scale": torch.tensor(1.0)}
        save_file(weights, folder / f"{kind}.safetensors")
        found[kind] = pipeline, folder / f"{kind}.safetensors"
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_what_its_pipeline_does(
    made: Made, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Architecture and all are taken from the tensors alone; every weight is the same, and so is what it computes."""
    pipeline, file = made[kind]
    base = read_base(str(file))
    require_trainable(base)
    assert base.scheduler["prediction_type"] == pipeline.scheduler.config.prediction_type
    loaded = load_base(str(file), device=CPU, dtype=torch.float32)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert_same_computation(name, pipeline, loaded)
    assert f"it predicts {base.scheduler['prediction_type']}, as its family does by default" in capsys.readouterr().out
    torch.testing.assert_close(loaded.scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert loaded.vae.config.scaling_factor == pipeline.vae.config.scaling_factor


def assert_same_computation(name: str, pipeline: DiffusionPipeline, loaded: DiffusionPipeline) -> None:
    model = pipeline.components.get(name)
    if model is None:
        return
    other = loaded.components[name].to(memory_format=torch.contiguous_format)
    expected, found = model.state_dict(), other.state_dict()
    assert {*found} == {*expected} and all(torch.equal(found[key], expected[key]) for key in expected)
    torch.manual_seed(1)
    with torch.no_grad():
        if name == "unet":
            added = {"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)}
            inputs: Mapping[str, Any] = {
                "sample": torch.randn(1, 4, 8, 8),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 3, model.config.cross_attention_dim),
                "added_cond_kwargs": added if model.config.addition_embed_type else None,
            }
            torch.testing.assert_close(model.eval()(**inputs).sample, other(**inputs).sample)
        elif name == "vae":
            image = torch.randn(1, 3, 16, 16)
            assert torch.equal(model.eval().encode(image).latent_dist.mean, other.encode(image).latent_dist.mean)
        else:
            tokens = torch.tensor([[49406, 320, 1125, 49407, 0]])
            assert torch.equal(model.eval()(tokens)[0], other(tokens)[0])


def test_the_tokenizer_is_clips(made: Made) -> None:
    import open_clip

    texts = ["a photo of a cat", "Näive  café — 3,000 trees?", "don't", "星空", "x" * 300, ""]
    expected = open_clip.SimpleTokenizer()(texts)
    for kind, padding in (("v1", 49407), ("v2", 0)):
        tokenizer = load_base(str(made[kind][1]), device=CPU, dtype=torch.float32).tokenizer
        found = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        length = (expected != 0).sum(1)
        for row, reference, count in zip(found, expected, length, strict=True):
            assert row[:count].tolist() == reference[:count].tolist() and set(row[count:].tolist()) <= {padding}
    assert found[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_what_export_writes_says_what_shapes_do_not(tmp_path: Path) -> None:
    """The pocket model has heads, norms and tokens of its own; its file, alone in a folder, is the same model."""
    pocket = load_base("pocket", device=CPU, dtype=torch.float32)
    weights = {key: value.contiguous() for key, value in as_original(pocket.components).items()}
    header = header_settings(pocket)
    assert str(POCKET_DIR) not in header[SETTINGS]
    save_file(weights, tmp_path / "model.safetensors", metadata=header)
    again = load_base(str(tmp_path), device=CPU, dtype=torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        config, expected = again.components[part].config, pocket.components[part].config
        config, expected = (it if isinstance(it, dict) else it.to_dict() for it in (config, expected))
        ignored = ("transformers_version", "dtype", "architectures")
        first, second = (
            {key: value for key, value in it.items() if not key.startswith("_") and key not in ignored}
            for it in (config, expected)
        )
        assert first == second
    words = ["a red circle on blue", "zebra?"]
    first, second = (it.tokenizer(words, padding="max_length").input_ids for it in (again, pocket))
    assert first == second
    assert again.tokenizer.model_max_length == pocket.tokenizer.model_max_length
    assert type(again.scheduler) is type(pocket.scheduler)


def test_what_a_checkpoint_predicts_is_said_by_a_tensor_its_header_or_a_setting(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.safetensors"
    weights = load_file(made["xl"][1])
    save_file(weights | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, file)
    base = read_base(str(file))
    require_trainable(base)
    assert base.scheduler["prediction_type"] == "v_prediction" and base.scheduler["rescale_betas_zero_snr"]
    assert base.notes[0].endswith("it predicts v_prediction")
    assert read_base(str(file), prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"
    for metadata, expected, side in (
        ({"modelspec.prediction_type": "epsilon"}, "epsilon", 64),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", 64),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", 96),
        ({}, "v_prediction", 96),
    ):
        save_file(load_file(made["v2"][1]), file, metadata=metadata)
        base = read_base(str(file))
        assert (base.scheduler["prediction_type"], base.unet["sample_size"]) == (expected, side)
        assert ("set prediction_type" in base.notes[0]) == (not metadata)


def test_a_dry_run_reads_the_header_alone(
    made: Made,
    tiny_pairs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    diffusers_log: pytest.LogCaptureFixture,
) -> None:
    """And prints no line of diffusers, which warns of every cast to half precision."""
    monkeypatch.setattr(loading, "load_checkpoint", None)
    monkeypatch.setattr("diffusion_dpo.dry_run._show_cards", lambda *_: None)  # which is slow, and tested elsewhere
    small = ["resolution_px=64", "preview=null", "per_device_batch_size=1", "global_batch_size=1"]
    small.append("mixed_precision=bf16")
    arguments = ["train", "--dry-run", f"data.path={tiny_pairs}", *small]
    assert main([*arguments, f"model.pretrained={made['xl'][1]}"]) == 2
    assert "which model.type=stable_diffusion_xl trains" in capsys.readouterr().err
    assert main([*arguments, f"model.pretrained={made['v1'][1]}"]) == 0
    assert "disk:" in capsys.readouterr().out
    assert not diffusers_log.records


OTHERS = {
    "lora_unet_down_blocks_0.lora_down.weight": "a LoRA: give it as adapter_path",
    "unet.down_blocks.0.attn1.to_q.lora_A.weight": "a LoRA: give it as adapter_path",
    "double_blocks.0.img_attn.qkv.weight": "a FLUX transformer",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a FLUX transformer",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 transformer",
    "first_stage_model.decoder.up.0.block.0.conv1.weight": "a VAE alone",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "a VAE alone",
    "down_blocks.0.resnets.0.conv1.weight": "a UNet of a diffusers folder",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder alone",
    "emb_params": "a textual inversion",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "something.else": "no checkpoint of Stable Diffusion: it holds something.else",
    "model.diffusion_model.input_blocks.0.0.weight": "holds a UNet without text encoders",
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_file_that_is_no_whole_checkpoint_is_called_what_it_is(key: str, tmp_path: Path) -> None:
    save_file({key: torch.zeros(2, 2)}, tmp_path / "m.safetensors")
    with pytest.raises(ConfigError) as caught:
        read_base(str(tmp_path / "m.safetensors"))
    text = str(caught.value)
    assert OTHERS[key] in text and "is needed as pretrained" in text and "\n" not in text


@pytest.mark.parametrize(
    "fault", ["inpainting", "no vae", "lost layer", "narrow", "guidance", "edm", "refiner", "cut off"]
)
def test_a_checkpoint_that_cannot_be_used_is_refused_by_name(made: Made, fault: str, tmp_path: Path) -> None:
    file, unet = tmp_path / "m.safetensors", "model.diffusion_model."
    weights = load_file(made["xl" if fault in ("refiner", "edm") else "v1"][1])
    says = {
        "inpainting": "takes 9 channels, not 4",
        "no vae": "without its VAE",
        "guidance": "told its guidance scale",
    }
    says |= {"lost layer": f"lacks {unet}out.0.bias, a weight of its unet", "narrow": "layers of width 16"}
    says |= {"edm": "continuous noise levels of EDM", "refiner": "SDXL's refiner", "cut off": "is cut off"}
    if fault == "inpainting":
        weights[f"{unet}input_blocks.0.0.weight"] = torch.zeros(64, 9, 3, 3)
    elif fault == "no vae":
        weights = {key: value for key, value in weights.items() if not key.startswith("first_stage")}
    elif fault == "lost layer":
        del weights[f"{unet}out.0.bias"]
    elif fault == "narrow":
        weights[f"{unet}input_blocks.1.0.out_layers.3.weight"] = torch.zeros(16, 16, 3, 3)
    elif fault == "guidance":
        weights[f"{unet}time_embed.cond_proj.weight"] = torch.zeros(64, 256)
    elif fault == "edm":
        weights["edm_vpred.sigma_max"] = torch.tensor(120.0)
    elif fault == "refiner":
        keep = [key for key in weights if not key.startswith("conditioner")]
        weights = {key: weights[key] for key in keep} | {"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)}
    save_file(weights, file)
    if fault == "cut off":
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ConfigError, match=says[fault]) as caught:
        require_trainable(read_base(str(file)))
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_pickles_and_folders_of_several_files_are_refused(tmp_path: Path) -> None:
    faults = {"a.ckpt": "a pickle by its suffix", "b.gguf": "a GGUF file", "c.pt": "convert it to safetensors"}
    for name, says in faults.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ConfigError, match=says):
            read_base(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"it holds 3 files of weights, such as a.ckpt: name one of them"):
        read_base(str(tmp_path))
    with pytest.raises(ConfigError, match=r"there is no file or folder .*none\.safetensors"):
        read_base(str(tmp_path / "none.safetensors"))
    assert json.loads(header_settings(make("v1"))[SETTINGS])["tokenizers"] == {}
