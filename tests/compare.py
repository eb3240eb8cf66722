"""The comparison rule of all tests."""

import torch
from torch import Tensor


def assert_as_accurate(got, eager, exact, *, factor=2.0, dim=None, what="output"):
    """`got` may be `factor` times as far from `exact` (float64) as eager torch in its dtype, plus one rounding step."""
    assert got.shape == eager.shape == exact.shape and got.dtype == eager.dtype, f"{what}: shape or dtype differs"
    if got.numel() == 0:
        return

    def largest(x: Tensor) -> Tensor:
        return x.abs().amax() if dim is None else x.abs().amax(dim)

    error, base = largest(got.double() - exact), largest(eager.double() - exact)
    allowed = factor * base + torch.finfo(got.dtype).eps * largest(exact)
    assert allowed.isfinite().all(), f"{what}: the eager baseline is not finite; choose inputs it can represent"
    assert (error <= allowed).all(), f"{what}: error {error.max():.3e}, allowed {allowed.max():.3e}"


def relative_error(got, exact) -> float:
    """Frobenius distance relative to the norm of `exact` (float64)."""
    got, exact = torch.as_tensor(got).double(), torch.as_tensor(exact).double()
    assert got.shape == exact.shape
    norm = float(torch.linalg.vector_norm(exact))
    distance = float(torch.linalg.vector_norm(got - exact))
    return distance / norm if norm else distance


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal to the bit: dtype, shape, the sign of zeros."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(x: Tensor) -> Tensor:
    flat = x.contiguous().flatten()
    if flat.numel() < 2:  # counts as contiguous whatever its strides are
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)
