#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU: build, GPU tests, compute-sanitizer, C++ and Python benchmarks.
#   bench/gpu_check.sh [build] [test] [sanitize] [bench]     default: all, in this order
# Runs in the repository root of a machine with nvcc and CUDA torch, needs no network. Reports go to $OUT (default: out).
# One failing or hanging step does not hide the next; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-out}" && cd "${OUT:-out}" && pwd)
PYTHON=${PYTHON:-python3}
export MAX_JOBS=${MAX_JOBS:-$(nproc)} NF_CUDA=1 PYTHONUNBUFFERED=1
failed=()

step() {  # step <seconds> <name> <command...>: output to the screen and to $OUT/<name>.log
  local limit=$1 name=$2 begin=$SECONDS
  shift 2
  echo "== $name: $*"
  if timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "== $name: ok, $((SECONDS - begin)) s"
  else
    failed+=("$name")
    echo "== $name: FAILED, $((SECONDS - begin)) s"
  fi
}

build() {
  # In a container the system's Python may refuse to be changed: it is ours to change.
  step 900 build "$PYTHON" -m pip install --break-system-packages --no-build-isolation --no-deps -e .
  step 60 build_info "$PYTHON" -c "import torch; from nemotron_fast import _C; print(_C.build_info(), _C.device_info())"
  step 60 configure cmake -B build/cmake -DNF_CUDA=ON -DNF_CUDA_ARCHS="${NF_CUDA_ARCHS:-80;90a-real}"
  step 900 build_cmake cmake --build build/cmake -j "$MAX_JOBS"
}

run_tests() {
  step 60 test_linear_small build/cmake/test_linear small
  step 60 test_prefill_tiny build/cmake/test_prefill_attention tiny
  step 60 test_attention_tiny build/cmake/test_attention tiny
  step 300 ctest ctest --test-dir build/cmake --output-on-failure --timeout 120
  for family in kernels model; do
    step 300 "pytest_$family" "$PYTHON" -m pytest -m gpu -q -rs "tests/$family"
  done
  step 200 test_linear build/cmake/test_linear
}

sanitize() {
  for tool in memcheck racecheck synccheck initcheck; do
    local check=(compute-sanitizer --tool "$tool" --error-exitcode 1)
    step 120 "sanitizer_norm_$tool" "${check[@]}" build/cmake/test_rms_norm
    step 120 "sanitizer_linear_$tool" "${check[@]}" build/cmake/test_linear tiny
    step 120 "sanitizer_prefill_$tool" "${check[@]}" build/cmake/test_prefill_attention tiny
    step 120 "sanitizer_attention_$tool" "${check[@]}" build/cmake/test_attention tiny
  done
}

run_benches() {
  step 120 bench_cpp build/cmake/bench_rms_norm
  step 120 bench_cpp_linear build/cmake/bench_packed_linear
  for bench in bench/bench_*.py; do
    family=$(basename "$bench" .py)
    step 300 "$family" "$PYTHON" "$bench" --out "$OUT/${family#bench_}.json"
  done
}

phases=${*:-build test sanitize bench}
for phase in $phases; do
  case $phase in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize ;;
    bench) run_benches ;;
    *) echo "$phase: want build, test, sanitize or bench" >&2; exit 2 ;;
  esac
done

echo "failed steps: ${failed[*]:-none}"
exit ${#failed[@]}
