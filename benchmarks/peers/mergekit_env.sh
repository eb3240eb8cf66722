#!/usr/bin/env bash
# Make a virtual environment that holds mergekit, the peer of `compare_mergekit_cli`.
#
#   benchmarks/peers/mergekit_env.sh [DIR]      DIR: .venv-mergekit at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/mergekit_env.sh
#
# mergekit is under the LGPL: it is installed and called, nothing of it is copied.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment mergekit 0.1.5 safetensors mergekit.merge_methods "$@"
