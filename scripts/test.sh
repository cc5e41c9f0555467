#!/usr/bin/env bash
# Every check: lint, format, types, tests. Makes .venv with the development tools if needed. Works from any directory.
#
#   scripts/test.sh                          # all of it, as continuous integration does
#   scripts/test.sh tests/test_config.py -x  # arguments go to pytest
set -euo pipefail
export OMP_NUM_THREADS=1  # models this small gain more from tests side by side
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

find_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

install '.[dev]'
if ! find_chromium >/dev/null; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        note "Installing chromium, which looks at the report's page"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null || true
    fi
    find_chromium >/dev/null || note "WARNING: no chromium here: the browser tests are NOT run"
fi

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
note "ruff: lint"
.venv/bin/python -m ruff check .
note "ruff: format"
.venv/bin/python -m ruff format --check .
note "mypy"
.venv/bin/python -m mypy
workers=$(($(cores) < 4 ? $(cores) : 4))
note "pytest, $workers processes"
.venv/bin/python -m pytest --numprocesses "$workers" --dist worksteal "$@"
note "All checks passed"
