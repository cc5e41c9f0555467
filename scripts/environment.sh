# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: goes to the repository root, and makes or reuses .venv there.
#
# PYTHON=/path/to/python3.x chooses the interpreter; otherwise 3.11, which the versions are tested with, or a later one.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

note() { printf '\n== %s\n' "$*"; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "error: found no Python from 3.11 on with the venv module (on Debian: apt install python3-venv);" \
        "install one, or set PYTHON=/path/to/python3" >&2
    return 2
}

# install WHAT: an editable install with the tested versions, skipped when nothing that decides it has changed.
install() {
    local what=$1 hash stamp python quiet=""
    hash=$(cat pyproject.toml constraints.txt <(pwd) | cksum | tr ' ' '-')
    stamp=.venv/stamp-$hash-$what
    if [[ -f $stamp ]]; then
        note "Using the environment in $PWD/.venv (nothing has changed since it was made)"
        return
    fi
    if [[ ! -x .venv/bin/pip ]]; then
        python=$(find_python)
        note "Making a virtual environment in $PWD/.venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    note "Installing $what with the tested versions: several gigabytes the first time, torch being most of it"
    [[ -t 1 ]] || quiet=--quiet
    .venv/bin/python -m pip install --disable-pip-version-check $quiet --constraint constraints.txt \
        torch torchvision --editable "$what"
    find .venv -maxdepth 1 -name 'stamp-*' ! -name "stamp-$hash-*" -delete
    touch "$stamp"
}

cores() { env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.physicalcpu 2>/dev/null || echo 2; }

# More threads than that do not help models as small as the pocket one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(cores) < 8 ? $(cores) : 8))}
