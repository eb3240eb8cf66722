#!/usr/bin/env bash
# Make a virtual environment that holds FusionBench, the peer that `compare_tsvm.py` measures against.
#
#   benchmarks/peers/fusion_bench_env.sh [DIR]      DIR: .venv-fusion-bench at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/fusion_bench_env.sh
#
# A full install with all declared dependencies: importing the one function that we call runs FusionBench's
# package initialisers, and these import lightning, hydra, transformers, datasets and more. torchvision is not
# a declared dependency and the import does not need it.
set -euo pipefail

fusion_bench_version=0.2.33
torch_version=2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=${1:-$root/.venv-fusion-bench}
py=$dir/bin/python

# On Linux the plain version would be the CUDA build, several gigabytes; the "+cpu" label rules that out.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
cat >"$constraints" <<EOF
torch==$torch_version+cpu; platform_system == "Linux"
torch==$torch_version; platform_system != "Linux"
EOF

# Prints the versions; fails where anything is missing or not the pinned version.
check() {
    "$py" - "$fusion_bench_version" "$torch_version" <<'EOF'
import contextlib, io, sys
from importlib.metadata import version

with contextlib.redirect_stdout(io.StringIO()):
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction  # noqa: F401

found = version("fusion-bench"), version("torch").partition("+")[0]
if found != tuple(sys.argv[1:]):
    sys.exit(f"found fusion-bench {found[0]} and torch {found[1]}, want {sys.argv[1]} and {sys.argv[2]}")
print("python", sys.version.split()[0])
for name in ("fusion-bench", "torch", "numpy", "safetensors", "lightning", "transformers"):
    print(name, version(name))
EOF
}

if [ -x "$py" ] && check 2>/dev/null; then
    echo "already complete: $dir"
    exit 0
fi

[ -x "$py" ] || "${PYTHON:-python3}" -m venv "$dir"

pip_install() { "$py" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"; }
# The indexes that pip is set up with may have the CPU build; else PyTorch's own index does.
pip_install "torch==$torch_version" || pip_install --extra-index-url "$cpu_index" "torch==$torch_version"
pip_install "fusion-bench==$fusion_bench_version" safetensors

check
echo "installed: $dir"
