#!/usr/bin/env bash
# transformers 5.23.0 and 4.46.3: a CLIP text encoder that is saved by version 5 (every Stable Diffusion pipeline has one)
# and loaded by version 4 has random weights. Version 5 leaves `text_model.` out of the names of the weights, which
# version 4 looks for; version 5 reads the files of version 4.
#
# Expected: the weights are read, or loading fails.
# Observed: loading succeeds, with a warning on newly initialized weights, and none of them is the saved one. Output:
#   saved by 5.23.0: embeddings.position_embedding.weight and others
#   loaded by 4.46.3: 0 of 8 weights are the saved ones
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.14.1 numpy==2.4.6
"$work/venv/bin/pip" install --quiet --disable-pip-version-check --target "$work/old" transformers==4.46.3 numpy==2.4.6
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" - <<'PYTHON'
import transformers
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

config = CLIPTextConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
CLIPTextModel(config).save_pretrained("encoder")
print(f"saved by {transformers.__version__}:", min(load_file("encoder/model.safetensors")), "and others")
PYTHON
PYTHONPATH="$work/old" "$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from safetensors.torch import load_file
from transformers import CLIPTextModel

saved = {name.removeprefix("text_model."): value for name, value in load_file("encoder/model.safetensors").items()}
loaded = {name.removeprefix("text_model."): value for name, value in CLIPTextModel.from_pretrained("encoder").state_dict().items()}
weights = [name for name in loaded if name in saved and loaded[name].ndim > 1]  # biases and norms begin at 0 and 1
equal = sum(torch.equal(loaded[name], saved[name]) for name in weights)
print(f"loaded by {transformers.__version__}: {equal} of {len(weights)} weights are the saved ones")
assert weights and not equal, "version 4 reads the names of version 5"
PYTHON
