#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU: build, GPU tests, compute-sanitizer, C++ and Python benchmarks.
#   bench/gpu_check.sh [build] [test] [sanitize] [bench] [model]     default: the first four, in this order
# model: those benches that are of the whole Super-49B, which bench includes
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

sanitize() {  # all at once: a sanitizer leaves most of the GPU idle
  local names=() pids=() program name options
  for tool in memcheck racecheck synccheck initcheck; do
    for program in test_rms_norm "test_linear tiny" "test_prefill_attention tiny" "test_attention tiny"; do
      name="sanitizer_${tool}_${program%% *}"
      options=
      [[ $tool == racecheck ]] && options="--num-cuda-barriers 64"  # more than a GEMM's CTA has
      # shellcheck disable=SC2086
      timeout 400 compute-sanitizer --tool "$tool" $options --error-exitcode 1 build/cmake/$program \
        >"$OUT/$name.log" 2>&1 &
      names+=("$name") pids+=($!)
    done
  done
  for i in "${!pids[@]}"; do
    if wait "${pids[i]}"; then
      echo "== ${names[i]}: ok"
    else
      failed+=("${names[i]}")
      echo "== ${names[i]}: FAILED, see $OUT/${names[i]}.log"
    fi
  done
}

model_benches() {  # the README's figures of Super-49B
  figures_of normal ""
  figures_of dummy _dummy # weights like those of vLLM's figures
}

figures_of() {  # figures_of <values of --random-weights> <suffix of the records' names>
  local suffix=$2
  local model=(--device cuda --model tests/configs/super-49b-v1.json --quantize fp8-static --random-weights "$1")
  local decode=("$PYTHON" bench/bench_decode_step.py --quantize fp8-static --random-weights "$1")
  local bench=("$PYTHON" -m nemotron_fast bench)
  local throughput=("${bench[@]}" throughput "${model[@]}" --kv-dtype fp8 --max-num-seqs 256 --max-model-len 2304)
  if [ "$1" = normal ]; then
    step 90 decode_128 "${decode[@]}" --batch 1,8,32,64 --context 128 --out "$OUT/decode_step.json"
    step 90 beside "${decode[@]}" --fp8-attention --batch 16 --context 128 --beside 32768 \
      --out "$OUT/decode_beside_prompt.json"
    step 90 latency "${bench[@]}" latency "${model[@]}" --max-model-len 4096 --batch 1,8,32,64 --out "$OUT/latency.json"
  fi
  step 90 "decode_1024$suffix" "${decode[@]}" --batch 64,128 --context 1024 --out "$OUT/decode_step${suffix}_1024.json"
  step 90 "decode_640$suffix" "${decode[@]}" --batch 195,256 --context 640 --out "$OUT/decode_step${suffix}_640.json"
  step 90 "ttft$suffix" "${bench[@]}" latency "${model[@]}" --max-model-len 9216 --batch 1 \
    --input-len 512,2048,8192 --output-len 4 --out "$OUT/ttft$suffix.json"
  step 90 "ttft_fp8$suffix" "${bench[@]}" latency "${model[@]}" --kv-dtype fp8 --fp8-attention --max-model-len 9216 \
    --batch 1 --input-len 512,2048,8192 --output-len 4 --out "$OUT/ttft_fp8$suffix.json"
  step 120 "long_outputs$suffix" "${throughput[@]}" --num-prompts 320 --input-len 128 --output-len 1024 \
    --out "$OUT/throughput$suffix.json"
  step 120 "long_prompts$suffix" "${throughput[@]}" --fp8-attention --num-prompts 160 --input-len 2048 --output-len 128 \
    --out "$OUT/throughput${suffix}_long_prompts.json"
}

run_benches() {
  step 120 bench_cpp build/cmake/bench_rms_norm
  step 120 bench_cpp_linear build/cmake/bench_packed_linear
  step 120 bench_cpp_attention build/cmake/bench_attention
  step 120 bench_cpp_step build/cmake/bench_step
  for bench in bench/bench_*.py; do
    family=$(basename "$bench" .py)
    [ "$family" = bench_decode_step ] || step 300 "$family" "$PYTHON" "$bench" --out "$OUT/${family#bench_}.json"
  done
  model_benches
}

phases=${*:-build test sanitize bench}
for phase in $phases; do
  case $phase in
    build) build ;;
    test) run_tests ;;
    sanitize) sanitize ;;
    bench) run_benches ;;
    model) model_benches ;;
    *) echo "$phase: want build, test, sanitize, bench or model" >&2; exit 2 ;;
  esac
done

echo "failed steps: ${failed[*]:-none}"
exit ${#failed[@]}
