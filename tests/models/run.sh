#!/usr/bin/env bash
# Merge real models and load the results: tests/models in an environment that holds transformers, diffusers and PEFT.
#
#   tests/models/run.sh [OPTION...]                 options of pytest
#   PYTHON=python3.11 MODELS_VENV=~/models tests/models/run.sh -k mixtral
#
# The environment is .venv-models at the repository root unless MODELS_VENV names another. Nothing is downloaded by
# tests: models are made from tiny configurations. The native module of the CPU is used if this checkout holds one for
# the same Python (make dev).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=../../benchmarks/peers/environment.sh
source "$root/benchmarks/peers/environment.sh"

# The libraries, and what our package itself needs to run from the source tree.
make_environment transformers 5.24.0 "diffusers==0.42.1 peft==0.21.2 pytest hypothesis pydantic PyYAML rich xxhash" \
    "diffusers hypothesis peft pydantic pytest rich transformers xxhash yaml" "${MODELS_VENV:-$root/.venv-models}"
cd "$root"
HF_HUB_OFFLINE=1 PYTHONPATH=$root exec "$py" -m pytest -q -p no:cacheprovider tests/models "$@"
