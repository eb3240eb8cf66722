#!/usr/bin/env bash
# Run our tests of the integration with PEFT, then PEFT's own tests of add_weighted_adapter without and with our backend.
#
#   tests/integrations/run_peft_suite.sh [DIR]              DIR: .venv-peft at the repository root unless given
#   PEFT_TESTS=~/peft/tests tests/integrations/run_peft_suite.sh
#
# PEFT_TESTS is the folder `tests` of a checkout of PEFT, of the version that peft_env.sh installs. Without it the tests
# come from PEFT's source package. PEFT downloads most models of its tests; nothing is downloaded here: the tests that
# need no model run as they are, and the test of all combination types runs on models made by peft_local_models.py.
# The native module of the CPU is used if this checkout holds one for the same Python (make dev).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=$(realpath -m "${1:-$root/.venv-peft}")
py=$dir/bin/python

"$root/benchmarks/peers/peft_env.sh" "$dir"
pip_install() { "$py" -m pip install --quiet --disable-pip-version-check "$@"; }
pip_install pytest hypothesis setuptools wheel datasets diffusers parameterized

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -n "${PEFT_TESTS:-}" ]; then
    cp -r "$PEFT_TESTS" "$scratch/tests"
else
    version=$("$py" -c 'from importlib.metadata import version; print(version("peft"))')
    "$py" -m pip download --quiet --disable-pip-version-check --no-binary :all: --no-deps --no-build-isolation \
        --dest "$scratch" "peft==$version"
    tar -xzf "$scratch/peft-$version.tar.gz" -C "$scratch" --strip-components=1 "peft-$version/tests"
fi
touch "$scratch/tests/__init__.py" # not in the source package; the tests import each other
cp "$root/tests/integrations/peft_local_models.py" "$scratch/tests/test_local_models.py"

export HF_HUB_OFFLINE=1
suite() {
    (cd "$scratch" && "$py" -m pytest -q -p no:cacheprovider -W ignore "$@" \
        -k "(weighted or merging_adapters) and not seq_cls" tests/test_custom_models.py tests/test_local_models.py) |
        tee "$log" | tail -n 12
}
failed=0

echo "== our tests of the integration"
(cd "$root" && PYTHONPATH=$root "$py" -m pytest -q -p no:cacheprovider tests/integrations/test_peft*.py tests/integrations/test_peers_in_bench.py) || failed=1
echo "== PEFT's tests without our backend"
log=$scratch/before.log
suite || failed=1
echo "== PEFT's tests with our backend"
log=$scratch/after.log
PYTHONPATH=$root:$root/tests/integrations suite -p with_peft_backend || failed=1

echo "== before: $(tail -n 1 "$scratch/before.log")"
echo "== after:  $(tail -n 1 "$scratch/after.log")"
grep '^layers by our backend' "$scratch/after.log" | grep -v 'none$' || { echo "our backend was not called"; failed=1; }
exit "$failed"
