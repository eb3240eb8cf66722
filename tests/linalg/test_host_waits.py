"""The matrix-product route never waits for a GPU: tested with tensors that have no values.

Torch's meta tensors raise when the host asks for a value. Copies between host and device, the other way to wait, are
refused here, except those of `on_device`.
"""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r_tsvm_kernels import backends
from r_tsvm_kernels.dispatch import ops, use_backend
from r_tsvm_kernels.linalg.products import merge, polar_express, purification, subspaces, turning
from r_tsvm_kernels.ops import _cublas

N, TASKS = 96, 3
PRODUCTS = ("split_planes", "symm_gram", "symm_square", "purify_step", "gemm3")


class NoCopies(TorchDispatchMode):
    """Refuse operations on tensors of both host and device, and copies between them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors}) > 1:
            raise AssertionError(f"{func} copies between host and device")
        return result


@pytest.fixture
def gpu(monkeypatch):
    """The device of tensors without values, treated as a GPU is."""

    def gaussian(rows, columns, device):
        return torch.empty(rows, columns, dtype=torch.float64, device=device)

    def to_device(x, device):
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    for module in (merge, purification, subspaces, turning):
        monkeypatch.setattr(module, "gaussian", gaussian)
    monkeypatch.setattr(purification, "to_device", to_device)
    monkeypatch.setattr(purification, "_all", lambda done: False)  # below: so it is on a GPU
    monkeypatch.setattr(purification, "STEPS", dict.fromkeys(purification.STEPS, 4))  # each does the same
    for op in PRODUCTS:
        order = ops()[op].order
        monkeypatch.setitem(order, "meta", ("torch", *order["cuda"]))
    with NoCopies():
        yield torch.device("meta")


@pytest.fixture(params=["torch", "triton", "cublas"])
def kernels(request, monkeypatch, gpu):
    """The reference, or all of a backend but its launches and its calls of cuBLAS; the number of these is counted."""
    launched = []
    if request.param == "torch":
        yield launched
        return
    pytest.importorskip("triton", reason="needs triton: counts what would be launched")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid)

    shared = import_module("r_tsvm_kernels.ops._triton_products")
    kernel = {op: import_module(f"r_tsvm_kernels.ops.{op}.triton_kernel") for op in PRODUCTS}
    monkeypatch.setattr(shared, "symmetric_kernel", Kernel())
    monkeypatch.setattr(kernel["gemm3"], "gemm3_kernel", Kernel())
    monkeypatch.setattr(kernel["split_planes"], "split_kernel", Kernel())
    monkeypatch.setattr(kernel["purify_step"], "steering_kernel", Kernel())
    monkeypatch.setattr(_cublas, "_add", lambda total, *args, **options: launched.append(total.shape))
    monkeypatch.setattr(backends, "state", lambda backend: backends.READY)
    with use_backend(**dict.fromkeys(PRODUCTS, request.param) | {"split_planes": "triton"}):
        yield launched
    assert len(launched) > 4


@pytest.mark.parametrize("rank", [N // TASKS, N - 10])
def test_purification(gpu, kernels, rank):
    gram = torch.empty(TASKS, N, N, device=gpu)
    spaces = purification.leading_eigenspaces(gram, [rank, rank - 1, 8])  # the larger one takes one level, not two
    assert [basis.shape for basis in spaces.bases] == [(N, rank), (N, rank - 1), (N, 8)]
    assert spaces.rank_defect.device.type == gpu.type and spaces.outer_steps.shape == (TASKS,)


def test_polar_express(gpu, kernels):
    polar = polar_express.polar_express(torch.empty(2, N, N // 2, device=gpu, dtype=torch.float64), 1.5, 1e-5)
    assert polar.matrix.shape == (2, N, N // 2) and polar.matrix.device.type == gpu.type


@pytest.mark.parametrize("compressed", [False, True])
def test_all_subspaces_of_a_batch_are_launched_before_the_first_wait(gpu, kernels, monkeypatch, compressed):
    """Their measurements are read once, in one table."""
    tables = []

    def read(self):
        tables.append(self.shape)
        return [[1.0] * self.shape[1]] * self.shape[0]

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    matrices = torch.empty(TASKS, 2 * N, N, device=gpu)
    levels = torch.empty(TASKS, dtype=torch.float64, device=gpu) if compressed else None
    parts = subspaces.products_subspaces(matrices, [N // TASKS] * TASKS, "fp16x3", levels)
    assert [part.Vh.shape for part in parts] == [(N // TASKS, N)] * TASKS
    assert len(tables) == 1 and tables[0][0] == TASKS


def test_on_a_gpu_nobody_asks_whether_all_is_done():
    with FakeTensorMode():  # a GPU that is not there
        assert purification._all(torch.ones(3, dtype=torch.int32, device="cuda")) is False
    assert purification._all(torch.ones(3, dtype=torch.int32))


def test_a_wait_is_seen(gpu, monkeypatch):
    monkeypatch.setattr(purification, "_all", lambda done: bool(done.all()))
    with pytest.raises(RuntimeError, match="meta tensors"):
        purification.leading_eigenspaces(torch.empty(TASKS, N, N, device=gpu), [8, 8, 8])


def test_a_copy_is_seen(gpu):
    with pytest.raises(AssertionError, match="copies"):
        torch.empty(3, device=gpu) + torch.ones(())
