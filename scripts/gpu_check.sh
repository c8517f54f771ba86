#!/bin/sh
# On a machine with a GPU: run what tests cannot say without one, then measure, and print a short table last. It is thought
# to take an hour, and needs 40 GB of disk; with --quick, eight minutes and 12 GB. Arguments go to benchmarks/gpu.py. PYTHON
# names an interpreter; if moeinf answers there already it is used as it is, and otherwise a virtual environment is made in
# VENV (default .venv), which takes a network.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
begin=$(date +%s)

say() {
    echo "gpu_check, $(($(date +%s) - begin)) s: $*" >&2
}

answers() {
    home=$(mktemp -d)
    if said=$("$python" -c 'import accelerate, psutil, pytest' 2>&1) &&
        said=$(MOEINF_HOME=$home PYTHONPATH=src "$python" -m moeinf run demo Hello --max-tokens 2 --device cpu 2>&1); then
        can=0
    else
        can=1
        say "moeinf does not run in $python: $(echo "$said" | tail -n 2 | tr '\n' ' ')"
    fi
    rm -rf "$home"
    return $can
}

has_library() {
    PYTHONPATH=src "$python" -c 'from moeinf.shared_library import load_library; load_library(())' 2>/dev/null
}

say "asking moeinf in $python for two tokens"
if ! answers; then
    say "making a virtual environment in ${VENV:=.venv}"
    . scripts/venv.sh
    PIP_RETRIES=${PIP_RETRIES:-1}
    export PIP_RETRIES
    make_venv "$VENV" '[dev]' >&2
    python=$VENV/bin/python
    answers
fi
if ! has_library; then
    if command -v "${CC:-cc}" >/dev/null &&
        "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; then
        say "building the native library"
        "$python" -c 'import setuptools; setuptools.setup()' -q build_ext --inplace >&2 || say "it could not be built"
    fi
    has_library || say "no native library: what the processor computes, torch does"
fi
say "beginning"
exec env PYTHONPATH=src "$python" benchmarks/gpu.py "$@"
