"""The Triton products in the interpreter: it adds like float32 hardware, where tensor cores round towards zero."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from compare import relative_error, same_bits
from interpreted import interpreted

from r_tsvm_kernels.errors import BackendUnavailableError
from r_tsvm_kernels.ops import Planes, gemm3, split_planes, symm_gram, symm_square

pytestmark = interpreted

SIZES = [1, 31, 32, 50, 97]
every_low = pytest.mark.parametrize("low", [True, False], ids=["x3", "x1"])


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks even for the small K that the interpreter can handle."""
    monkeypatch.setattr(import_module("r_tsvm_kernels.ops._triton_products"), "CHUNK", 32)


def dense(x):
    return (x.dense() if isinstance(x, Planes) else x).double()


def assert_as_accurate(got, reference, exact):
    """The kernel may be twice as far from `exact` as the reference, plus a rounding of the output."""
    assert type(got) is type(reference) and dense(got).shape == exact.shape
    allowed = 2 * relative_error(dense(reference), exact) + 6e-8
    assert relative_error(dense(got), exact) <= allowed


def assert_same_sums(got):
    kept = dense(got.matrix)
    torch.testing.assert_close(got.trace.double(), kept.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.square_norm.double(), kept.square().sum((-2, -1)), rtol=1e-6, atol=0)


@every_low
@pytest.mark.parametrize("shape", [(1, 1), (3, 40, 70), (2, 2, 7, 5), (0, 3), (3000, 2)], ids=str)
def test_planes_are_the_same_bits(shape, low):
    x = torch.randn(shape) * torch.logspace(-30, 30, shape[-1])
    got, reference = split_planes(x, low=low, backend="triton"), split_planes(x, low=low, backend="torch")
    assert same_bits(got.hi, reference.hi) and same_bits(got.scale, reference.scale)
    assert same_bits(got.lo, reference.lo) if low else got.lo is None


@every_low
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("out", ["float32", "planes"])
@pytest.mark.parametrize("n", SIZES)
def test_gram(n, out, side, low):
    planes = split_planes(torch.randn(2, n, 66) * torch.tensor([1.0, 1e-3])[:, None, None], low=low)
    planes = planes if side == "left" else planes.mT
    got = symm_gram(planes, side, out=out, backend="triton")
    reference = symm_gram(planes, side, out=out, backend="torch")
    x = dense(planes)
    exact = x @ x.mT if side == "left" else x.mT @ x
    assert_as_accurate(got.matrix, reference.matrix, exact)
    assert torch.equal(dense(got.matrix), dense(got.matrix).mT)
    assert_same_sums(got)


@every_low
@pytest.mark.parametrize("n", SIZES)
def test_square(n, low):
    x = torch.randn(3, n, n)
    planes = split_planes((x + x.mT) / n, low=low)
    a, b = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 0.5])
    got = symm_square(planes, a, b, backend="triton")
    y = dense(planes)
    exact = a.double()[:, None, None] * y + b.double()[:, None, None] * (y @ y)
    assert_as_accurate(got.matrix, symm_square(planes, a, b, backend="torch").matrix, exact)
    assert torch.equal(got.matrix.hi, got.matrix.hi.mT)
    assert_same_sums(got)


def test_a_step_that_is_done_copies_once_and_then_does_nothing():
    x = torch.randn(3, 40, 40)
    planes = split_planes((x + x.mT) / 20)
    copy = symm_square(planes, 1.0, 0.0, backend="triton")
    scratch = symm_square(planes, 0.0, 0.0, backend="triton")
    scratch.trace.fill_(7.0)
    done = torch.tensor([0, 1, 2], dtype=torch.int32)
    got = symm_square(planes, 2.0, -1.0, done=done, out=scratch, backend="triton")
    assert got.matrix.hi.data_ptr() == scratch.matrix.hi.data_ptr()
    assert torch.equal(dense(got.matrix)[0], dense(symm_square(planes, 2.0, -1.0, backend="triton").matrix)[0])
    assert torch.equal(dense(got.matrix)[1], dense(copy.matrix)[1]) and got.trace[1] == copy.trace[1]
    assert not got.matrix.hi[2].any() and got.trace[2] == 7  # what `out` held before
    alone = symm_square(planes, 2.0, -1.0, done=done, backend="triton")  # nothing to rely on: copied
    assert torch.equal(dense(alone.matrix)[1:], dense(copy.matrix)[1:])


def test_sums_do_not_change_from_run_to_run():
    planes = split_planes(torch.randn(2, 90, 90))
    first, second = (symm_gram(planes, backend="triton") for _ in range(2))
    assert same_bits(first.trace, second.trace) and same_bits(first.square_norm, second.square_norm)


@every_low
@pytest.mark.parametrize("out", [torch.float32, torch.float16, "planes"], ids=str)
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16, "planes"], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (50, 33, 97), (70, 80, 15)])
def test_gemm(m, k, n, added, out, low):
    A, B = split_planes(torch.randn(2, m, k), low=low), split_planes(torch.randn(2, n, k), low=low).mT
    C = None if added is None else torch.randn(2, n, m).mT
    C = split_planes(C, low=low) if added == "planes" else C if added is None else C.to(added)
    alpha, beta = torch.tensor([0.5, -2.0]), 3.0
    got, reference = (gemm3(A, B, alpha, beta, C, out=out, backend=backend) for backend in ("triton", "torch"))
    exact = alpha.double()[:, None, None] * (dense(A) @ dense(B)) + (0 if C is None else beta * dense(C))
    assert_as_accurate(got, reference, exact)


def test_a_bfloat16_weight_gets_its_update():
    A, B, base = split_planes(torch.randn(40, 20)), split_planes(torch.randn(20, 30)), torch.randn(40, 30).bfloat16()
    got = gemm3(A, B, 0.1, 1.0, base, out=torch.bfloat16, backend="triton")
    exact = base.double() + 0.1 * dense(A) @ dense(B)
    # One unit in the last place: the interpreter cuts off where the hardware rounds.
    assert ((got.double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all()


def test_many_rows_share_columns():
    gemm = import_module("r_tsvm_kernels.ops.gemm3.triton_kernel")
    x = torch.randn((gemm.GROUP * 2 + 1) * 32, 20)
    A, B = split_planes(x), split_planes(torch.randn(20, 40))
    assert_as_accurate(gemm3(A, B, backend="triton"), gemm3(A, B, backend="torch"), dense(A) @ dense(B))


def test_every_lower_tile_comes_once():
    products = import_module("r_tsvm_kernels.ops._triton_products")
    n = products.INTERPRETED.BM * 7 - 3
    ones = split_planes(torch.ones(n, 1))
    assert torch.equal(symm_gram(ones, "left", backend="triton").matrix, torch.ones(n, n))
    assert symm_gram(ones, "left", backend="triton").square_norm == n * n


@pytest.mark.parametrize(
    ("capability", "key"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 3), 100), ((12, 0), 120)]
)
def test_tile_by_capability(capability, key, monkeypatch):
    products = import_module("r_tsvm_kernels.ops._triton_products")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu = SimpleNamespace(is_cuda=True, device=None)
    assert products.tile_of(on_gpu) is products.TILES[key]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BackendUnavailableError, match="capability"):
        products.tile_of(on_gpu)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad):
    x = torch.eye(20)
    x[3, 3] = bad
    assert not symm_square(split_planes(x), 2.0, -1.0, backend="triton").square_norm.isfinite()


def test_a_whole_merge_runs_on_the_kernels():
    from r_tsvm_kernels import dispatch
    from r_tsvm_kernels.linalg import tsv_merge
    from r_tsvm_kernels.linalg.products.merge import products_tsv_merge

    matrices = torch.randn(2, 44, 36)
    matrices[1, :, 0] *= 100  # the two tasks take different numbers of steps, and one is compressed
    with dispatch.use_backend(split_planes="triton", symm_gram="triton", symm_square="triton", gemm3="triton"):
        got = products_tsv_merge(matrices, [9, 4])
    assert relative_error(got.matrix, tsv_merge(matrices.double(), [9, 4]).matrix) < 3e-5
    assert len({part.outer_steps for part in got.parts}) == 2
