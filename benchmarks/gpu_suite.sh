#!/usr/bin/env bash
# Everything to run on a machine with an NVIDIA GPU: build, GPU tests, memory checker, benchmarks; most valuable first.
#
#   benchmarks/gpu_suite.sh               # results go to $OUT, by default benchmarks/results/local
#   benchmarks/gpu_suite.sh --dry-run     # the same path on a CPU with tiny sizes: shows that the script works
#   STAGES="tests elementwise" benchmarks/gpu_suite.sh     # only these, where one call may not take that long
#
# Needs Python with torch and, on PATH, nvcc; installs nothing from the network. WHEELS=DIR: a folder of wheels for what
# else is missing (pydantic, safetensors, rich, PyYAML, hypothesis, pytest). Each stage has its own time limit and
# writes its results as it goes, so that a run that is cut off keeps what it has. Exit code 1 if a stage failed.
set -uo pipefail
cd "$(dirname "$0")/.."

dry=""
[ "${1:-}" = "--dry-run" ] && dry=--dry-run
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
stage ceilings 200 "$PYTHON" benchmarks/ceilings.py --out "$OUT" $dry
stage elementwise 150 "$PYTHON" benchmarks/elementwise_gpu.py --out "$OUT" $dry
stage products 200 "$PYTHON" benchmarks/products.py --out "$OUT" $dry
if [ -z "$dry" ] && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 240 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m gpu tests/ops/test_elementwise_gpu.py -k "cuda and (1031 or same_bits)"
  done
fi
exit $failed
