#!/usr/bin/env bash
# Make a virtual environment that holds sd-mecha, in which `tests/integrations/test_sd_mecha.py` runs.
#
#   benchmarks/peers/sd_mecha_env.sh [DIR]      DIR: .venv-sd-mecha at the repository root unless given
#   PYTHON=python3.11 benchmarks/peers/sd_mecha_env.sh
set -euo pipefail

sd_mecha_version=1.1.8
cpu_index=https://download.pytorch.org/whl/cpu

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
dir=${1:-$root/.venv-sd-mecha}
py=$dir/bin/python

# The same torch as ours: its CPU build, without the gigabytes of CUDA libraries.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep '^torch==' "$root/constraints.txt" >"$constraints"
torch_version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$constraints" | head -n 1)

# Prints the versions; fails where anything is missing or not the pinned version.
check() {
    "$py" - "$sd_mecha_version" "$torch_version" <<'EOF'
import sys
from importlib.metadata import version

import pydantic, rich, sd_mecha, xxhash, yaml  # noqa: E401, F401

found = version("sd-mecha"), version("torch").partition("+")[0]
if found != tuple(sys.argv[1:]):
    sys.exit(f"found sd-mecha {found[0]} and torch {found[1]}, want {sys.argv[1]} and {sys.argv[2]}")
print("python", sys.version.split()[0])
for name in ("sd-mecha", "torch", "safetensors"):
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
# sd-mecha, and what our package itself needs to run from the source tree.
pip_install "sd-mecha==$sd_mecha_version" pydantic PyYAML rich xxhash

check
echo "installed: $dir"
