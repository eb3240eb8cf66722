"""Planes and the products on them: the references, which define the value to float32 accuracy."""

import math

import pytest
import torch
from compare import relative_error, same_bits

from r_tsvm_kernels.errors import ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.ops import Planes, gemm3, split_planes, symm_gram, symm_square

FLOAT32 = torch.finfo(torch.float32)


def symmetric_matrix(*shape, scale=1.0):
    x = torch.randn(*shape, shape[-1])
    return scale * (x + x.mT) / (2 * math.sqrt(shape[-1]))


# --- split_planes


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 4, 9), (2, 3, 5, 6), (0, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 3e38])
def test_planes_reproduce_float32(shape, size):
    x = size * torch.rand(shape).sub(0.5).mul(2)
    planes = split_planes(x)
    assert planes.shape == x.shape and planes.scale.shape == x.shape[:-2]
    if x.numel() == 0:
        return
    largest = x.double().abs().amax((-2, -1), keepdim=True)
    assert (
        (planes.dense().double() - x.double()).abs() <= torch.maximum(x.double().abs() * 2**-22, largest * 2**-35)
    ).all()
    if size < 1e38:
        assert (planes.hi.abs() <= 1).all()
    assert (largest[..., 0, 0] > planes.scale.double() / 2).all()
    assert torch.equal(torch.frexp(planes.scale)[0], torch.full_like(planes.scale, 0.5))


def test_the_planes_are_the_two_roundings():
    x = torch.tensor([[1.0, 1 / 3], [-0.7, 2**-20]])
    planes = split_planes(x)
    assert planes.scale == 1
    assert torch.equal(planes.hi, x.half())
    assert torch.equal(planes.lo, ((x - x.half().float()) * 2048).half())
    assert split_planes(x, low=False).lo is None
    assert same_bits(split_planes(x, low=False).dense(), x.half().float())


def test_scales_at_the_ends_of_float32():
    assert split_planes(torch.zeros(2, 2)).scale == 1
    assert split_planes(torch.full((1, 1), 8.0)).scale == 8
    tiny = torch.full((1, 1), FLOAT32.smallest_normal * FLOAT32.eps)
    assert torch.equal(split_planes(tiny).dense(), tiny) or split_planes(tiny).scale == 2.0**-126
    largest = torch.full((1, 1), FLOAT32.max)
    assert relative_error(split_planes(largest).dense(), largest) < 2**-21


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    x = torch.ones(2, 3, 3)
    x[1, 0, 0] = bad
    dense = split_planes(x).dense()
    assert torch.equal(dense[0], x[0]) and not dense[1, 0, 0].isfinite()


# --- products


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 70), (2, 33, 20), (2, 3, 5, 6)], ids=str)
def test_gram_has_float32_accuracy(shape, side):
    x = torch.randn(shape)
    exact = x.double().mT @ x.double() if side == "right" else x.double() @ x.double().mT
    got = symm_gram(split_planes(x), side)
    assert got.matrix.dtype == torch.float32 and torch.equal(got.matrix, got.matrix.mT)
    assert relative_error(got.matrix, exact) < 4e-7
    assert relative_error(got.trace, exact.diagonal(dim1=-2, dim2=-1).sum(-1)) < 4e-7
    assert relative_error(got.square_norm, exact.square().sum((-2, -1))) < 1e-6
    assert relative_error(symm_gram(split_planes(x), side, out="planes").matrix.dense(), exact) < 6e-7


def test_without_the_low_plane_it_has_eleven_bits():
    x = torch.randn(40, 30)
    exact = x.double().mT @ x.double()
    assert 1e-5 < relative_error(symm_gram(split_planes(x, low=False)).matrix, exact) < 1e-3


def test_square_is_the_polynomial():
    x = symmetric_matrix(3, 50)
    a, b = torch.tensor([0.0, 2.0, -3.0]), torch.tensor([1.0, -1.0, 0.5])
    planes = split_planes(x)
    got = symm_square(planes, a, b)
    exact = a.double()[:, None, None] * x.double() + b.double()[:, None, None] * (x.double() @ x.double())
    assert relative_error(got.matrix.dense(), exact) < 4e-7
    assert torch.equal(got.matrix.scale, torch.ones(3))
    assert torch.equal(got.matrix.hi, got.matrix.hi.mT) and torch.equal(got.matrix.lo, got.matrix.lo.mT)
    assert relative_error(got.trace, exact.diagonal(dim1=-2, dim2=-1).sum(-1)) < 4e-6
    assert relative_error(got.square_norm, exact.square().sum((-2, -1))) < 1e-6


def test_what_is_done_is_copied():
    planes = split_planes(symmetric_matrix(3, 20, scale=8.0))
    done = torch.tensor([0, 1, 2], dtype=torch.int32)
    got, plain = symm_square(planes, 2.0, -1.0, done=done), symm_square(planes, 2.0, -1.0)
    assert torch.equal(got.matrix.dense()[1:], planes.dense()[1:])
    assert torch.equal(got.matrix.dense()[0], plain.matrix.dense()[0])
    assert relative_error(got.trace[1:], planes.dense()[1:].diagonal(dim1=-2, dim2=-1).sum(-1)) < 1e-6


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16, "planes"], ids=str)
@pytest.mark.parametrize("added", [None, torch.float32, torch.bfloat16, torch.float16, "planes"], ids=str)
def test_gemm(out, added):
    A, B = torch.randn(2, 30, 40), torch.randn(2, 25, 40) * 1e-3
    C = None if added is None else torch.randn(2, 30, 25)
    alpha, beta = torch.tensor([0.5, 2.0]), -1.0
    if added == "planes":
        C, plain = split_planes(C), C
    elif added is not None:
        C = plain = C.to(added)
    got = gemm3(split_planes(A), split_planes(B).mT, alpha, beta, C, out=out)
    exact = alpha.double()[:, None, None] * (A.double() @ B.double().mT) + (0 if C is None else beta * plain.double())
    dense = got.dense() if isinstance(got, Planes) else got
    assert isinstance(got, Planes) or got.dtype == out
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(out, 4e-7)
    assert relative_error(dense, exact) < tolerance


def test_a_base_that_gets_nothing_added_stays_the_same():
    base = torch.randn(4, 4).bfloat16()
    zero = split_planes(torch.zeros(4, 4))
    assert same_bits(gemm3(zero, zero, 1.0, 1.0, base, out=torch.bfloat16), base)


def test_what_products_refuse():
    x = split_planes(torch.randn(4, 6))
    square = split_planes(torch.randn(4, 4))
    with pytest.raises(ShapeError, match="split_planes"):
        split_planes(torch.randn(4))
    with pytest.raises(DTypeError, match="float32"):
        split_planes(torch.randn(4, 4).double())
    with pytest.raises(ConfigError, match="side"):
        symm_gram(x, "middle")
    with pytest.raises(ShapeError, match="square"):
        symm_square(x, 1.0, 1.0)
    with pytest.raises(ShapeError, match="factor"):
        symm_square(square, torch.ones(3), 1.0)
    with pytest.raises(DTypeError, match="int32"):
        symm_square(square, 1.0, 1.0, done=torch.zeros(()))
    with pytest.raises(ShapeError, match="out"):
        symm_square(square, 1.0, 1.0, out=symm_gram(x))
    with pytest.raises(ShapeError, match="multiply"):
        gemm3(x, x)
    with pytest.raises(ShapeError, match="multiply"):
        gemm3(x, x.mT, C=torch.zeros(6, 6))
    with pytest.raises(DTypeError, match="low part"):
        gemm3(x, split_planes(torch.randn(6, 4), low=False))
    with pytest.raises(DTypeError, match="out"):
        gemm3(x, x.mT, out=torch.float64)
    with pytest.raises(DTypeError, match="float16"):
        symm_gram(Planes(torch.zeros(2, 2), None, torch.ones(())))
