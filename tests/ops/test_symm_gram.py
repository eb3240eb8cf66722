import pytest
import torch
from cases import check
from compare import relative_error, same_bits
from products import assert_as_accurate, assert_same_sums, dense, every_accuracy, every_draw, every_low
from variants import every_backend, large, on_devices

from r_tsvm_kernels.ops import split_planes, symm_gram


@every_backend(symm_gram, reference=False)
def test_cases(backend):
    check(symm_gram, backend)


@every_backend(symm_gram)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 70), (2, 33, 20), (2, 3, 5, 6)], ids=str)
def test_has_the_accuracy_of_float32(backend, shape, side):
    x = torch.randn(shape)
    exact = (x.double().mT @ x.double() if side == "right" else x.double() @ x.double().mT).cpu()
    got = symm_gram(split_planes(x), side, backend=backend)
    assert got.matrix.dtype == torch.float32 and torch.equal(got.matrix, got.matrix.mT)
    assert relative_error(got.matrix.cpu(), exact) < 4e-7
    assert relative_error(got.trace.cpu(), exact.diagonal(dim1=-2, dim2=-1).sum(-1)) < 4e-7
    assert relative_error(got.square_norm.cpu(), exact.square().sum((-2, -1))) < 1e-6
    planes = symm_gram(split_planes(x), side, out_dtype="planes", backend=backend).matrix
    assert relative_error(dense(planes), exact) < 6e-7


@every_backend(symm_gram, reference=False)
@every_low
@pytest.mark.parametrize("out_dtype", [torch.float32, "planes"], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("n", [1, 31, 32, 50, 97])
def test_is_as_accurate_as_the_reference(backend, n, side, out_dtype, low):
    planes = split_planes(torch.randn(2, n, 66) * torch.tensor([1.0, 1e-3])[:, None, None], low=low)
    given = planes if side == "left" else planes.mT
    got, reference = (symm_gram(given, side, out_dtype=out_dtype, backend=which) for which in (backend, "torch"))
    assert_as_accurate(got.matrix, reference.matrix, dense(planes) @ dense(planes).mT)
    assert torch.equal(dense(got.matrix), dense(got.matrix).mT)
    assert_same_sums(got)


@every_backend(symm_gram)
def test_without_the_low_plane_it_has_eleven_bits(backend):
    x = torch.randn(40, 30)
    exact = (x.double().mT @ x.double()).cpu()
    got = symm_gram(split_planes(x, low=False), backend=backend)
    assert 1e-5 < relative_error(got.matrix.cpu(), exact) < 1e-3


@every_backend(symm_gram)
def test_sums_do_not_change_from_run_to_run(backend):
    planes = split_planes(torch.randn(2, 90, 90))
    first, second = (symm_gram(planes, backend=backend) for _ in range(2))
    assert same_bits(first.trace, second.trace) and same_bits(first.square_norm, second.square_norm)


@every_backend(symm_gram)
def test_every_lower_tile_is_computed_once(backend):
    n = 32 * 7 - 3
    got = symm_gram(split_planes(torch.ones(n, 1)), "left", backend=backend)
    assert torch.equal(got.matrix, torch.ones(n, n)) and got.square_norm == n * n


@on_devices(symm_gram)
@every_draw
@every_accuracy
@pytest.mark.parametrize(("m", "n"), [(4096, 1024), (1000, 777), (14336, 512)])
def test_sizes_of_models(backend, draw, m, n, low, allowed):
    x = draw(2, m, n)
    got = symm_gram(split_planes(x, low=low, backend=backend), backend=backend)
    exact = x.double().mT @ x.double()
    assert relative_error(got.matrix, exact) < allowed
    assert torch.equal(got.matrix, got.matrix.mT)
    assert relative_error(got.trace, exact.diagonal(dim1=-2, dim2=-1).sum(-1)) < allowed


@large
@on_devices(symm_gram)
def test_more_elements_than_a_32_bit_index_counts(backend):
    x = torch.randn(2, 16, 33_000)
    got = symm_gram(split_planes(x, backend=backend), backend=backend).matrix
    last = x[1, :, -100:].double()
    assert relative_error(got[1, -100:, -100:], last.mT @ last) < 1.5e-6
    assert torch.equal(got[1, -100:, :100], got[1, :100, -100:].mT)
