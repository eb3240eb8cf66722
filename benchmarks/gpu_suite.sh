#!/usr/bin/env bash
# Everything to run on a machine with an NVIDIA GPU: build, GPU tests, memory checker, benchmarks; most valuable first.
#
#   benchmarks/gpu_suite.sh               # results go to $OUT, by default benchmarks/results/local
#   benchmarks/gpu_suite.sh --dry-run     # the same path on a CPU with tiny sizes: shows that the script works
#   STAGES="tests bench" benchmarks/gpu_suite.sh           # only these, where one call may not take that long
#
# bench.json holds every op on every backend, checked against float64; dispatch_order.json the table that follows from
# it, with which model.json merges a whole model. LAYERS (default "2 12") and MODEL_FOLDER (default $TMPDIR) say how much
# of Mistral-7B that is, and where it lies: 12 layers take 35 GB, all 32 take 87 GB, in /dev/shm if it is that large.
#
# Needs Python with torch and, on PATH, nvcc; installs nothing from the network. WHEELS=DIR: a folder of wheels for what
# else is missing (pydantic, safetensors, rich, PyYAML, hypothesis, pytest). Each stage has its own time limit and
# writes its results as it goes, so that a run that is cut off keeps what it has. Exit code 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry="" device=cuda extent=--full
[ "${1:-}" = "--dry-run" ] && dry=--dry-run device=cpu extent=--dry-run
[ -n "$dry" ] && export OMP_NUM_THREADS=1 # more threads than cores make tiny sizes slow
OUT=${OUT:-benchmarks/results/local}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0
: > "$OUT/summary.txt"

# stage NAME SECONDS COMMAND...: all output to suite.log, one line to summary.txt
stage() {
  local name=$1 limit=$2 start code=0
  shift 2
  case " ${STAGES:-$name} wheels machine build " in *" $name "*) ;; *) return ;; esac
  start=$(date +%s)
  printf '\n=== %s: %s\n' "$name" "$*" >> "$OUT/suite.log"
  timeout "$limit" "$@" >> "$OUT/suite.log" 2>&1 || code=$?
  [ "$code" = 0 ] || failed=1
  printf '%-12s exit %-3s %4ss\n' "$name" "$code" $(($(date +%s) - start)) | tee -a "$OUT/summary.txt"
}

: > "$OUT/suite.log"
[ -n "${WHEELS:-}" ] && stage wheels 120 "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
if [ -z "$dry" ]; then
  stage machine 30 nvidia-smi
  export RTSVM_BUILD_CUDA=on
  CUDAARCHS=${CUDAARCHS:-native}
  export CUDAARCHS
  stage build 300 "$PYTHON" -m pip install -q --no-build-isolation --no-deps -e .
fi
stage info 60 "$PYTHON" -m r_tsvm_kernels info
stage tests 300 "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests
stage bench 420 bash -c 'rm -f "$1"; exec "${@:2}" --json "$1"' bench "$OUT/bench.json" \
  "$PYTHON" -m r_tsvm_kernels bench --device "$device" "$extent"
stage dispatch 30 "$PYTHON" benchmarks/dispatch_order.py "$OUT/bench.json" "$OUT/dispatch_order.json"
stage layer 420 "$PYTHON" benchmarks/layer_merge.py --out "$OUT" $dry
# shellcheck disable=SC2086 # LAYERS is a list
stage model 540 "$PYTHON" benchmarks/model_merge.py --layers ${LAYERS:-2 12} \
  --folder "${MODEL_FOLDER:-${TMPDIR:-/tmp}}" --order "$OUT/dispatch_order.json" --out "$OUT" $dry
stage growth 240 "$PYTHON" benchmarks/growth.py --out "$OUT" $dry
stage ceilings 200 "$PYTHON" benchmarks/ceilings.py --out "$OUT" $dry
stage products 100 "$PYTHON" benchmarks/products.py --out "$OUT" $dry
if [ -z "$dry" ] && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/ops/test_elementwise_gpu.py -k "cuda and (1031 or same_bits)"
  done
fi
exit $failed
