"""The model's own diffusion against formulas written out, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.stable_diffusion import LoadedStableDiffusion, StableDiffusion
from diffusion_dpo.models.unet_diffusion import Lora
from tests.fakes import make_stable_diffusion

CPU = torch.device("cpu")


def load(path: Path, lora: Lora | None = None, dtype: torch.dtype = torch.float32) -> LoadedStableDiffusion:
    return StableDiffusion(pretrained=str(path), lora=lora).load(device=CPU, dtype=dtype, seed=0)


def test_noise_and_targets_follow_the_schedule(any_sd: Path):
    model = load(any_sd)
    assert model.prediction_type == any_sd.name
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_squared = torch.cumprod(1 - betas, 0)
    timesteps = torch.tensor([0, 1, 500, 999])
    alpha = alpha_squared[timesteps].sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alpha_squared[timesteps]).sqrt().view(-1, 1, 1, 1)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noisy = model.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(noisy.double(), alpha * latents + sigma * noise, rtol=1e-4, atol=1e-4)
    expected = noise.double() if any_sd.name == "epsilon" else alpha * noise - sigma * latents
    target = model.target(latents, noise, timesteps)
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-4)
    log_snr = 2 * (alpha / sigma).log().flatten()
    torch.testing.assert_close(model.log_snr(timesteps).double(), log_snr, rtol=1e-3, atol=1e-3)


def test_a_model_that_predicts_the_latents_has_them_as_its_target(tmp_path: Path):
    model = load(make_stable_diffusion(tmp_path, prediction_type="sample"))
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert model.prediction_type == "sample"
    assert torch.equal(model.target(latents, noise, torch.tensor([0, 1, 500, 999])), latents)


@pytest.mark.parametrize(
    ("num_timesteps", "expected"),
    [(None, range(1000)), (4, [249, 499, 749, 999]), (1, [999]), (3, [332, 665, 999]), (1000, range(1000))],
)
def test_timesteps_cover_the_whole_range_evenly(tiny_sd: Path, num_timesteps: int | None, expected: Sequence[int]):
    timesteps = load(tiny_sd).sample_timesteps(torch.linspace(0, 1, 10_001)[:-1], num_timesteps)
    assert timesteps.unique().tolist() == list(expected)
    assert torch.bincount(timesteps)[list(expected)].float().std(unbiased=False) < 1


def test_prompts_and_timesteps_matter(tiny_sd: Path):
    model = load(tiny_sd)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    first, second = (model.encode_prompts([text]) for text in ("abc", "xyz"))
    assert not torch.equal(model.predict(x, t, first), model.predict(x, t, second))
    assert not torch.equal(model.predict(x, t, first), model.predict(x, t // 2, first))


def test_latents_are_scaled_and_equal_images_stay_equal(tiny_sd: Path):
    model = load(tiny_sd)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    latents = model.encode_images(image, noise)
    with torch.no_grad():
        posterior = model.pipeline.vae.encode(image).latent_dist
    expected = (posterior.mean + posterior.std * noise) * model.pipeline.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    assert torch.equal(latents, model.encode_images(image, noise))


def test_trained_weights_are_float32_in_any_precision(tiny_sd: Path):
    for lora in (None, Lora(rank=2)):
        model = load(tiny_sd, lora, torch.bfloat16)
        assert {parameter.dtype for parameter in model.trainable().values()} == {torch.float32}
        assert model.pipeline.vae.dtype == torch.bfloat16


def test_hashes_follow_weights_and_settings_and_not_the_folder(tiny_sd: Path, tmp_path: Path):
    shutil.copytree(tiny_sd, tmp_path / "copy")
    original, copy = load(tiny_sd), load(tmp_path / "copy")
    assert (original.base_hash, original.encoder_hash) == (copy.base_hash, copy.encoder_hash)
    for file, key, value in (
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("vae/config.json", "scaling_factor", 0.5),
    ):
        path = tmp_path / "copy" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    edited = load(tmp_path / "copy")
    assert edited.base_hash != original.base_hash
    assert edited.encoder_hash != original.encoder_hash


@pytest.mark.parametrize("fault", ["class", "channels", "truncated", "text encoder", "prediction"])
def test_a_model_that_cannot_be_used_is_refused_in_one_sentence(tiny_sd: Path, tmp_path: Path, fault: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd, folder)
    edits = {
        "class": ("model_index.json", "_class_name", "NoSuchPipeline"),
        "channels": ("unet/config.json", "in_channels", 9),
        "prediction": ("scheduler/scheduler_config.json", "prediction_type", "flow"),
    }
    if fault in edits:
        name, key, value = edits[fault]
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    else:
        part = "unet/diffusion_pytorch_model" if fault == "truncated" else "text_encoder/model"
        path = folder / f"{part}.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model|channels|predicts") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
