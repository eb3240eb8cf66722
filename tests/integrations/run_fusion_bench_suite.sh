#!/usr/bin/env bash
# Run our tests of the integration with FusionBench, then FusionBench's own offline tests without and with our backend.
#
#   tests/integrations/run_fusion_bench_suite.sh [DIR]          DIR: .venv-fusion-bench at the repository root unless given
#   FUSION_BENCH_TESTS=~/fusion_bench/tests tests/integrations/run_fusion_bench_suite.sh
#
# FUSION_BENCH_TESTS is the folder `tests` of a checkout of FusionBench, of the version that fusion_bench_env.sh
# installs; its packages on PyPI hold no tests. FusionBench has no test of the methods that we accelerate, so
# test_fusion_bench_golden.py, which compares these with float64 formulas and knows nothing of us, runs along both times.
# The native module of the CPU is used if this checkout holds one for the same Python (make dev).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=$(realpath -m "${1:-$root/.venv-fusion-bench}")
py=$dir/bin/python

"$root/benchmarks/peers/fusion_bench_env.sh" "$dir"
"$py" -m pip install --quiet --disable-pip-version-check pytest hypothesis xxhash pyyaml rich

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
theirs=()
if [ -n "${FUSION_BENCH_TESTS:-}" ]; then
    cp -r "$FUSION_BENCH_TESTS" "$scratch/tests"
    rm -f "$scratch/tests/test_depth_upscaling.py"
    echo "left out: test_depth_upscaling.py, which makes a model of 7 billion parameters in float32"
    theirs=("$scratch/tests")
else
    echo "FusionBench's own tests are left out: set FUSION_BENCH_TESTS to the tests of a checkout to run them, too"
fi

# Nothing is downloaded: tests of FusionBench that want the network fail, without our backend and with it.
export HF_HUB_OFFLINE=1 RTSVM_BACKEND_IN=fusion_bench
golden=$root/tests/integrations/test_fusion_bench_golden.py
failed=0

# suite LOG OPTION...: run the tests, list the outcome of each in LOG.
suite() {
    local log=$1 code=0
    shift
    (cd "$scratch" && "$py" -m pytest -p no:cacheprovider -W ignore -rA --tb=no --continue-on-collection-errors "$@" "${theirs[@]}" "$golden") >"$log" || code=$?
    [ "$code" -le 1 ] || { cat "$log"; exit "$code"; }  # 1: some failed
    grep -E '^(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) ' "$log" | sed 's/ - .*//' | sort >"$log.outcomes"
    tail -n 1 "$log"
}

echo "== our tests of the integration"
(cd "$root" && PYTHONPATH=$root "$py" -m pytest -q -p no:cacheprovider tests/integrations/test_fusion_bench*.py tests/integrations/test_peers_in_bench.py) || failed=1
echo "== FusionBench's tests without our backend"
PYTHONPATH=$root suite "$scratch/before.log"
echo "== FusionBench's tests with our backend"
PYTHONPATH=$root:$root/tests/integrations suite "$scratch/after.log" -p with_backend

diff "$scratch/before.log.outcomes" "$scratch/after.log.outcomes" || { echo "the outcomes differ"; failed=1; }
grep -E '^(FAILED|ERROR) ' "$scratch/before.log.outcomes" | sed 's/^/without our backend, too: /' || true
! grep -qE '^(FAILED|ERROR) .*golden' "$scratch/after.log.outcomes" || failed=1
grep '^calls of our kernels' "$scratch/after.log" | grep -v 'none$' || { echo "our kernels were not called"; failed=1; }
exit "$failed"
