#!/usr/bin/env bash
# Run our tests of the integration with sd-mecha in an environment that holds it.
#
#   tests/integrations/run_sd_mecha_suite.sh [DIR]          DIR: .venv-sd-mecha at the repository root unless given
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=$(realpath -m "${1:-$root/.venv-sd-mecha}")

"$root/benchmarks/peers/sd_mecha_env.sh" "$dir"
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check pytest hypothesis
cd "$root"
PYTHONPATH=$root "$dir/bin/python" -m pytest -q -p no:cacheprovider tests/integrations/test_sd_mecha.py
