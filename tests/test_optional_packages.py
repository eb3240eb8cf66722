"""Everything runs without packages that are not required; and every supported Python reads the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import family

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "r_tsvm_kernels"
OPTIONAL = (
    "triton", "huggingface_hub", "ray", "matplotlib", "transformers", "mergekit", "peft", "fusion_bench", "sd_mecha",
)  # fmt: skip
HIDE = """
import sys
for name in {names}:
    sys.modules[name] = None  # importing it is an ImportError
"""


def run(code, *arguments, names=OPTIONAL):
    program = HIDE.format(names=names) + code
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


COMMAND = "from r_tsvm_kernels.cli import main; sys.exit(main(sys.argv[1:]))"
EVERYTHING = """
import importlib, pkgutil, torch, r_tsvm_kernels as r
from r_tsvm_kernels.methods import METHODS
base = torch.randn(24, 16)
tuned = [base + 0.1 * torch.randn(24, 16) for _ in range(3)]
for method in METHODS:
    assert r.merge_tensors(base, tuned[: METHODS[method].tasks or 3], method).weight.isfinite().all(), method
missing = []
for found in pkgutil.walk_packages(r.__path__, "r_tsvm_kernels.", onerror=lambda name: missing.append(name)):
    if found.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(found.name)
    except ImportError:
        missing.append(found.name)
print(*missing)
"""


def test_every_method_runs_and_every_module_is_imported_without_them():
    missing = run(EVERYTHING).split()
    # These are imported only where their library is.
    allowed = r"r_tsvm_kernels\.(ops\.(\w+\.triton_kernel|_triton\w*)|integrations\.\w+\.\w+|integrations\.\w+)"
    assert [name for name in missing if not re.fullmatch(allowed, name)] == []
    assert "r_tsvm_kernels.ops._triton" in missing


def test_a_checkpoint_is_merged_without_them(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    models = ["--base", str(paths[0]), "--model", str(paths[1]), "--model", str(paths[2])]
    run(COMMAND, "merge", *models, "--method", "rtsvm", str(tmp_path / "out"))
    run(COMMAND, "verify", str(tmp_path / "out"))
    assert "triton is not installed" in " ".join(run(COMMAND, "info").split())


def test_requirements_are_few():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'"([\w-]+)', re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1])
    assert required == ["torch", "numpy", "safetensors", "pydantic", "PyYAML", "rich", "xxhash", "filelock"]


def test_the_oldest_python_reads_every_file():
    oldest = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    for path in [*PACKAGE.rglob("*.py"), ROOT / "setup.py"]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, int(oldest)))
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* ValueError: pass", feature_version=(3, int(oldest)))
