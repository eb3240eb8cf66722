#!/usr/bin/env bash
# Make a virtual environment that holds PEFT, in which `compare_peft` and `check_peft` run.
#
#   benchmarks/peers/peft_env.sh [DIR]      DIR: .venv-peft at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/peft_env.sh
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# PEFT, and what our package itself needs to run from the source tree.
make_environment peft 0.21.2 "transformers safetensors pydantic PyYAML rich xxhash numpy" \
    "peft pydantic transformers xxhash yaml" "$@"
