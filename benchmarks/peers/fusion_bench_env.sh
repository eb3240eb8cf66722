#!/usr/bin/env bash
# Make a virtual environment that holds FusionBench, the peer of `compare_tsvm` and `compare_fusion_bench`.
#
#   benchmarks/peers/fusion_bench_env.sh [DIR]      DIR: .venv-fusion-bench at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/fusion_bench_env.sh
#
# A full install with all declared dependencies: importing the one function that we call runs FusionBench's
# package initialisers, and these import lightning, hydra, transformers, datasets and more. torchvision is not
# a declared dependency and the import does not need it.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

make_environment fusion-bench 0.2.33 safetensors fusion_bench.method.task_singular_vector.utils.TSVM_utils "$@"
