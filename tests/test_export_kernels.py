"""The export for the Hugging Face hub runs under another name, with torch alone, and gives the bits of the package."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r_tsvm_kernels import linalg, ops

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "release" / "export_kernels.py"
VARIANTS = ("torch-cpu", "torch-cuda", "torch-rocm")

# Loads a variant as the library `kernels` does, under a name of its own, where other libraries cannot be imported.
LOAD = """
import importlib.util, sys, torch
for name in ("pydantic", "rich", "xxhash", "filelock", "safetensors", "yaml", "triton", "r_tsvm_kernels"):
    sys.modules[name] = None

def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

kernel = load(sys.argv[1], "kernel_4f3a_1")
data = torch.load(sys.argv[2])
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "kernel"
    done = subprocess.run([sys.executable, str(SCRIPT), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def run(exported, tmp_path, data, code):
    """Run code with the export in a process of its own; return what it saved."""
    torch.save(data, tmp_path / "in")
    command = [
        sys.executable,
        "-c",
        LOAD + code,
        str(exported / "build" / "torch-cpu"),
        *map(str, (tmp_path / "in", tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "out", weights_only=False)


def test_ops_and_merges_give_the_same_bits(exported, tmp_path):
    base, tasks = torch.randn(48, 32), [torch.randn(48, 32) for _ in range(3)]
    found = run(exported, tmp_path, [base, tasks], """
base, tasks = data
merged = kernel.linalg.tsv_merge(tasks, [10] * 3)
elected = kernel.ops.elect_and_sum(base, [base + task for task in tasks], [1.0, 0.5, 0.5], elect="sum", normalize=True)
with kernel.use_backend("torch"):
    gram = kernel.ops.task_gram(tasks)
torch.save([merged.matrix, elected, gram, merged.certificate.met], sys.argv[3])
try:
    kernel.ops.task_gram([base, base[:1]])
except kernel.errors.ShapeError:
    pass
else:
    raise SystemExit("no error")
""")  # fmt: skip
    merged = linalg.tsv_merge(tasks, [10] * 3)
    elected = ops.elect_and_sum(
        base, [base + task for task in tasks], [1.0, 0.5, 0.5], elect="sum", normalize=True, backend="torch"
    )
    assert torch.equal(found[0], merged.matrix) and found[3]
    assert torch.equal(found[1], elected)
    assert torch.equal(found[2], ops.task_gram(tasks, backend="torch"))


def test_two_versions_are_loaded_beside_each_other_and_every_op_is_there(exported, tmp_path):
    names = run(exported, tmp_path, None, """
other = load(sys.argv[1], "kernel_4f3a_2")
assert other.ops is not kernel.ops and other.ops.__name__ == "kernel_4f3a_2.r_tsvm_kernels.ops"
assert other.ops.add_update(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
from kernel_4f3a_2.r_tsvm_kernels import dispatch, verdicts
assert not verdicts.enabled()  # no self-checks in here: references, unless a call names a kernel
assert {dispatch.chosen(name, "cuda") for name in dispatch.ops()} == {"torch"}
torch.save([sorted(kernel.ops.__all__), sorted(kernel.linalg.__all__)], sys.argv[3])
""")  # fmt: skip
    assert names == [sorted(ops.__all__), sorted(linalg.__all__)]


def test_metadata_describes_every_file(exported):
    for variant in VARIANTS:
        folder = exported / "build" / variant
        facts = json.loads((folder / "metadata.json").read_text())
        assert facts["name"] == "r-tsvm-kernels" and facts["id"].isidentifier() and facts["version"] == 0
        assert facts["backend"]["type"] == variant.removeprefix("torch-") and facts["python-depends"] == []
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
        assert facts["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()
        }
        kernels = {path.parent.name for path in (folder / "r_tsvm_kernels" / "ops").glob("*/triton_kernel.py")}
        assert kernels == {path.parent.name for path in (ROOT / "r_tsvm_kernels" / "ops").glob("*/triton_kernel.py")}
    assert (exported / "README.md").read_text().startswith("---\n") and (exported / "LICENSE").is_file()


def test_nothing_is_overwritten(exported):
    done = subprocess.run([sys.executable, str(SCRIPT), str(exported)], capture_output=True, text=True)
    assert done.returncode == 2 and "exists; remove it" in done.stderr


def test_other_libraries_are_refused(monkeypatch):
    spec = importlib.util.spec_from_file_location("export_kernels", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "WANTED", ("ops", "linalg", "checkpoint"))
    with pytest.raises(SystemExit, match=r"imports \w+; the export may only import \['numpy', 'torch', 'triton'\]"):
        script.closure()


@pytest.mark.skipif(importlib.util.find_spec("kernels") is None, reason="needs the library kernels: pip install it")
def test_the_library_loads_it(exported):
    from kernels import get_local_kernel

    kernel = get_local_kernel(exported)
    assert kernel.ops.add_update(torch.ones(2), torch.ones(2)).tolist() == [2.0, 2.0]
