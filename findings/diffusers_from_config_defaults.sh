#!/usr/bin/env bash
# diffusers 0.42.1: a scheduler that is made from another one's config does not always have its noise levels.
#
# The documented way to change a sampler is Other.from_config(pipeline.scheduler.config). What the given scheduler has
# by the defaults of its own class is left out on the way, and the other class takes its own defaults.
# Expected: DDIM made from LCM has LCM's betas (scaled_linear, 0.00085 to 0.012), as the config handed over says.
# Observed: linear betas, 0.0001 to 0.02; nothing is said. After save_pretrained and from_pretrained, whose file lists
# every value, the same line gives the right ones: the same scheduler, two results. Output:
#   given            scaled_linear  0.00085 to 0.01200
#   from its config  linear         0.00010 to 0.02000
#   from its file    scaled_linear  0.00085 to 0.01200
# Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/lcm" <<'PY'
import sys

import diffusers
from diffusers import DDIMScheduler, LCMScheduler

given = LCMScheduler()
direct = DDIMScheduler.from_config(given.config)
given.save_pretrained(sys.argv[1])
by_file = DDIMScheduler.from_config(LCMScheduler.from_pretrained(sys.argv[1]).config)
print("diffusers", diffusers.__version__)
for name, it in (("given", given), ("from its config", direct), ("from its file", by_file)):
    print(f"{name:16} {it.config.beta_schedule:14} {it.betas[0]:.5f} to {it.betas[-1]:.5f}")
assert given.config.beta_start == 0.00085 and by_file.config.beta_start == 0.00085
assert direct.config.beta_start == 0.0001 and direct.config.beta_schedule == "linear", "the behaviour has changed"
PY
