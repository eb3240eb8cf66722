"""What the kernels of products are launched with: one axis of programs, and sizes that let reads be wide."""

from importlib import import_module

import pytest
import torch

from r_tsvm_kernels import backends, dispatch
from r_tsvm_kernels.ops import Planes, gemm3, split_planes, symm_gram, symm_square

STATE = backends.triton_interpreter_state()
pytestmark = pytest.mark.skipif(STATE != backends.READY, reason=f"launches on the CPU: {STATE}")

KERNELS = {
    "gemm3": ("gemm3.triton_kernel", "gemm3_kernel"),
    "split_planes": ("split_planes.triton_kernel", "split_kernel"),
    "symm_gram": ("_triton_products", "symmetric_kernel"),
    "symm_square": ("_triton_products", "symmetric_kernel"),
}


class Recorder:
    """Stands in for a kernel: keeps the grids and the arguments of its launches."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: self.arguments.append(arguments)


@pytest.fixture
def launched(monkeypatch):
    def of(name):
        recorder = Recorder()
        assert "triton" in dispatch.ops()[name].backends
        module, kernel = KERNELS[name]
        monkeypatch.setattr(import_module(f"r_tsvm_kernels.ops.{module}"), kernel, recorder)
        return recorder

    return of


def zeros(*shape):
    return Planes(torch.zeros(shape).half(), torch.zeros(shape).half(), torch.ones(shape[:-2]))


def test_batches_may_be_larger_than_the_second_axis_of_a_grid(launched):
    many = zeros(70_000, 1, 1)
    calls = {
        "gemm3": lambda: gemm3(many, many, backend="triton"),
        "split_planes": lambda: split_planes(torch.zeros(70_000, 1, 1), backend="triton"),
        "symm_gram": lambda: symm_gram(many, backend="triton"),
        "symm_square": lambda: symm_square(many, 1.0, 1.0, backend="triton"),
    }
    for name, call in calls.items():
        recorder = launched(name)
        call()
        (grid,) = recorder.grids
        assert len(grid) == 1 and grid[0] >= 70_000, name


@pytest.mark.parametrize(("m", "k", "n"), [(33, 17, 5), (64, 65, 32), (33, 64, 64)])
def test_all_sizes_are_filled_up(launched, m, k, n):
    calls = {
        "gemm3": lambda: gemm3(zeros(2, m, k), zeros(2, n, k).mT, 1.0, 1.0, zeros(2, m, n), backend="triton"),
        "symm_gram": lambda: symm_gram(zeros(2, m, k), "right", backend="triton"),
        "symm_square": lambda: symm_square(zeros(2, k, k), 1.0, 1.0, backend="triton"),
    }
    for name, call in calls.items():
        recorder = launched(name)
        call()
        (arguments,) = recorder.arguments
        numbers = [value for value in arguments if isinstance(value, int)]
        assert len(numbers) > 4 and all(number == 1 or number % 16 == 0 for number in numbers), (name, numbers)
