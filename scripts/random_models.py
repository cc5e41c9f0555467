"""Pipelines with the layout of real models and random weights, for benches: speed and memory do not depend on weights.

`mid` has the blocks of Stable Diffusion 1.5 with 92 M parameters in the UNet, for 256 px; its VAE takes 1.35 times the
FLOPs of the UNet, as that of SD 1.5 does (1.39). `sd15` and `sdxl` are what their names say.
"""

from pathlib import Path
from typing import Any, NamedTuple

from diffusion_dpo.models.pipeline import POCKET_DIR


class Layout(NamedTuple):
    """The settings of a pipeline's parts, as far as they are not the defaults of diffusers and transformers."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    texts: list[dict[str, Any]]


_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
LAYOUTS = {
    "mid": Layout(
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 512, 512),
            "attention_head_dim": 8,
            "cross_attention_dim": 256,
            "layers_per_block": 1,
        },
        {**_VAE, "block_out_channels": (40, 80, 160, 160), "norm_num_groups": 8, "sample_size": 256},
        [{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}],
    ),
    "sd15": Layout(
        {
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        {**_VAE, "sample_size": 512},
        [{**_CLIP_L, "vocab_size": 49408}],
    ),
    "sdxl": Layout(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
        {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
        [
            {**_CLIP_L, "vocab_size": 49408},
            {**_BIG_G, "vocab_size": 49408, "hidden_act": "gelu", "projection_dim": 1280},
        ],
    ),
}


def make_pipeline(folder: Path, name: str) -> Path:
    """Write the pipeline of one of LAYOUTS with random weights, in float32; return the folder."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    layout = LAYOUTS[name]
    tokenizer = CLIPTokenizer.from_pretrained(POCKET_DIR / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    configs = [
        CLIPTextConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 77, **special, **text})
        for text in layout.texts
    ]
    tokenizer.model_max_length = 77
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**layout.unet),
        "vae": AutoencoderKL(**layout.vae),
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(configs[0]),
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
    }
    if len(configs) == 2:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(configs[1]), "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts)
    else:
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, **checker)
    pipeline.save_pretrained(folder)
    return folder
