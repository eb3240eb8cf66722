#!/usr/bin/env bash
# Run our tests of the integration with mergekit, then mergekit's own tests without and with our backend.
#
#   tests/integrations/run_mergekit_suite.sh [DIR]              DIR: .venv-mergekit at the repository root unless given
#   MERGEKIT_TESTS=~/mergekit/tests tests/integrations/run_mergekit_suite.sh
#
# MERGEKIT_TESTS is the folder `tests` of a checkout of mergekit, of the version that mergekit_env.sh installs. Without
# it the tests come from mergekit's source package, which lacks a helper module: those that need it are left out.
# The native module of the CPU is used if this checkout holds one for the same Python (make dev).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=$(realpath -m "${1:-$root/.venv-mergekit}")
py=$dir/bin/python

"$root/benchmarks/peers/mergekit_env.sh" "$dir"
pip_install() { "$py" -m pip install --quiet --disable-pip-version-check "$@"; }
pip_install pytest hypothesis xxhash pyyaml rich setuptools wheel

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${MERGEKIT_TESTS:-}" ]; then
    cp -r "$MERGEKIT_TESTS" "$scratch/tests"
else
    version=$("$py" -c 'from importlib.metadata import version; print(version("mergekit"))')
    "$py" -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps --no-build-isolation \
        --dest "$scratch" "mergekit==$version"
    tar -xzf "$scratch/mergekit-$version.tar.gz" -C "$scratch" --strip-components=1 "mergekit-$version/tests"
fi

ignore=()
if [ ! -f "$scratch/tests/common.py" ]; then
    while read -r file; do ignore+=("--ignore=$file"); done < <(cd "$scratch" && grep -lE '^from tests\b' tests/*.py)
    echo "left out, their helper tests/common.py is missing: ${ignore[*]#--ignore=}"
    echo "(set MERGEKIT_TESTS to the tests of a checkout to run them, too)"
fi

# Nothing is downloaded; the models of the tests are made on the spot.
export HF_HUB_OFFLINE=1
suite() { (cd "$scratch" && "$py" -m pytest -q -p no:cacheprovider -W ignore "${ignore[@]}" "$@" tests) | tee "$log" | tail -n 12; }
failed=0

echo "== our tests of the integration"
(cd "$root" && PYTHONPATH=$root "$py" -m pytest -q -p no:cacheprovider tests/integrations/test_mergekit*.py tests/integrations/test_peers_in_bench.py) || failed=1
echo "== mergekit's tests without our backend"
log=$scratch/before.log
suite || failed=1
echo "== mergekit's tests with our backend: each of our methods adds one"
log=$scratch/after.log
PYTHONPATH=$root:$root/tests/integrations suite -p with_backend || failed=1

echo "== before: $(tail -n 1 "$scratch/before.log")"
echo "== after:  $(tail -n 1 "$scratch/after.log")"
grep '^calls of our kernels' "$scratch/after.log" | grep -v 'none$' || { echo "our kernels were not called"; failed=1; }
exit "$failed"
