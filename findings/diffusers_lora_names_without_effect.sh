#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: `load_lora_weights` of a LoRA in names that other programs write returns without an
# error, and the UNet computes what it did before. A log line says that no keys were found for the UNet and that this is
# safe to ignore if there were none; the like of it is logged for a file that works, too. Three spellings of one LoRA:
#   a. peft's own, base_model.model.PATH.lora_A.weight: what `PeftModel.save_pretrained` writes;
#   b. ComfyUI's, diffusion_model.PATH.lora_A.weight;
#   c. those of diffusers' attention processors of 2023 without `unet.` in front.
#
# Expected: the LoRA is applied, or an error says that none of its layers was found.
# Observed: nothing is raised, and the output does not move; in diffusers' own names (d) it does. Output, without the log:
#   0.42.1 a, peft: moved by 0
#   0.42.1 b, ComfyUI: moved by 0
#   0.42.1 c, 2023 without unet.: moved by 0
#   0.42.1 d, diffusers: moved by more than 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.14.1 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    parts = {"vae": AutoencoderKL(), "text_encoder": None, "tokenizer": None, "safety_checker": None}
    return StableDiffusionPipeline(
        unet=unet.eval(), scheduler=DDIMScheduler(), feature_extractor=None, requires_safety_checker=False, **parts
    )


def answer(unet):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, 32, generator=generator)
    with torch.no_grad():
        return unet(latents, 10, text).sample


SPELLINGS = {
    "a, peft": ("base_model.model.{block}.{layer}.lora_A.weight", "base_model.model.{block}.{layer}.lora_B.weight"),
    "b, ComfyUI": ("diffusion_model.{block}.{layer}.lora_A.weight", "diffusion_model.{block}.{layer}.lora_B.weight"),
    "c, 2023 without unet.": (
        "{block}.processor.{layer}_lora.down.weight",
        "{block}.processor.{layer}_lora.up.weight",
    ),
    "d, diffusers": ("unet.{block}.{layer}.lora_A.weight", "unet.{block}.{layer}.lora_B.weight"),
}
moved = {}
for name, (down, up) in SPELLINGS.items():
    torch.manual_seed(2)
    weights = {}
    for layer in ("to_q", "to_v"):
        weights[down.format(block=BLOCK, layer=layer)] = torch.randn(2, 16)
        weights[up.format(block=BLOCK, layer=layer)] = torch.randn(16, 2)
    save_file(weights, "lora.safetensors")
    pipe = pipeline()
    before = answer(pipe.unet)
    pipe.load_lora_weights(".", weight_name="lora.safetensors")
    moved[name] = float((answer(pipe.unet) - before).abs().max())
    print(diffusers.__version__, f"{name}: moved by", "more than 0" if moved[name] else "0")
assert [bool(value) for value in moved.values()] == [False, False, False, True], "the names are no longer passed over"
PYTHON
