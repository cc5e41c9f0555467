"""The pipeline that draws: what an adapter does to it, in any precision."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_dpo.config import ConfigError
from diffusion_dpo.models.adapters import LORA_FILE
from diffusion_dpo.models.stable_diffusion import StableDiffusion
from diffusion_dpo.models.unet_diffusion import Lora
from diffusion_dpo.sampling import DrawRequest, draw, image_seed, load_pipeline, weights_hash
from diffusion_dpo.settings import ImageModel, Sampling

CPU = torch.device("cpu")
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a LoRA, on the first layer too."""
    folder = tmp_path_factory.mktemp("run")
    lora = Lora(rank=2, targets=("to_q", "conv_in"))
    model = StableDiffusion(lora=lora).load(device=CPU, dtype=torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save(folder)
    return folder


def image(model: ImageModel, dtype: torch.dtype = torch.float32) -> np.ndarray:
    pipeline = load_pipeline(model, device=CPU, dtype=dtype)
    (drawn,) = draw(pipeline, [DrawRequest("a red circle", 0)], Sampling(num_inference_steps=3))
    return np.asarray(drawn).astype(int)


def test_an_image_has_the_seed_that_it_always_had() -> None:
    """In every release: candidates that were drawn before are those that would be drawn now."""
    assert image_seed(0, "abc", 0) == 7423538370018057572
    seeds = {image_seed(base, name, index) for base in (0, 1) for name in ("a", "b", "a 1") for index in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)


def test_an_image_is_drawn_from_its_own_seed_and_prompt_whatever_is_beside_it() -> None:
    pipeline = load_pipeline(ImageModel(), device=CPU, dtype=torch.float32)
    requests = [DrawRequest(f"a {colour} circle", seed) for colour, seed in (("red", 3), ("blue", 4), ("red", 5))]
    sampling = Sampling(num_inference_steps=2)
    together = [np.asarray(drawn).astype(int) for drawn in draw(pipeline, requests, sampling)]
    alone = [np.asarray(draw(pipeline, [request], sampling)[0]).astype(int) for request in requests]
    for one, other in zip(together, alone, strict=True):
        assert abs(one - other).max() <= 1
    assert min(abs(alone[a] - alone[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 3
    noise = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)])
    prompts = [request.prompt for request in requests]
    plain = pipeline(prompts, latents=noise, num_inference_steps=2, guidance_scale=sampling.guidance_scale).images
    for one, other in zip(together, plain, strict=True):
        assert abs(one - np.asarray(other).astype(int)).max() <= 1


def test_a_lora_acts_as_strongly_as_asked(run: Path) -> None:
    base, tuned = image(ImageModel()), image(ImageModel(adapter_path=run))
    assert abs(base - tuned).max() > 3
    assert np.array_equal(image(ImageModel(adapter_path=run, adapter_scale=0)), base)
    assert not np.array_equal(image(ImageModel(adapter_path=run, adapter_scale=0.5)), tuned)


def test_a_lora_is_float32_in_half_precision_too(run: Path) -> None:
    pipeline = load_pipeline(ImageModel(adapter_path=run), device=CPU, dtype=torch.bfloat16)
    dtypes = {"lora_" in name: parameter.dtype for name, parameter in pipeline.unet.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    difference = image(ImageModel(adapter_path=run), torch.bfloat16) - image(ImageModel(adapter_path=run))
    assert abs(difference).mean() < 3


def test_the_dropout_of_a_loras_training_is_not_drawn_with(run: Path, tmp_path: Path) -> None:
    with safe_open(run / "adapter" / LORA_FILE, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    header = {"lora_adapter_metadata": json.dumps(settings | {"unet.lora_dropout": 0.9})}
    save_file(load_file(run / "adapter" / LORA_FILE), tmp_path / LORA_FILE, metadata=header)
    assert np.array_equal(image(ImageModel(adapter_path=tmp_path)), image(ImageModel(adapter_path=run)))


def test_a_lora_of_the_unet_alone_is_no_reason_to_log(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        load_pipeline(ImageModel(adapter_path=run), device=CPU, dtype=torch.float32)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert caplog.text == ""


def test_what_a_lora_has_for_the_text_encoder_is_drawn_with(run: Path, tmp_path: Path) -> None:
    weights = load_file(run / "adapter" / LORA_FILE)
    both = weights | {f"{TEXT}.{way}.weight": torch.randn(64, 64) for way in ("up", "down")}
    save_file(both, tmp_path / "both.safetensors")
    save_file({name: both[name] for name in both if name.startswith("text")}, tmp_path / "text.safetensors")
    save_file(weights, tmp_path / "unet.safetensors")
    drawn = [image(ImageModel(adapter_path=tmp_path / f"{name}.safetensors")) for name in ("both", "text", "unet")]
    assert len({picture.tobytes() for picture in [*drawn, image(ImageModel())]}) == 4


def test_an_adapter_that_does_not_fit_is_refused(run: Path, tiny_sd: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit this model"):
        load_pipeline(ImageModel(pretrained=str(tiny_sd), adapter_path=run), device=CPU, dtype=torch.float32)


def test_the_hash_of_the_weights_follows_the_adapter(run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    file = tmp_path / "adapter" / LORA_FILE
    file.write_bytes((run / "adapter" / LORA_FILE).read_bytes())
    before = weights_hash(ImageModel(adapter_path=run))
    assert weights_hash(ImageModel(adapter_path=tmp_path)) == before != weights_hash(ImageModel())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert weights_hash(ImageModel(adapter_path=tmp_path)) != before
