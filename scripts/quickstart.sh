#!/usr/bin/env bash
# From a fresh clone to a before/after report: make .venv, install the package, run the demo. Works from any directory.
#
#   scripts/quickstart.sh                    # into runs/demo
#   scripts/quickstart.sh seed=1             # settings are passed on to `diffusion-dpo demo`
#
# The demo takes two to three minutes on two CPU cores and needs no network; installing takes about five.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install .
note "Running the demo: generate, score, pair, train, compare on the pocket model"
.venv/bin/python -m diffusion_dpo demo "$@"
note "Done. To use the command in this shell: source $PWD/.venv/bin/activate"
