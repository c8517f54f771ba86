#!/bin/sh
# Build the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run their tests; arguments go to pytest.
# PYTHON names a Python that moeinf's tests run in (default .venv/bin/python), CC the compiler (default gcc).
set -eu
cd "$(dirname "$0")/.."
: "${PYTHON:=.venv/bin/python}" "${CC:=gcc}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$CC" -std=c11 -g -O1 -Wall -Wextra -Wpedantic -Werror -ffp-contract=fast -fno-math-errno -fno-omit-frame-pointer -fvisibility=hidden \
    -fsanitize=address,undefined -fno-sanitize-recover=all -shared -fPIC -pthread \
    src/moeinf/kernels/csrc/*.c -o "$work/moe.so" -lm
# Python itself leaks on purpose; the sanitizer's allocator has to be the first, and what throws torch's errors known to it.
export ASAN_OPTIONS=detect_leaks=0 MOEINF_TEST_LIBRARY="$work/moe.so"
preload="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libstdc++.so.6)"
LD_PRELOAD="$preload" "$PYTHON" -m pytest -p no:cacheprovider tests/test_native.py tests/test_avx2.py tests/test_native_prompts.py tests/test_orders.py tests/test_lossless.py tests/test_dense.py tests/test_mlp.py tests/test_delta_rule.py tests/test_attention.py \
    tests/test_self_attention.py tests/test_decoder_layer.py tests/test_sinks.py tests/test_native_routing.py tests/test_neighbour_use.py tests/test_transfer.py "$@"
