#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2: a LoRA in the names of kohya's scripts says an alpha for every layer, which may differ
# (per-block alphas, layers of several ranks). Of the layers that are no attention each is loaded with its own; the
# attention layers (to_q, to_k, to_v, to_out), which are most of a LoRA, all get one: the most frequent alpha of the file.
# A layer without an alpha, whose strength is 1 in the programs that made the format, gets that one, too. Nothing is
# raised; peft warns that a pattern of alphas matched no module, and does so for no layer without an alpha.
#
# Expected: each layer with the strength alpha / rank that its own tensor says; of the file below 0.5, 0.5, 2 and 1.
# Observed: 0.5 for all four, and for the convolutions what they say. Output:
#   0.42.1 down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q: says 0.5, loaded with 0.5
#   0.42.1 down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k: says 0.5, loaded with 0.5
#   0.42.1 down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v: says 2, loaded with 0.5
#   0.42.1 down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q: says 1, loaded with 0.5
#   0.42.1 mid_block.resnets.0.conv1: says 0.5, loaded with 0.5
#   0.42.1 mid_block.resnets.0.conv2: says 2, loaded with 2
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
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

RANK = 2
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ALPHAS = {  # None: the file does not say one, and alpha is the rank
    f"{BLOCK}.attn1.to_q": 1.0,
    f"{BLOCK}.attn1.to_k": 1.0,
    f"{BLOCK}.attn1.to_v": 4.0,
    f"{BLOCK}.attn2.to_q": None,
    "mid_block.resnets.0.conv1": 1.0,
    "mid_block.resnets.0.conv2": 4.0,
}
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
weights = {}
for path, alpha in ALPHAS.items():
    weight = unet.get_submodule(path).weight
    name, ones = "lora_unet_" + path.replace(".", "_"), [1] * (weight.ndim - 2)
    weights[f"{name}.lora_down.weight"] = torch.randn(RANK, *weight.shape[1:])
    weights[f"{name}.lora_up.weight"] = torch.randn(len(weight), RANK, *ones)
    if alpha is not None:
        weights[f"{name}.alpha"] = torch.tensor(alpha)
converted, alphas = StableDiffusionPipeline.lora_state_dict(dict(weights), unet_config=unet.config)
StableDiffusionPipeline.load_lora_into_unet(converted, alphas, unet, adapter_name="x")
loaded = {}
for path, alpha in ALPHAS.items():
    says, loaded[path] = (RANK if alpha is None else alpha) / RANK, unet.get_submodule(path).scaling["x"]
    print(diffusers.__version__, f"{path}: says {says:g}, loaded with {loaded[path]:g}")
assert list(loaded.values()) == [0.5, 0.5, 0.5, 0.5, 0.5, 2.0], "the alphas are no longer loaded so"
PYTHON
