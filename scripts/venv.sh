# Sourced by the scripts beside it: `make_venv FOLDER EXTRA...` leaves a virtual environment with moeinf and the extras in it.
# Needs Python 3.11 or newer, with pip and venv. With a C compiler the native kernels are built; without one torch computes.

make_venv() {
    venv=$1
    shift
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "moeinf needs Python 3.11 or newer; name one with PYTHON=/path/to/python3" >&2
        exit 2
    }
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".$*"
}
