#!/usr/bin/env bash
# What to run on a machine with an NVIDIA GPU, most valuable first, in nine minutes.
#
#   benchmarks/gpu_suite.sh               # results go to $OUT, by default benchmarks/results/local
#   benchmarks/gpu_suite.sh --dry-run     # the same path on a CPU with tiny sizes: shows that the script works
#   BUDGET=180 STAGES="selfcheck info layer" benchmarks/gpu_suite.sh           # only these, in three minutes
#   BUDGET=3600 STAGES="tests merges ceilings memcheck" benchmarks/gpu_suite.sh      # what takes longer
#
# It has not run on a GPU yet. BUDGET is for the whole call, in seconds. Each stage also has a limit of its own and writes
# as it runs, so a stopped run keeps its results; the last stages get what is left. No stage reads what an earlier call
# wrote. A call without STAGES leaves seven files: suite.log, summary.txt (one line per stage), selfcheck.json (verdicts of
# all kernels), products.json (products, errors and rates, beside cuBLAS), layer.json (TSV-Merge of matrices of one layer,
# by each solver and by SVDs), kernels.json (five element-wise ops), model.json (merges of a small model of Mistral-7B's
# shapes, with 6 GB of device memory and without a limit).
#
# LAYERS (default 4) is how much of Mistral-7B is merged, MODEL_FOLDER (default $TMPDIR) and OUTPUT_FOLDER (default the
# same) where it is stored: 4 layers take 12 GB, all 32 take 58 GB and 15 GB for the output.
#
# Needs Python with torch; installs nothing from the network. WHEELS=DIR: a folder of wheels for what else is missing
# (pydantic, safetensors, rich, PyYAML, xxhash, filelock; for `tests` hypothesis, pytest). The native modules are built with
# nvcc, in up to three minutes, unless r_tsvm_kernels/_cuda*.so is there for this Python. Exit code 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" device=cuda extent=--full patience=1
[ "${1:-}" = "--dry-run" ] && dry=--dry-run device=cpu extent=--dry-run patience=10
[ -n "$dry" ] && export OMP_NUM_THREADS=1 # more threads than cores make tiny sizes slow
OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
STAGES=${STAGES:-wheels machine build selfcheck info products layer kernels model racecheck initcheck}
mkdir -p "$OUT"
failed=0
deadline=$((SECONDS + ${BUDGET:-$((540 * patience))}))
: > "$OUT/summary.txt"
: > "$OUT/suite.log"

# stage NAME SECONDS COMMAND...: all output to suite.log, one line to summary.txt
stage() {
  local name=$1 limit=$(($2 * patience)) start=$SECONDS code=0
  shift 2
  case " $STAGES " in *" $name "*) ;; *) return ;; esac
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
  case " $STAGES " in *" $name "*) rm -f "$OUT/$name.json" ;; esac
  stage "$name" "$limit" "$PYTHON" -m r_tsvm_kernels bench --device "$device" "$extent" --json "$OUT/$name.json" "$@"
}

[ -n "${WHEELS:-}" ] && stage wheels 30 "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
if [ -z "$dry" ]; then
  stage machine 10 nvidia-smi
  if ! "$PYTHON" -c "import r_tsvm_kernels._cuda" 2> /dev/null; then
    export RTSVM_BUILD_CUDA=on
    CUDAARCHS=${CUDAARCHS:-native}
    export CUDAARCHS
    stage build 180 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
  fi
fi
# What passes is what later stages run. A kernel that fails makes this stage fail, not the others.
# shellcheck disable=SC2016 # the inner shell's variables
stage selfcheck 90 bash -c '"$0" -m r_tsvm_kernels selfcheck --device "$1" --json > "$2"' \
  "$PYTHON" "$device" "$OUT/selfcheck.json"
stage info 30 "$PYTHON" -m r_tsvm_kernels info # has the verdicts even if the self-check was stopped
stage products 60 "$PYTHON" -m benchmarks.products --out "$OUT" $dry
stage layer 100 "$PYTHON" -m benchmarks.layer_merge --out "$OUT" $dry
bench kernels 60 --only task_statistics --only magnitude_select --only reweight_prune --only elect_and_sum \
  --only add_update
folder=${MODEL_FOLDER:-${TMPDIR:-/tmp}}
# shellcheck disable=SC2086 # LAYERS is a list
stage model 90 "$PYTHON" -m benchmarks.model_merge --layers ${LAYERS:-4} --folder "$folder" \
  --output "${OUTPUT_FOLDER:-$folder}" --out "$OUT" $dry
# Many processes, because compiling takes most of the time; warnings of other versions of torch are not failures.
processes=$("$PYTHON" -c "import xdist; print('${dry:+0}' or 8)" 2> /dev/null)
tests=("$PYTHON" -m pytest -q -p no:cacheprovider -W default -m gpu)
if [ -z "$dry" ] && command -v compute-sanitizer > /dev/null; then
  # Tensors side by side in one block of memory would hide a step over the end of one.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in racecheck initcheck memcheck; do
    limit=$([ "$tool" = memcheck ] && echo 240 || echo 35)
    stage "$tool" "$limit" compute-sanitizer --tool "$tool" --kernel-regex kns=r_tsvm --error-exitcode 1 \
      "${tests[@]}" tests/ops/test_{elect_and_sum,magnitude_ranks}.py -k "cuda and 1031"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
stage tests 600 "${tests[@]}" ${processes:+-n "$processes" --dist loadgroup} tests/ops tests/linalg tests/engine
bench merges 900 --only linalg --only merges
stage ceilings 240 "$PYTHON" -m benchmarks.ceilings --out "$OUT" $dry
exit $failed
