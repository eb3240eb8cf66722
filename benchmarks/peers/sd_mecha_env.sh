#!/usr/bin/env bash
# Make a virtual environment that holds sd-mecha, in which `tests/integrations/test_sd_mecha.py` runs.
#
#   benchmarks/peers/sd_mecha_env.sh [DIR]      DIR: .venv-sd-mecha at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/sd_mecha_env.sh
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# sd-mecha, and what our package itself needs to run from the source tree.
make_environment sd-mecha 1.1.8 "pydantic PyYAML rich xxhash" "pydantic rich sd_mecha xxhash yaml" "$@"
