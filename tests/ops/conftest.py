"""Every backend of an op as a parameter of its tests: on the CPU, in Triton's interpreter, emulated, on a GPU."""

import os

import emulated_cuda
import numpy as np
import pytest
import simulated_cublas
import torch
from filelock import FileLock

from r_tsvm_kernels import backends, dispatch


@pytest.fixture
def backend(request, monkeypatch):
    """The name of a backend, set up to run: see `variants.every_backend`. On a GPU new tensors are made there."""
    _, how = request.param
    name, _, where = how.partition(" ")
    if where == "interpreted":
        for each in dispatch.ops().values():  # an op may launch kernels of others
            for attribute, value in each.small.items():
                monkeypatch.setattr(each.triton_kernel, attribute, value)
    elif where in emulated_cuda.ORDERS:
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", where)
        emulated_cuda.install(request.getfixturevalue("emulated_module"), monkeypatch)
    elif where == "simulated":
        simulated_cublas.install(monkeypatch)
    elif where == "device":
        torch.set_default_device("cuda")
        request.addfinalizer(lambda: torch.set_default_device(None))
    return name


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """The CUDA sources, built for the CPU once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "_cuda.so").is_file():
            emulated_cuda.build(folder)
    return emulated_cuda.load(folder / "_cuda.so")


def pytest_collection_modifyitems(items):
    """The interpreter computes with NumPy, which warns about overflow and NaN."""
    for item in items:
        if "interpreted" in item.name:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


if backends.triton_interpreter_state() == backends.READY:
    import triton.language as tl
    from triton.runtime import interpreter

    # Half of the interpreter's time would go into what it does anew for each operation: patching the language at each
    # call inside a kernel, and making types.
    def patch_once(fn, patch=interpreter._patch_lang):
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return interpreter._LangPatchScope()

    def made_once(make, key):
        made = {}

        def look_up(*types):
            name = key(*types)
            if name not in made:
                made[name] = make(*types)
            return made[name]

        return look_up

    builder = interpreter.InterpreterBuilder
    interpreter._patch_lang = patch_once

    # Sorting combines by exclusive or, for which the interpreter calls the kernel's function on one element at a time.
    def reduce(self, values, slow=interpreter.ReduceOps.generic_reduce):
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return slow(self, values)
        data = np.bitwise_xor.reduce(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(data, values[0].dtype)]

    interpreter.ReduceOps.generic_reduce = reduce
    interpreter._get_np_dtype = made_once(interpreter._get_np_dtype, lambda dtype: dtype.name)
    tl.block_type.with_element_ty = made_once(tl.block_type.with_element_ty, lambda block, new: (block.name, new.name))
    builder.get_block_ty = made_once(builder.get_block_ty, lambda _, dtype, shape: (dtype.name, *shape))
