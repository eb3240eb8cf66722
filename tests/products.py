"""What the tests of the products on planes share."""

import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.ops import Planes

every_low = pytest.mark.parametrize("low", [True, False], ids=["x3", "x1"])


def dense(x):
    return (x.dense() if isinstance(x, Planes) else x).double().cpu()


def assert_as_accurate(got, reference, exact):
    """The kernel may be twice as far from `exact` as the reference, plus a rounding of float32."""
    assert type(got) is type(reference) and dense(got).shape == exact.shape
    assert relative_error(dense(got), exact) <= 2 * relative_error(dense(reference), exact) + 6e-8


def assert_same_sums(got):
    """The trace and the squared norm are those of the matrix that is stored."""
    kept = dense(got.matrix)
    trace, square_norm = got.trace.double().cpu(), got.square_norm.double().cpu()
    torch.testing.assert_close(trace, kept.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(square_norm, kept.square().sum((-2, -1)), rtol=1e-6, atol=0)


# Tensor cores add with rounding towards zero. With positive operands all those errors have one sign and would grow with
# K; the kernels promote their sums, so that the bias must stay at float32's level. The interpreter cannot show this.
every_draw = pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "positive"])
every_accuracy = pytest.mark.parametrize(("low", "allowed"), [(True, 1.5e-6), (False, 1e-3)], ids=["x3", "x1"])
