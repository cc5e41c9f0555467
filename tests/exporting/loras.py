"""LoRAs of every kind on tiny models, and how plain diffusers loads what they are exported as."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusion_dpo import export
from diffusion_dpo.config import load
from diffusion_dpo.settings import ExportConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
FORMATS = ["diffusers", "kohya", "merged", "single_file"]
PIPELINES = {"sd": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}


class Made:
    """A base, a LoRA of it as diffusers saves one, and what the model in memory draws."""

    def __init__(self, base: Path, folder: Path, unet: LoraConfig, text: LoraConfig | None = None) -> None:
        self.base, self.folder = base, folder
        pipeline = DiffusionPipeline.from_pretrained(base)
        self.kind = type(pipeline)
        self.before = image(pipeline)
        torch.manual_seed(1)
        parts = {"unet": unet}
        if text is not None:
            parts |= {name: text for name in ("text_encoder", "text_encoder_2") if name in pipeline.components}
        for part, config in parts.items():
            pipeline.components[part].add_adapter(config)
        self.after = image(pipeline)
        layers = {part: get_peft_model_state_dict(pipeline.components[part]) for part in parts}
        self.kind.save_lora_weights(
            folder,
            **{f"{part}_lora_layers": weights for part, weights in layers.items()},
            **_collate_lora_metadata({part: pipeline.components[part] for part in parts}),
        )


def image(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0)).to(pipeline.unet.dtype)
    drawn = pipeline("a red fox", latents=noise, num_inference_steps=2, guidance_scale=3.0)
    return np.asarray(drawn.images[0], dtype=int)


def lora(*targets: str, **settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 16, "init_lora_weights": False} | settings, target_modules=list(targets)
    )


def run(model: Made, out: Path, *overrides: str) -> Path:
    settings = [f"adapter_path={model.folder}", f"pretrained={model.base}", f"output_dir={out}", *overrides]
    return export.run(load(ExportConfig, None, settings))


def load_plainly(model: Made, out: Path, format_: str) -> Any:
    """As the documentation of diffusers says, and nothing of ours."""
    if format_ == "merged":
        return model.kind.from_pretrained(out, dtype=torch.float32)
    if format_ == "single_file":
        (file,) = out.glob("*.safetensors")
        return model.kind.from_single_file(str(file), config=str(model.base), dtype=torch.float32)
    pipeline = model.kind.from_pretrained(model.base)
    pipeline.load_lora_weights(out)
    return pipeline


def nothing_left(out: Path) -> bool:
    return not out.exists()
