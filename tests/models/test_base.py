"""What the JSON files and file names of a base say before its weights are read: taken exactly, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from diffusion_dpo.cli import main
from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.base import read_base
from diffusion_dpo.models.requirements import require_drawable, require_trainable
from diffusion_dpo.models.stable_diffusion import StableDiffusion
from diffusion_dpo.sampling import DrawRequest, draw, load_pipeline
from diffusion_dpo.settings import ImageModel, Sampling

CPU = torch.device("cpu")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture
def folder(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_scheduler(folder: Path, scheduler: Any, **hidden: Any) -> None:
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "scheduler" / "scheduler_config.json", **hidden)
    edit(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        require_trainable(read_base(str(folder)))
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        EulerDiscreteScheduler(**BETAS, rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        PNDMScheduler(beta_schedule="squaredcos_cap_v2"),
        LCMScheduler(),
        HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True),
        DPMSolverMultistepScheduler(trained_betas=torch.linspace(1e-4, 0.03, 50).tolist(), num_train_timesteps=50),
    ],
    ids=lambda it: type(it).__name__,
)
def test_schedulers_that_have_betas_are_trained_at_their_own_noise_levels(folder: Path, scheduler: Any) -> None:
    """Also with betas that are listed, rescaled to end in pure noise, or left to the class's own defaults."""
    put_scheduler(folder, scheduler)
    if isinstance(scheduler, LCMScheduler):  # whose defaults are others than DDPM's
        (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "LCMScheduler"}')
    model = StableDiffusion(pretrained=str(folder)).load(device=CPU, dtype=torch.float32, seed=0)
    latents, noise = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    last = len(scheduler.alphas_cumprod) - 1
    timesteps = torch.tensor([0, last])
    alphas = scheduler.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1).expand_as(latents)
    torch.testing.assert_close(model.add_noise(latents, noise, timesteps), alphas.float(), rtol=1e-4, atol=3e-4)
    assert model.sample_timesteps(torch.tensor([0.99999])).item() == last


def test_schedulers_without_ddpms_noise_levels_are_refused(folder: Path) -> None:
    needed = "a scheduler with betas, such as DDIMScheduler"
    put_scheduler(folder, EDMEulerScheduler(prediction_type="v_prediction"))
    assert "a EDMEulerScheduler, which has no betas; " + needed in refused(folder)
    require_drawable(read_base(str(folder)))  # its images are right: they can be candidates
    put_scheduler(folder, FlowMatchEulerDiscreteScheduler())
    assert "FlowMatchEulerDiscreteScheduler, whose noise levels are those of a flow" in refused(folder)
    put_scheduler(folder, DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert "whose noise levels are those of a flow; " + needed in refused(folder)
    put_scheduler(folder, PNDMScheduler(**BETAS), rescale_betas_zero_snr=True)  # which PNDM does not know
    assert "noise levels are others than DDPM's" in refused(folder)
    put_scheduler(folder, DDIMScheduler(**BETAS), beta_schedule="sigmoidal")
    assert "cannot be made: sigmoidal" in refused(folder)
    edit(folder / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"])
    assert "a NoSuchScheduler, which diffusers does not have" in refused(folder)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "guidance embedding": ("unet", {"time_cond_proj_dim": 256}, "told its guidance scale (time_cond_proj_dim"),
    "classes": ("unet", {"num_class_embeds": 10}, "num_class_embeds=10"),
    "projected": ("unet", {"class_embed_type": "projection"}, "class_embed_type=projection"),
    "image prompt": ("unet", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type=ip_image_proj"),
    "added": ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type=text_time, not None"),
    "inpainting": ("unet", {"in_channels": 9}, "takes 9 channels, not 4: an inpainting"),
    "variance": ("unet", {"out_channels": 8}, "gives 8 channels for 4"),
    "widths": (
        "unet",
        {"cross_attention_dim": 768},
        "reads text embeddings of width 768, and the text encoders give 32",
    ),
    "motion": ("unet", {"_class_name": "UNetMotionModel"}, "is a UNetMotionModel; a UNet2DConditionModel"),
    "vq": ("vae", {"_class_name": "VQModel"}, "is a VQModel, which gives no distribution of latents"),
    "normalized": ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_what_training_does_not_model_is_refused_before_weights_are_read(folder: Path, fault: str) -> None:
    part, changes, says = CONFIGS[fault]
    edit(folder / part / "config.json", **changes)
    for weights in folder.rglob("*.safetensors"):
        weights.write_bytes(b"")
    assert says in refused(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(folder: Path, part: str) -> None:
    shutil.rmtree(folder / part)
    assert f"lacks the folder {part}/" in refused(folder)
    edit(folder / "model_index.json", **{part: [None, None]})
    assert f"a StableDiffusionPipeline without a {part}" in refused(folder)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("model_index.json", '{"_class_name": "StableDiff', "cannot be read as JSON"),
        ("model_index.json", "[]", "should hold the settings of a model"),
        (
            "model_index.json",
            '{"unet": ["diffusers", "UNet2DConditionModel"]}',
            "does not name a pipeline of diffusers",
        ),
        ("model_index.json", '{"_class_name": ["pipeline.py", "Mine"]}', "does not name a pipeline of diffusers"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "a FluxPipeline, a flow transformer"),
        ("model_index.json", '{"_class_name": "StableDiffusionInpaintPipeline"}', "an inpainting pipeline"),
        ("unet/config.json", "", "cannot be read as JSON"),
        ("vae/config.json", None, "lacks vae/config.json"),
        ("scheduler/scheduler_config.json", None, "lacks scheduler/scheduler_config.json"),
    ],
)
def test_damaged_settings_are_named(folder: Path, file: str, text: str | None, says: str) -> None:
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    assert says in refused(folder)


def test_what_only_serves_the_safety_checker_need_not_be_there(folder: Path, tiny_sd: Path) -> None:
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    assert drawn(folder) == drawn(tiny_sd)


def drawn(folder: Path, **settings: Any) -> bytes:
    pipeline = load_pipeline(ImageModel(pretrained=str(folder), **settings), device=CPU, dtype=torch.float32)
    sampling = Sampling(num_inference_steps=2, resolution_px=64)
    return bytes(draw(pipeline, [DrawRequest("abc", seed=1)], sampling)[0].tobytes())


def test_the_only_variant_is_taken_and_said(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = StableDiffusionPipeline.from_pretrained(tiny_sd)
    whole.save_pretrained(tmp_path / "fp16", variant="fp16")
    whole.unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    plain = drawn(tiny_sd)
    assert drawn(tmp_path / "fp16") == plain == drawn(tmp_path / "fp16", variant="fp16")
    assert capsys.readouterr().out.count("variant=fp16 alone, which is taken") == 1
    # the text encoder has another one, too, and the UNet is in shards
    shutil.rmtree(tmp_path / "fp16" / "unet")
    shutil.copytree(tmp_path / "sharded", tmp_path / "fp16" / "unet")
    assert len(list((tmp_path / "fp16" / "unet").glob("*.safetensors"))) > 1
    text = tmp_path / "fp16" / "text_encoder"
    shutil.copy(text / "model.fp16.safetensors", text / "model.ema.safetensors")
    assert drawn(tmp_path / "fp16") == plain


def break_weights(folder: Path, how: str) -> str:
    """Spoil the weight files of a UNet; return what should be said."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "two variants":
        for name in ("bf16", "fp16"):
            shutil.copy(weights, folder / "unet" / f"diffusion_pytorch_model.{name}.safetensors")
        weights.unlink()
        return "set variant to one of bf16, fp16"
    if how == "pickle":
        weights.rename(weights.with_suffix(".bin"))
        return "holds its weights as a pickle alone (diffusion_pytorch_model.bin)"
    if how == "none":
        weights.unlink()
        return "holds no weights (diffusion_pytorch_model.safetensors)"
    lost = dict.fromkeys(load_file(weights), "diffusion_pytorch_model-00001-of-00002.safetensors")
    weights.unlink()
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": lost}))
    return "lacks diffusion_pytorch_model-00001-of-00002.safetensors, which"


@pytest.mark.parametrize("how", ["two variants", "pickle", "none", "lost shard"])
def test_weights_that_cannot_be_chosen_or_read_are_named(folder: Path, how: str) -> None:
    assert break_weights(folder, how) in refused(folder)


def test_a_variant_that_is_not_there_is_answered_with_those_that_are(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no weights of variant=fp16; there: the one without a name"):
        read_base(str(folder), variant="fp16")


@pytest.mark.parametrize(("sample_size", "side"), [([8, 8], 64), ([8, 16], None), (None, None)])
def test_the_size_may_be_a_pair_or_left_open(
    folder: Path,
    tiny_pairs: Path,
    sample_size: Any,
    side: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit(folder / "unet" / "config.json", sample_size=sample_size)
    model = StableDiffusion(pretrained=str(folder)).load(device=CPU, dtype=torch.float32, seed=0)
    if side is not None:
        assert model.resolution_px == side
        return
    with pytest.raises(ConfigError, match="set resolution_px"):
        _ = model.resolution_px
    with pytest.raises(ConfigError, match="set resolution_px"):
        draw(model.pipeline, [DrawRequest("abc", seed=1)], Sampling())
    assert main(["train", "--dry-run", f"data.path={tiny_pairs}", f"model.pretrained={folder}", "preview=null"]) == 2
    assert f"(sample_size is {sample_size}): set resolution_px" in capsys.readouterr().err


def test_a_tiny_autoencoder_draws_and_is_not_trained_on(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8))
    tiny.save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert "a AutoencoderTiny, which gives no distribution of latents as AutoencoderKL does" in refused(folder)
    assert len(drawn(folder)) == 64 * 64 * 3
