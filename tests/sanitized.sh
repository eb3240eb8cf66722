#!/usr/bin/env bash
# The CPU kernels' tests on a build with the address and undefined-behaviour sanitizers, then the CUDA kernels with a
# real thread for every CUDA thread under the thread sanitizer. The first report ends it. Needs GCC; the build stays in
# build/sanitized.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
ROOT=$PWD

# One instruction set: the source is the same for all.
CXX=g++ RTSVM_BUILD_CPU=on RTSVM_BUILD_CUDA=off \
  CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -DRTSVM_ISA_CLONES= -DRTSVM_ONE_ISA" \
  "$PYTHON" setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib

# From the folder of the build, whose modules come first. Few examples: a sanitizer needs no rare values, and others
# try them; two threads, so that kernels share their work.
(
  cd build/sanitized/lib
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
  export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2
  "$PYTHON" -c "import r_tsvm_kernels._cpu as built; assert built.__file__.startswith('$PWD'), built"
  # Not captured by descriptor: a report would be lost with the process.
  "$PYTHON" -m pytest "$ROOT/tests/ops" -k cpu -q --capture=sys -n 2 --dist worksteal \
    --hypothesis-profile quick -p no:cacheprovider
  "$PYTHON" -m pytest "$ROOT/tests/linalg/test_two_stage.py" -k "structure or divide or number or panel" -q --capture=sys -p no:cacheprovider
)

RTSVM_SANITIZED=1 "$PYTHON" -m pytest tests/test_cuda_races.py -q -p no:cacheprovider
