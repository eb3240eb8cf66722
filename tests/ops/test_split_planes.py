import math

import pytest
import torch
from cases import check
from compare import relative_error, same_bits
from variants import every_backend, every_model_shape, on_devices

from r_tsvm_kernels.ops import split_planes

FLOAT32 = torch.finfo(torch.float32)


@every_backend(split_planes, reference=False)
def test_cases(backend):
    check(split_planes, backend)


@every_backend(split_planes)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 4, 9), (2, 3, 5, 6), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
def test_reproduces_float32(backend, shape, size):
    x = size * torch.rand(shape).sub(0.5).mul(2)
    planes = split_planes(x, backend=backend)
    assert planes.shape == x.shape and planes.scale.shape == x.shape[:-2]
    if x.numel() == 0:
        return
    largest = x.double().abs().amax((-2, -1), keepdim=True)
    error = (planes.dense().double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() * 2**-22, largest * 2**-35)).all()
    if size < 1e38:
        assert (planes.hi.abs() <= 1).all()
    assert (largest[..., 0, 0] > planes.scale.double() / 2).all()
    assert torch.equal(torch.frexp(planes.scale)[0], torch.full_like(planes.scale, 0.5))


@every_backend(split_planes)
@pytest.mark.parametrize("low", [True, False])
def test_the_planes_are_the_two_roundings(backend, low):
    x = torch.randn(3, 20, 31) * torch.logspace(-20, 0, 31)
    planes = split_planes(x, low=low, backend=backend)
    unit = x / planes.scale[:, None, None]
    assert same_bits(planes.hi, unit.half())
    if low:
        assert same_bits(planes.lo, ((unit - unit.half().float()) * 2048).half())
    else:
        assert planes.lo is None


@every_backend(split_planes)
def test_scales_at_the_ends_of_float32(backend):
    assert split_planes(torch.zeros(2, 2), backend=backend).scale == 1
    assert split_planes(torch.full((1, 1), 8.0), backend=backend).scale == 8
    tiny = split_planes(torch.full((1, 1), FLOAT32.smallest_normal * FLOAT32.eps), backend=backend)
    assert float(tiny.dense()) == FLOAT32.smallest_normal * FLOAT32.eps or tiny.scale == 2.0**-126
    largest = torch.full((1, 1), FLOAT32.max)
    assert relative_error(split_planes(largest, backend=backend).dense().cpu(), largest.cpu()) < 2**-21


@every_backend(split_planes)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(backend, bad):
    x = torch.ones(2, 3, 3)
    x[1, 0, 0] = bad
    dense = split_planes(x, backend=backend).dense()
    assert torch.equal(dense[0], x[0]) and not dense[1, 0, 0].isfinite()


@on_devices(split_planes)
@every_model_shape
def test_sizes_of_models(backend, shape):
    x = torch.randn(shape)
    got, expected = (split_planes(x, backend=which) for which in (backend, "torch"))
    assert same_bits(got.hi, expected.hi) and same_bits(got.lo, expected.lo) and same_bits(got.scale, expected.scale)
