"""What SDXL has beyond SD: two text encoders, sizes and crops, a VAE that overflows, Turbo; and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.stable_diffusion import StableDiffusion
from diffusion_dpo.models.stable_diffusion_xl import LoadedStableDiffusionXL, StableDiffusionXL
from diffusion_dpo.models.unet_diffusion import Lora
from diffusion_dpo.sampling import DrawRequest, draw, load_pipeline
from diffusion_dpo.settings import ImageModel, Sampling
from tests.fakes import make_stable_diffusion_xl

CPU = torch.device("cpu")
SIZES = torch.tensor([[600, 400, 0, 0, 64, 64], [64, 64, 16, 8, 64, 48]])


def load(path: Path, lora: Lora | None = None, dtype: torch.dtype = torch.float32) -> LoadedStableDiffusionXL:
    return StableDiffusionXL(pretrained=str(path), lora=lora).load(device=CPU, dtype=dtype, seed=0)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_prompts_are_encoded_as_the_pipeline_does_and_the_empty_one_is_no_exception(tiny_sdxl: Path) -> None:
    model = load(tiny_sdxl)
    prompts = ["abc", ""]
    found = model.encode_prompts(prompts)
    tokens = model.pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        first = model.pipeline.text_encoder(tokens, output_hidden_states=True)
        second = model.pipeline.text_encoder_2(tokens, output_hidden_states=True)
    states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    torch.testing.assert_close(found["encoder_hidden_states"], states)
    torch.testing.assert_close(found["text_embeds"], second.text_embeds)
    assert found["encoder_hidden_states"].shape == (2, 16, 32 + 24) and found["text_embeds"].shape == (2, 20)
    assert found["encoder_hidden_states"][1].abs().min() > 0


def test_every_part_of_the_conditioning_matters_row_by_row(tiny_sdxl: Path) -> None:
    model = load(tiny_sdxl)
    noisy, timesteps = randn(2, 4, 8, 8), torch.tensor([10, 900])
    conditioning = model.encode_prompts(["abc", "xyz"]) | model.image_conditioning(SIZES)
    assert conditioning["time_ids"].dtype == torch.float32
    before = model.predict(noisy, timesteps, conditioning)
    for name, value in conditioning.items():
        changed = value.clone()
        changed[1] = changed[1].flip(-1)
        after = model.predict(noisy, timesteps, conditioning | {name: changed})
        assert torch.equal(after[0], before[0]), name
        assert not torch.allclose(after[1], before[1], atol=1e-5), name


@pytest.mark.parametrize("shape", [(64, 64), (96, 64)])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(tiny_sdxl: Path, shape: tuple[int, int]) -> None:
    """One step of plain diffusers, caught at its UNet, against our conditioning; and the prediction there."""
    model, caught = load(tiny_sdxl), []
    latents = randn(1, 4, shape[0] // 8, shape[1] // 8)

    def catch(module: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        caught.append((args, kwargs, output[0]))

    hook = model.unet.register_forward_hook(catch, with_kwargs=True)
    model.pipeline(
        "abc", height=shape[0], width=shape[1], latents=latents, num_inference_steps=1, guidance_scale=1,
        original_size=(600, 400), crops_coords_top_left=(16, 8), output_type="latent",
    )  # fmt: skip
    hook.remove()
    ((noisy, timestep), kwargs, prediction), *_ = caught
    sizes = torch.tensor([[600, 400, 16, 8, *shape]])
    conditioning = model.encode_prompts(["abc"]) | model.image_conditioning(sizes)
    assert torch.equal(kwargs["encoder_hidden_states"], conditioning["encoder_hidden_states"])
    for name, value in kwargs["added_cond_kwargs"].items():
        assert torch.equal(value, conditioning[name]), name
    torch.testing.assert_close(model.predict(noisy, timestep[None], conditioning), prediction)


def test_a_vae_that_overflows_in_float16_encodes_and_draws_in_float32(tiny_sdxl: Path, tmp_path: Path) -> None:
    """As SDXL's own does: large activations, which the layers after them make small again."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight"):
        weights[name] *= 1e6
    save_file(weights, file, metadata={"format": "pt"})
    image, noise = randn(1, 3, 64, 64).clamp(-1, 1), randn(1, 4, 8, 8)
    full, half = load(folder, Lora()), load(folder, Lora(), torch.float16)
    assert half.unet.dtype == half.pipeline.text_encoder.dtype == torch.float16
    latents = half.encode_images(image, noise)
    assert torch.equal(latents, full.encode_images(image, noise)) and latents.isfinite().all()
    requests, sampling = [DrawRequest("abc", 0)], Sampling(num_inference_steps=2)
    for model in (half, full):
        model.prediction = np.asarray(draw(model.pipeline, requests, sampling)[0], dtype=int)
    assert full.prediction.std() > 3
    assert abs(half.prediction - full.prediction).mean() < 3

    edit(folder / "vae" / "config.json", force_upcast=False)
    rounded = load(folder, Lora(), torch.float16)
    assert rounded.pipeline.vae.dtype == torch.float16
    assert not rounded.encode_images(image, noise).isfinite().all()  # so that the test above can fail
    assert load(tiny_sdxl, Lora(), torch.bfloat16).pipeline.vae.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_the_hash_of_the_encoders_covers_each_of_them(tiny_sdxl: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(tiny_sdxl, tmp_path / "copy")
    original = load(tiny_sdxl)
    assert load(tmp_path / "copy").encoder_hash == original.encoder_hash
    (file,) = (tmp_path / "copy" / part).glob("*.safetensors")
    weights = load_file(file)
    weights[min(weights)] += 1
    save_file(weights, file, metadata={"format": "pt"})
    edited = load(tmp_path / "copy")
    assert edited.encoder_hash != original.encoder_hash
    assert edited.base_hash == original.base_hash


def test_turbo_is_asked_at_its_own_timesteps_and_draws_without_guidance(tmp_path: Path) -> None:
    model = load(make_stable_diffusion_xl(tmp_path, turbo=True))
    asked = model.sample_timesteps(torch.tensor([0.0, 0.3, 0.6, 0.9]), 4)
    model.pipeline.scheduler.set_timesteps(4)
    drawn = model.pipeline.scheduler.timesteps.long().flip(0)
    assert asked.tolist() == drawn.tolist() == [249, 499, 749, 999]
    sigmas = model.pipeline.scheduler.sigmas[:-1].flip(0).double()
    torch.testing.assert_close(model.log_snr(asked).double(), -2 * sigmas.log(), rtol=1e-4, atol=1e-4)
    for sampling in (Sampling(num_inference_steps=1, guidance_scale=0), Sampling(num_inference_steps=4)):
        requests = [DrawRequest("abc", 0), DrawRequest("xyz", 1)]
        both = draw(model.pipeline, requests, sampling)
        (alone,) = draw(model.pipeline, requests[1:], sampling)
        assert abs(np.asarray(both[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
        assert np.asarray(alone).std() > 3


def test_another_family_is_refused_with_the_model_type_that_it_needs(tiny_sd: Path, tiny_sdxl: Path) -> None:
    for settings, right in (
        (StableDiffusion(pretrained=str(tiny_sdxl)), "stable_diffusion_xl"),
        (StableDiffusionXL(pretrained=str(tiny_sd)), "stable_diffusion"),
        (StableDiffusionXL(pretrained="pocket"), "stable_diffusion"),
    ):
        with pytest.raises(ConfigError, match=rf"which model\.type={right} trains, not") as caught:
            settings.load(device=CPU, dtype=torch.float32, seed=0)
        assert "\n" not in str(caught.value)


FAULTS = {
    "refiner": "StableDiffusionXLImg2ImgPipeline, an image-to-image pipeline or a refiner",
    "inpainting": "StableDiffusionXLInpaintPipeline, an inpainting pipeline",
    "channels": "takes 9 channels, not 4",
    "normalized": "latents_mean",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_fed_otherwise_is_refused_in_one_sentence(tiny_sdxl: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl, folder)
    name = {"refiner": "StableDiffusionXLImg2ImgPipeline", "inpainting": "StableDiffusionXLInpaintPipeline"}
    if fault == "refiner":
        edit(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    if fault in name:
        edit(folder / "model_index.json", _class_name=name[fault])
    elif fault == "channels":
        edit(folder / "unet" / "config.json", in_channels=9)
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        weights["conv_in.weight"] = torch.zeros(16, 9, 3, 3)
        save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    else:
        edit(folder / "vae" / "config.json", latents_mean=[0.0] * 4)
    for use in (load, lambda path: load_pipeline(ImageModel(pretrained=str(path)), device=CPU, dtype=torch.float32)):
        with pytest.raises(ConfigError, match=FAULTS[fault]) as caught:
            use(folder)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_loading_says_nothing(tiny_sdxl: Path, diffusers_log: pytest.LogCaptureFixture) -> None:
    load(tiny_sdxl, Lora())
    assert diffusers_log.text == ""


def test_the_model_card_loads_what_is_saved(tiny_sdxl: Path, tmp_path: Path) -> None:
    for lora, name in ((Lora(), "adapter"), (None, "unet")):
        settings = StableDiffusionXL(pretrained=str(tiny_sdxl), lora=lora)
        model = settings.load(device=CPU, dtype=torch.float32, seed=0)
        with torch.no_grad():
            for parameter in model.trainable().values():
                parameter.add_(randn(*parameter.shape) * 0.05)
        saved = model.save(tmp_path / name)
        assert saved.name == name
        scope: dict[str, object] = {}
        exec(settings.usage(str(saved)), scope)
        plain = load(tiny_sdxl)
        plain.unet = scope["pipe"].unet.eval()  # type: ignore[attr-defined]
        conditioning = model.encode_prompts(["abc", "xyz"]) | model.image_conditioning(SIZES)
        inputs = (randn(2, 4, 8, 8), torch.tensor([10, 900]), conditioning)
        torch.testing.assert_close(plain.predict(*inputs), model.predict(*inputs), rtol=0, atol=1e-5)
        assert not torch.allclose(load(tiny_sdxl).predict(*inputs), model.predict(*inputs), atol=1e-3)
