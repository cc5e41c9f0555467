"""The parts of the pocket models: their architectures, their tokenizer, and the batches they are trained on."""

import hashlib
from dataclasses import replace

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageFilter
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusion_dpo.pocket.world import (
    COLORS,
    IMAGE_SIZE_PX,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    render,
    sample_scene,
)

CONTEXT_LENGTH = 24  # the longest caption has 16 tokens
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE_PX, "layers": 4, "width": 96, "head_width": 24, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 0,  # filled in from the tokenizer
        "hf_tokenizer_name": "local",  # open_clip's local-dir: then reads the tokenizer beside this file
        "width": 64,
        "heads": 4,
        "layers": 3,
    },
}


# --- data ------------------------------------------------------------------------------------------------------------


def hash_seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def draw(seed: int, stage: str, step: int, *, batch_size: int, caption_noise: float = 0.0):
    """Draw a batch: captions, and images as float [-1, 1] of shape (B, 3, 64, 64), channels last."""
    rng = np.random.default_rng(hash_seed(seed, stage, step))
    scenes = [sample_scene(rng) for _ in range(batch_size)]
    images = to_tensor([render(scene, rng) for scene in scenes])
    captions = [(corrupt(s, rng) if rng.random() < caption_noise else s).caption for s in scenes]
    return captions, images


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def soften(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Blur and noise of random strength, so that the judge is not surprised by what a VAE decodes."""
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2))))
    pixels = np.asarray(image, np.float32) + rng.normal(0, rng.uniform(0, 8), (IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def corrupt(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change one word of a scene's caption, or swap a property between its two items."""
    while True:
        items, background, relation = list(scene.items), scene.background, scene.relation
        k = int(rng.integers(len(items)))
        kind = rng.choice(["color", "shape", "size", "background", "relation", "swap"])
        if kind == "background":
            background = str(rng.choice(list(COLORS)))
        elif kind == "relation" and relation:
            relation = str(rng.choice(RELATIONS))
        elif kind == "swap" and relation:
            field = str(rng.choice(["color", "shape", "size"]))
            values = [getattr(item, field) for item in items]
            items = [replace(item, **{field: value}) for item, value in zip(items, values[::-1], strict=True)]
        elif kind in ("color", "shape", "size"):
            choices = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES)}[str(kind)]
            if kind != "size" or items[k].size:
                items[k] = replace(items[k], **{str(kind): str(rng.choice(choices))})
        changed = Scene(tuple(items), background, relation)
        if changed != scene and all(item.color != background for item in items):
            return changed


def also_true(drawn: list[Scene], captions: list[Scene], group: int) -> torch.Tensor:
    """Mask (images, captions) of captions that hold for another scene's image too (twins may differ by nothing)."""

    def holds(caption: Scene, scene: Scene) -> bool:
        if caption.background != scene.background or len(caption.items) != len(scene.items):
            return False
        orders = [(scene.items, scene.relation)]
        if scene.relation:
            orders.append((scene.items[::-1], OPPOSITE[scene.relation]))
        return any(
            caption.relation == relation
            and all(
                (c.color, c.shape) == (s.color, s.shape) and c.size in (None, s.size)
                for c, s in zip(caption.items, items, strict=True)
            )
            for items, relation in orders
        )

    mask = torch.zeros(len(drawn), len(captions), dtype=torch.bool)
    for start in range(0, len(drawn), group):
        for i in range(start, start + group):
            for j in range(start, start + group):
                mask[i, j] = i != j and holds(captions[j], drawn[i])
    return mask


# --- the parts -------------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,  # more, over 8 channels, normalise away the colour of the background
        latent_channels=4,
        sample_size=IMAGE_SIZE_PX,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE_PX // 8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", clip_sample=False
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer with one token for every word of the grammar; other words fall into letters."""
    words = {word for text in (*COLORS, *SHAPES, *SIZES, *RELATIONS, "a on background") for word in text.split()}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")
    vocabulary = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in sorted(words, key=lambda word: (-len(word), word)):  # a short word's merges must not split a long one
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + ("</w>" if i == len(word) - 1 else "")
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # the end must have the highest id: CLIP pools at its argmax
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges, model_max_length=CONTEXT_LENGTH
    )
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] for word in words)
    return tokenizer


def clip_config(tokenizer: CLIPTokenizer) -> dict:
    return CLIP_CONFIG | {"text_cfg": CLIP_CONFIG["text_cfg"] | {"vocab_size": len(tokenizer)}}


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids
