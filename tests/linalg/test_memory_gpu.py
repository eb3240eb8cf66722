"""What the matrix-product route takes on a GPU: counted on tensors that have no values, and below the planned bound."""

import math

import pytest
import torch
from memory import Allocations
from test_host_waits import gpu, kernels  # noqa: F401  # fixtures

from r_tsvm_kernels.linalg import tsv_merge_bytes
from r_tsvm_kernels.linalg.products import merge, subspaces


@pytest.fixture
def some_values(monkeypatch):
    """What the host reads of tensors that have no values."""
    ones = {1: lambda x: [1.0] * len(x), 2: lambda x: [[1.0] * x.shape[1]] * len(x)}
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: ones[x.ndim](x))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: 1.0)


@pytest.mark.parametrize("kernels", ["triton", "cublas"], indirect=True)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "shape", [(4096, 1024), (14336, 4096), pytest.param((32000, 4096), marks=pytest.mark.exhaustive)], ids=str
)
@pytest.mark.parametrize(("tasks", "share"), [(3, 1), (3, 3), (8, 1)])
def test_planned_memory_is_enough_and_not_twice_what_is_used(
    gpu,  # noqa: F811
    kernels,  # noqa: F811
    some_values,
    shape,
    tasks,
    share,
    compressed,
):
    ranks = [min(shape) // tasks // share] * tasks
    levels = torch.empty(tasks, dtype=torch.float64, device=gpu)
    with Allocations() as allocations:
        matrices = torch.empty(tasks, *shape, device=gpu)
        if compressed:
            subspaces.products_subspaces(matrices, ranks, "fp16x3", levels)
        else:
            merge.products_tsv_merge(matrices, ranks, tolerance=math.inf)
    bound = tsv_merge_bytes(shape, ranks, solver="products", simulated=False)
    eigen = tsv_merge_bytes(shape, ranks, solver="eigen")
    assert allocations.peak < bound < max(2 * allocations.peak, 1.01 * eigen)
