#!/bin/sh
# Set moeinf up with its test tools and run the tests, on up to four processors (a gigabyte of memory each); arguments go to
# pytest. VENV names the virtual environment (default .venv).
set -eu
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv "${VENV:=.venv}" '[dev]' >&2
exec "$VENV/bin/python" -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
