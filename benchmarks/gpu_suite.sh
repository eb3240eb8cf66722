#!/usr/bin/env bash
# Everything to run on a machine with an NVIDIA GPU: build, GPU tests, memory checker, benchmarks; most valuable first.
#
#   benchmarks/gpu_suite.sh               # results go to $OUT, by default benchmarks/results/local
#   benchmarks/gpu_suite.sh --dry-run     # the same path on a CPU with tiny sizes: shows that the script works
#   STAGES="build tests" benchmarks/gpu_suite.sh           # only these
#
# It has not run on a GPU yet. All stages take at most half an hour, the most valuable ones less than half of that. On a
# machine that limits commands to ten minutes, make these calls one after the other with the same OUT (BUDGET: seconds for
# the whole call; the last stages get what is left):
#
#   BUDGET=580 STAGES="wheels machine build info selfcheck tests products" benchmarks/gpu_suite.sh
#   BUDGET=580 STAGES="kernels dispatch layer" benchmarks/gpu_suite.sh
#   BUDGET=580 STAGES="ceilings model memcheck racecheck" benchmarks/gpu_suite.sh
#   BUDGET=580 STAGES="merges" benchmarks/gpu_suite.sh
#
# kernels.json has every op on every backend, checked against float64; dispatch_order.json the dispatch table that follows
# from it; model.json merges of a whole model with that table. LAYERS (default "2 12") is how much of Mistral-7B is merged,
# MODEL_FOLDER (default $TMPDIR) and OUTPUT_FOLDER (default the same) where it is stored: 12 layers take 29 GB, 6 GB of
# them the output; all 32 take 58 GB, in /dev/shm if it is that large, and 15 GB for the output.
#
# Needs Python with torch and, on PATH, nvcc; installs nothing from the network. WHEELS=DIR: a folder of wheels for what
# else is missing (pydantic, safetensors, rich, PyYAML, xxhash, hypothesis, pytest). Each stage has its own time limit and
# writes its results as it runs, so a stopped run keeps them. Exit code 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" device=cuda extent=--full
[ "${1:-}" = "--dry-run" ] && dry=--dry-run device=cpu extent=--dry-run
[ -n "$dry" ] && export OMP_NUM_THREADS=1 # more threads than cores make tiny sizes slow
OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0
deadline=$((SECONDS + ${BUDGET:-86400}))
if [ -z "${STAGES:-}" ]; then # later calls of several go on in the same files
  : > "$OUT/summary.txt"
  : > "$OUT/suite.log"
fi

# stage NAME SECONDS COMMAND...: all output to suite.log, one line to summary.txt
stage() {
  local name=$1 limit=$2 start=$SECONDS code=0
  shift 2
  case " ${STAGES:-$name} " in *" $name "*) ;; *) return ;; esac
  printf '\n=== %s: %s\n' "$name" "$*" >> "$OUT/suite.log"
  [ "$limit" -le $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
  if [ "$limit" -gt 5 ]; then
    timeout -k 10 "$limit" "$@" >> "$OUT/suite.log" 2>&1 || code=$?
  else
    code=124 # as `timeout` says it
  fi
  [ "$code" = 0 ] || failed=1
  printf '%-12s exit %-3s %4ss\n' "$name" "$code" $((SECONDS - start)) | tee -a "$OUT/summary.txt"
}

# bench NAME SECONDS ARGUMENTS...: a stage that writes NAME.json, over that of an earlier run
bench() {
  local name=$1 limit=$2
  shift 2
  case " ${STAGES:-$name} " in *" $name "*) rm -f "$OUT/$name.json" ;; esac
  stage "$name" "$limit" "$PYTHON" -m r_tsvm_kernels bench --device "$device" "$extent" --json "$OUT/$name.json" "$@"
}

[ -n "${WHEELS:-}" ] && stage wheels 120 "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
if [ -z "$dry" ]; then
  stage machine 30 nvidia-smi
  export RTSVM_BUILD_CUDA=on
  CUDAARCHS=${CUDAARCHS:-native}
  export CUDAARCHS
  stage build 300 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
fi
stage info 60 "$PYTHON" -m r_tsvm_kernels info
# First of all: what passes is what later stages may run. A kernel that fails makes this stage fail, not the others.
export RTSVM_CACHE="$OUT/cache"
stage selfcheck 120 "$PYTHON" -m r_tsvm_kernels selfcheck --device "$device"
# Many processes, because compiling takes most of the time; warnings of other versions of torch are not failures.
processes=$("$PYTHON" -c "import xdist; print('${dry:+0}' or 8)" 2> /dev/null)
tests=("$PYTHON" -m pytest -q -p no:cacheprovider -W default -m gpu)
stage tests 360 "${tests[@]}" ${processes:+-n "$processes" --dist loadgroup} tests/ops tests/linalg tests/engine
stage products 150 "$PYTHON" -m benchmarks.products --out "$OUT" $dry
bench kernels 420 --only ops
stage dispatch 120 "$PYTHON" -m benchmarks.dispatch_order "$OUT/kernels.json" "$OUT/dispatch_order.json"
stage layer 420 "$PYTHON" -m benchmarks.layer_merge --out "$OUT" $dry
stage ceilings 240 "$PYTHON" -m benchmarks.ceilings --out "$OUT" $dry
order=("--order" "$OUT/dispatch_order.json")
[ -f "${order[1]}" ] || order=() # then the references merge
folder=${MODEL_FOLDER:-${TMPDIR:-/tmp}}
# shellcheck disable=SC2086 # LAYERS is a list
stage model 540 "$PYTHON" -m benchmarks.model_merge --layers ${LAYERS:-2 12} --folder "$folder" \
  --output "${OUTPUT_FOLDER:-$folder}" "${order[@]}" --out "$OUT" $dry
if [ -z "$dry" ] && command -v compute-sanitizer > /dev/null; then
  # Tensors side by side in one block of memory would hide a step over the end of one.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    stage "$tool" 240 compute-sanitizer --tool "$tool" --kernel-regex kns=r_tsvm --error-exitcode 1 \
      "${tests[@]}" tests/ops/test_{elect_and_sum,magnitude_ranks}.py -k "cuda and 1031"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
bench merges 580 --only linalg --only merges
exit $failed
