"""The pocket models that come with the package: small, loadable by anyone, and as good as the docs say."""

import json
from itertools import islice

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusion_dpo.models.pipeline import POCKET_DIR
from diffusion_dpo.pocket.oracle import check
from diffusion_dpo.pocket.world import distinct_scenes, render
from diffusion_dpo.sampling import DrawRequest, draw, image_seed, load_pipeline
from diffusion_dpo.scorers import ScoreRequest
from diffusion_dpo.scorers.clip import Clip
from diffusion_dpo.settings import ImageModel, Sampling


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load_pipeline(ImageModel(), device=torch.device("cpu"), dtype=torch.float32)


def test_all_weights_together_are_at_most_12_mb() -> None:
    files = list(POCKET_DIR.parent.rglob("*.safetensors"))
    assert len(files) == 4  # VAE, UNet, text encoder, CLIP
    assert sum(file.stat().st_size for file in files) <= 12e6


def test_plain_diffusers_and_plain_open_clip_load_them() -> None:
    plain = StableDiffusionPipeline.from_pretrained(POCKET_DIR)
    assert plain("a red circle on a blue background", num_inference_steps=2).images[0].size == (64, 64)
    model, _ = open_clip.create_model_from_pretrained(f"local-dir:{POCKET_DIR.parent / 'clip'}")
    assert model.visual.image_size == (64, 64)
    assert (
        json.loads((POCKET_DIR.parent / "clip" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == 64
    )


def test_every_caption_fits_the_text_encoder(pipeline: StableDiffusionPipeline) -> None:
    captions = [scene.caption for scene in islice(distinct_scenes(0, num_items=2), 2000)]
    lengths = [len(ids) for ids in pipeline.tokenizer(captions).input_ids]
    assert max(lengths) == 16 <= pipeline.tokenizer.model_max_length


@torch.no_grad()
def test_the_oracle_is_right_on_vae_reconstructions(pipeline: StableDiffusionPipeline) -> None:
    rng = np.random.default_rng(3)
    scenes = list(islice(distinct_scenes(3), 400))
    right = []
    for start in range(0, len(scenes), 50):
        batch = scenes[start : start + 50]
        pixels = pipeline.image_processor.preprocess([render(scene, rng) for scene in batch])
        decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
        images = pipeline.image_processor.postprocess(decoded, output_type="pil")
        right += [check(image, scene)[1] for image, scene in zip(images, batch, strict=True)]
    assert np.mean(right) >= 0.97


def test_clip_prefers_the_caption_of_an_image_to_others() -> None:
    rng = np.random.default_rng(4)
    scenes = list(islice(distinct_scenes(4), 100))
    clip = Clip()
    clip.load(torch.device("cpu"))
    images = [render(scene, rng) for scene in scenes]
    own = clip.score([ScoreRequest(i, s.caption) for i, s in zip(images, scenes, strict=True)]).values["clip_text"]
    other = clip.score([ScoreRequest(i, s.caption) for i, s in zip(images, scenes[1:] + scenes[:1], strict=True)])
    assert np.mean(own > other.values["clip_text"]) > 0.97


@pytest.mark.slow
def test_the_base_draws_recognisable_scenes_that_are_not_always_right(pipeline: StableDiffusionPipeline) -> None:
    share = {}
    for num_items in (1, 2):
        scenes = list(islice(distinct_scenes(5, num_items=num_items, held_out=True), 48))
        right = []
        for start in range(0, len(scenes), 32):
            batch = scenes[start : start + 32]
            requests = [DrawRequest(scene.caption, image_seed(5, scene.caption, 0)) for scene in batch]
            images = draw(pipeline, requests, Sampling())
            right += [check(image, scene)[1] for image, scene in zip(images, batch, strict=True)]
        share[num_items] = np.mean(right)
    assert 0.45 < share[1] < 0.9
    assert share[2] < share[1] - 0.1
