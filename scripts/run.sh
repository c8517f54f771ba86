#!/bin/sh
# Set moeinf up in .venv and run it with the arguments given, for example:  scripts/run.sh chat olmoe-instruct
set -eu
cd "$(dirname "$0")/.."
. scripts/venv.sh
make_venv .venv >&2
exec .venv/bin/moeinf "${@:---help}"
