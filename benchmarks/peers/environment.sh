# shellcheck shell=bash
# What the *_env.sh beside it share: sourced by them, makes the virtual environment that they describe.
#
#   make_environment PEER VERSION "PACKAGE ..." "MODULE ..." [DIR]
#
# PEER is a package of PyPI; the packages are installed with it. The modules must then be importable, and PEER and torch
# have these versions, or it fails. DIR: .venv-PEER at the repository root unless given. PYTHON: what makes it (python3).
# The second call only checks.

cpu_index=https://download.pytorch.org/whl/cpu

make_environment() {
    local peer=$1 version=$2 packages modules root dir
    read -ra packages <<<"$3"
    read -ra modules <<<"$4"
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    dir=${5:-$root/.venv-$peer}
    py=$dir/bin/python

    # The same torch as ours: its CPU build, without the gigabytes of CUDA libraries.
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    grep '^torch==' "$root/constraints.txt" >"$constraints"
    torch_version=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$constraints" | head -n 1)

    if [ -x "$py" ] && check "$peer" "$version" "${modules[@]}" 2>/dev/null; then
        echo "already complete: $dir"
        return
    fi
    [ -x "$py" ] || "${PYTHON:-python3}" -m venv "$dir"
    # The indexes that pip is set up with may have the CPU build; else PyTorch's own index does.
    pip_install "torch==$torch_version" || pip_install --extra-index-url "$cpu_index" "torch==$torch_version"
    pip_install "$peer==$version" "${packages[@]}"
    check "$peer" "$version" "${modules[@]}"
    echo "installed: $dir"
}

pip_install() { "$py" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" "$@"; }

# check PEER VERSION MODULE...: prints the versions; fails where anything is missing or not the pinned version.
check() {
    "$py" - "$torch_version" "$@" <<'EOF'
import contextlib, importlib, io, sys
from importlib.metadata import PackageNotFoundError, version

torch_version, peer, peer_version, *modules = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()):
    for module in modules:
        importlib.import_module(module)

found = version(peer), version("torch").partition("+")[0]
if found != (peer_version, torch_version):
    sys.exit(f"found {peer} {found[0]} and torch {found[1]}, want {peer_version} and {torch_version}")
print("python", sys.version.split()[0])
for name in (peer, "torch", "numpy", "safetensors", "transformers"):
    with contextlib.suppress(PackageNotFoundError):
        print(name, version(name))
EOF
}
