#!/bin/sh
# Build the native kernels for 64-bit ARM, and run their tests on a processor that QEMU plays; arguments go to pytest.
# ROOT names an arm64 system (debootstrap with qemu-user-static; needs the right to chroot) with gcc and a python3 that moeinf's tests run in,
# QEMU_CPU the processor: `max` has everything (the default), `a64fx` no products of bytes. SANITIZE=undefined checks for that.
set -eu
cd "$(dirname "$0")/.."
: "${ROOT:?name an arm64 system}"
export QEMU_CPU="${QEMU_CPU:-max}" PYTHONDONTWRITEBYTECODE=1
work=$(mktemp -d "$ROOT/tmp/moeinf.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp -r src tests pyproject.toml "$work"
chroot "$ROOT" /bin/sh -euc '
    cd "$1"
    shift
    PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
    export PYTHONPATH MOEINF_TEST_LIBRARY="$PWD/moe.so"
    gcc -std=c11 -O2 -Wall -Wextra -Wpedantic -Werror -ffp-contract=fast -fno-math-errno -fvisibility=hidden ${SANITIZE:+-fsanitize=$SANITIZE -fno-sanitize-recover=all} \
        -shared -fPIC -pthread src/moeinf/kernels/csrc/*.c -o moe.so -lm
    cp moe.so "src/moeinf/kernels/_moe$(python3 -c "import sysconfig; print(sysconfig.get_config_var(\"EXT_SUFFIX\"))")"
    exec python3 -m pytest -p no:cacheprovider "$@"
' sh "${work#"$ROOT"}" tests/test_native.py tests/test_dense.py tests/test_lossless.py tests/test_native_routing.py "$@"
