#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU: build, GPU tests, compute-sanitizer, C++ and Python benchmarks.
# Runs in the repository root of a machine with nvcc and CUDA torch, needs no network. Reports go to $OUT (default: out).
# One failing step does not hide the next; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-out}" && cd "${OUT:-out}" && pwd)
PYTHON=${PYTHON:-python3}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} NF_CUDA=1 PYTHONUNBUFFERED=1
failed=()

step() {  # step <name> <command...>: output to the screen and to $OUT/<name>.log
  local name=$1 begin=$SECONDS
  shift
  echo "== $name: $*"
  if "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed+=("$name")
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
}

build_cmake() { cmake -B build/cmake -DNF_CUDA=ON && cmake --build build/cmake -j "$MAX_JOBS"; }

# In a container the system's Python may refuse to be changed: it is ours to change.
step build "$PYTHON" -m pip install --break-system-packages --no-build-isolation --no-deps -e .
step build_info "$PYTHON" -c "import torch; from nemotron_fast import _C; print(_C.build_info(), _C.device_info())"
step build_cmake build_cmake
step ctest ctest --test-dir build/cmake --output-on-failure
step pytest_gpu "$PYTHON" -m pytest -m gpu -q -rs tests

for tool in memcheck racecheck synccheck initcheck; do
  step "sanitizer_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 build/cmake/test_rms_norm
  step "sanitizer_linear_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 build/cmake/test_linear tiny
  step "sanitizer_prefill_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 build/cmake/test_prefill_attention tiny
done

step test_linear build/cmake/test_linear
step bench_cpp build/cmake/bench_rms_norm
step bench_cpp_linear build/cmake/bench_packed_linear
for bench in bench/bench_*.py; do
  family=$(basename "$bench" .py)
  step "$family" "$PYTHON" "$bench" --out "$OUT/${family#bench_}.json"
done

echo "failed steps: ${failed[*]:-none}"
exit ${#failed[@]}
