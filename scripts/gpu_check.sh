#!/bin/sh
# On a machine with a GPU: run what tests cannot say without one, then measure, and print a short table last. It is thought
# to take 45 minutes, and needs 40 GB of disk. Arguments go to benchmarks/gpu.py. PYTHON names an interpreter; if it has torch
# and all else already it is used as it is, and otherwise a virtual environment is made in VENV (default .venv).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import accelerate, pytest, torch, transformers, typer' 2>/dev/null; then
    . scripts/venv.sh
    make_venv "${VENV:=.venv}" '[dev]' >&2
    python=$VENV/bin/python
fi
exec env PYTHONPATH=src "$python" benchmarks/gpu.py "$@"
