#!/usr/bin/env bash
# Test our backend inside another library, in an environment that holds it: our tests of the integration, then the
# library's own tests without and with our backend.
#
#   tests/integrations/run_suite.sh HOST [DIR]
#   MERGEKIT_TESTS=~/mergekit/tests tests/integrations/run_suite.sh mergekit
#
# HOST is mergekit, fusion_bench, peft or sd_mecha. DIR is the environment: .venv-HOST at the repository root unless
# given. MERGEKIT_TESTS, FUSION_BENCH_TESTS and PEFT_TESTS are the folder `tests` of a checkout of the library, of the
# version that benchmarks/peers/HOST_env.sh installs. Without them:
#
# - mergekit's and PEFT's tests come from their source packages. mergekit's lacks a helper module: tests that need it
#   are left out.
# - FusionBench's packages hold no tests. FusionBench has no test of the methods that we accelerate either, so
#   test_fusion_bench_golden.py, which compares these with float64 formulas and does not import our package, runs with
#   them both times.
#
# sd-mecha computes nothing with our kernels on its own: only our tests run. Nothing is downloaded by tests. PEFT
# downloads most models of its tests: those that need no model run as they are, and the test of all combination types
# runs on models made by peft_local_models.py. The native module of the CPU is used if this checkout holds one for the
# same Python (make dev).
set -euo pipefail

host=${1:?usage: run_suite.sh mergekit|fusion_bench|peft|sd_mecha [DIR]}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=$(realpath -m "${2:-$root/.venv-${host//_/-}}")
py=$dir/bin/python
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# What our own tests and the tests of the host need beside the host.
declare -A needs=(
    [mergekit]="xxhash pyyaml rich setuptools wheel"
    [fusion_bench]="xxhash pyyaml rich"
    [peft]="setuptools wheel datasets diffusers parameterized"
    [sd_mecha]=""
)
"$root/benchmarks/peers/${host}_env.sh" "$dir"
# shellcheck disable=SC2086  # words
"$py" -m pip install --quiet --disable-pip-version-check pytest hypothesis ${needs[$host]}

# get_tests PATH PACKAGE: copy the tests of the host from PATH, or from its source package if PATH is empty.
get_tests() {
    if [ -n "$1" ]; then
        cp -r "$1" "$scratch/tests"
        return
    fi
    local version
    version=$("$py" -c "from importlib.metadata import version; print(version('$2'))")
    "$py" -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps --no-build-isolation \
        --dest "$scratch" "$2==$version"
    tar -xzf "$scratch/$2-$version.tar.gz" -C "$scratch" --strip-components=1 "$2-$version/tests"
}

tests=()    # arguments of pytest that select the tests of the host
case $host in
mergekit)
    get_tests "${MERGEKIT_TESTS:-}" mergekit
    tests=(tests)
    if [ ! -f "$scratch/tests/common.py" ]; then
        while read -r file; do tests+=("--ignore=$file"); done < <(cd "$scratch" && grep -lE '^from tests\b' tests/*.py)
        echo "left out, their helper tests/common.py is missing: ${tests[*]:1}"
        echo "(set MERGEKIT_TESTS to the tests of a checkout to run them, too)"
    fi
    ;;
fusion_bench)
    tests=("$root/tests/integrations/test_fusion_bench_golden.py")
    if [ -n "${FUSION_BENCH_TESTS:-}" ]; then
        get_tests "$FUSION_BENCH_TESTS" fusion-bench
        rm -f "$scratch/tests/test_depth_upscaling.py"
        echo "left out: test_depth_upscaling.py, which makes a model of 7 billion parameters in float32"
        tests+=(tests)
    else
        echo "FusionBench's own tests are left out: set FUSION_BENCH_TESTS to the tests of a checkout to run them, too"
    fi
    ;;
peft)
    get_tests "${PEFT_TESTS:-}" peft
    touch "$scratch/tests/__init__.py" # not in the source package; the tests import each other
    cp "$root/tests/integrations/peft_local_models.py" "$scratch/tests/test_local_models.py"
    tests=(-k "(weighted or merging_adapters) and not seq_cls" tests/test_custom_models.py tests/test_local_models.py)
    ;;
sd_mecha) ;;
*) echo "unknown host $host" >&2; exit 2 ;;
esac

export HF_HUB_OFFLINE=1 RTSVM_BACKEND_IN=$host
failed=0

# suite LOG OPTION...: run the tests of the host; LOG gets the output, LOG.outcomes the outcome of each test.
suite() {
    local log=$1 code=0
    shift
    (cd "$scratch" && "$py" -m pytest -p no:cacheprovider -W ignore -rA --tb=short --continue-on-collection-errors \
        "$@" "${tests[@]}") >"$log" 2>&1 || code=$?
    [ "$code" -le 1 ] || { cat "$log"; exit "$code"; } # 1: some failed
    grep -E '^(PASSED|FAILED|ERROR|XFAIL|XPASS) ' "$log" | sed 's/ - .*//' | sort >"$log.outcomes"
    tail -n 1 "$log"
}

echo "== our tests of the integration"
(cd "$root" && PYTHONPATH=$root "$py" -m pytest -q -p no:cacheprovider \
    tests/integrations/test_installation.py tests/integrations/test_"$host"*.py tests/integrations/test_peers_in_bench.py) || failed=1
[ ${#tests[@]} -gt 0 ] || exit "$failed"
echo "== the tests of $host without our backend"
PYTHONPATH=$root suite "$scratch/before.log"
echo "== the tests of $host with our backend"
PYTHONPATH=$root:$root/tests/integrations suite "$scratch/after.log" -p with_backend

# With our backend mergekit has more methods, and a test for each: outcomes may be added, none may change.
lost=$(comm -23 "$scratch/before.log.outcomes" "$scratch/after.log.outcomes")
[ -z "$lost" ] || { echo "other outcomes with our backend:"; echo "$lost"; failed=1; }
new=$(comm -13 "$scratch/before.log.outcomes" "$scratch/after.log.outcomes" | grep -E '^(FAILED|ERROR) ' || true)
[ -z "$new" ] || { echo "failures with our backend:"; echo "$new"; failed=1; }
# Some of FusionBench's tests want the network; the others have to pass without our backend.
if grep -E '^(FAILED|ERROR) ' "$scratch/before.log.outcomes" | sed 's/^/without our backend: /' | grep . && [ "$host" != fusion_bench ]; then
    failed=1
fi
grep '^calls of our kernels' "$scratch/after.log" | grep -v 'none$' || { echo "our kernels were not called"; failed=1; }
exit "$failed"
