from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from cases import check
from compare import relative_error, same_bits
from products import assert_as_accurate, dense, every_draw, every_low
from variants import every_backend, large, on_devices, simulated

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError
from r_tsvm_kernels.ops import Planes, gemm3, split_planes

FORMATS = [torch.float32, torch.bfloat16, torch.float16, "planes"]


@every_backend(gemm3, reference=False)
def test_cases(backend):
    check(gemm3, backend)


@every_backend(gemm3)
@pytest.mark.parametrize("out_dtype", FORMATS, ids=str)
@pytest.mark.parametrize("added", [None, *FORMATS], ids=str)
def test_equals_the_formula(backend, out_dtype, added):
    A, B = torch.randn(2, 30, 40), torch.randn(2, 25, 40) * 1e-3
    C = None if added is None else torch.randn(2, 30, 25)
    alpha, beta = torch.tensor([0.5, 2.0]), -1.0
    if added == "planes":
        C, plain = split_planes(C), C
    elif added is not None:
        C = plain = C.to(added)
    got = gemm3(split_planes(A), split_planes(B).mT, alpha, beta, C, out_dtype=out_dtype, backend=backend)
    exact = alpha.double()[:, None, None] * (A.double() @ B.double().mT) + (0 if C is None else beta * plain.double())
    assert isinstance(got, Planes) or got.dtype == out_dtype
    # The interpreter rounds to bfloat16 towards zero.
    tolerance = {torch.bfloat16: 2**-7 if simulated(backend) else 2**-8, torch.float16: 2**-11}.get(out_dtype, 4e-7)
    assert relative_error(dense(got), exact.cpu()) < tolerance


@every_backend(gemm3, reference=False)
@every_low
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, "planes"], ids=str)
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16, "planes"], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (50, 33, 97), (70, 80, 15)])
def test_is_as_accurate_as_the_reference(backend, m, k, n, added, out_dtype, low):
    A, B = split_planes(torch.randn(2, m, k), low=low), split_planes(torch.randn(2, n, k), low=low).mT
    C = torch.randn(2, n, m).mT
    C = None if added is None else split_planes(C, low=low) if added == "planes" else C.to(added)
    alpha, beta = torch.tensor([0.5, -2.0]), 3.0
    got, reference = (gemm3(A, B, alpha, beta, C, out_dtype=out_dtype, backend=which) for which in (backend, "torch"))
    exact = alpha.double().cpu()[:, None, None] * (dense(A) @ dense(B)) + (0 if C is None else beta * dense(C))
    assert_as_accurate(got, reference, exact)


@every_backend(gemm3)
def test_a_base_that_gets_nothing_added_stays_the_same(backend):
    base = torch.randn(4, 4).bfloat16()
    zero = split_planes(torch.zeros(4, 4))
    assert same_bits(gemm3(zero, zero, 1.0, 1.0, base, out_dtype=torch.bfloat16, backend=backend), base)


@every_backend(gemm3)
def test_a_bfloat16_weight_gets_its_update(backend):
    A, B, base = split_planes(torch.randn(40, 20)), split_planes(torch.randn(20, 30)), torch.randn(40, 30).bfloat16()
    got = gemm3(A, B, 0.1, 1.0, base, out_dtype=torch.bfloat16, backend=backend)
    exact = base.double().cpu() + 0.1 * dense(A) @ dense(B)
    # One unit in the last place: the interpreter cuts off where the hardware rounds.
    assert ((got.double().cpu() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-6).all()


@pytest.mark.skipif(backends.triton_state() != backends.READY, reason=f"tiles of Triton: {backends.triton_state()}")
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


@on_devices(gemm3)
@every_draw
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, "planes"], ids=str)
def test_sizes_of_models(backend, draw, out_dtype):
    A, B, C = draw(2, 1000, 4096), draw(2, 777, 4096) / 4096, draw(2, 1000, 777).bfloat16()
    left, right = (split_planes(x, backend=backend) for x in (A, B))
    got = gemm3(left, right.mT, 0.5, 1.0, C, out_dtype=out_dtype, backend=backend)
    exact = 0.5 * A.double() @ B.double().mT + C.double()
    assert relative_error(dense(got), exact.cpu()) < (2.0**-8 if out_dtype == torch.bfloat16 else 1.5e-6)


@large
@on_devices(gemm3)
def test_more_elements_than_a_32_bit_index_counts(backend):
    A, B = torch.randn(40_000, 16), torch.randn(16, 60_000)
    got = gemm3(*(split_planes(y, backend=backend) for y in (A, B)), out_dtype=torch.float16, backend=backend)
    exact = A[-100:].double() @ B[:, -100:].double()
    assert relative_error(got[-100:, -100:], exact) < 2.0**-11
