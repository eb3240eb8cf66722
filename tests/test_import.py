import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import r_tsvm_kernels
from r_tsvm_kernels.cli.imports import uncollected


def modules_after(statement):
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light():
    loaded = modules_after("import r_tsvm_kernels")
    assert not loaded & {"torch", "triton", "numpy", "pydantic", "safetensors", "rich", "yaml"}


def test_the_command_line_is_light():
    assert not modules_after("import r_tsvm_kernels.cli") & {"torch", "triton", "pydantic", "rich", "yaml"}


def test_using_it_touches_neither_triton_nor_a_gpu():
    statement = (
        "import r_tsvm_kernels as r, torch; "
        "r.merge_tensors(torch.zeros(3, 3), [torch.ones(3, 3)], r.MergeConfig()); "
        "assert not torch.cuda.is_initialized()"
    )
    assert "triton.runtime" not in modules_after(statement)


def test_a_merge_starts_without_what_it_does_not_need(tmp_path):
    """Of its own, it loads only what every merge needs, and Python's collector does not walk the modules of torch."""
    base, tuned = torch.zeros(4, 4), torch.ones(4, 4)
    save_file({"w": base}, tmp_path / "base.safetensors")
    save_file({"w": tuned}, tmp_path / "tuned.safetensors")
    statement = (
        "import gc; passes = []; gc.callbacks.append(lambda phase, found: passes.append(found['generation'])); "
        "from r_tsvm_kernels.cli import main; "
        "code = main(['merge', '--base=base.safetensors', '--model=tuned.safetensors', '--method=task_arithmetic', "
        "'--quiet', '--device=cpu', 'out.safetensors']); "
        "assert code == 0 and gc.isenabled() and gc.get_freeze_count() > 100_000 and 2 not in passes, (code, passes)"
    )
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone = modules_after("import torch")
    loaded = {name.partition(".")[0] for name in set(done.stdout.split()) - alone}
    assert not loaded & {"torch", "triton", "rich", "scipy", "sympy", "ray", "optuna", "huggingface_hub", "matplotlib"}


def test_the_collector_is_as_it_was_where_torch_is_imported():
    frozen = gc.get_freeze_count()
    with uncollected():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_every_public_name_is_there():
    for name in r_tsvm_kernels.__all__:
        assert getattr(r_tsvm_kernels, name) is not None
    assert set(r_tsvm_kernels.__all__) <= set(dir(r_tsvm_kernels))
    with pytest.raises(AttributeError, match="no_such_name"):
        r_tsvm_kernels.no_such_name  # noqa: B018


def test_every_public_name_is_documented():
    for name in r_tsvm_kernels.__all__:
        assert getattr(r_tsvm_kernels, name).__doc__, name


def test_every_program_of_benchmarks_starts():
    """Imported from the root of the repository as `python -m` does, without the paths that pytest adds."""
    root = Path(__file__).resolve().parents[1]
    hosts = {"check_peft", "compare_peft", "fusion_bench_clip", "fusion_bench_tsvm"}  # run in environments of peers
    left_out = {"__init__", *hosts, *(() if find_spec("triton") else ("gpu_work",))}
    files = [file for file in sorted((root / "benchmarks").rglob("*.py")) if file.stem not in left_out]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    code = f"from importlib import import_module\nfor name in {names}: import_module(name)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert len(names) > 25
    assert done.returncode == 0, done.stderr
