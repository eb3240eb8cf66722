import subprocess
import sys

import pytest

import r_tsvm_kernels


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


def test_every_public_name_is_there():
    for name in r_tsvm_kernels.__all__:
        assert getattr(r_tsvm_kernels, name) is not None
    assert set(r_tsvm_kernels.__all__) <= set(dir(r_tsvm_kernels))
    with pytest.raises(AttributeError, match="no_such_name"):
        r_tsvm_kernels.no_such_name  # noqa: B018


def test_every_public_name_is_documented():
    for name in r_tsvm_kernels.__all__:
        assert getattr(r_tsvm_kernels, name).__doc__, name
