import math

import pytest
import torch

from r_tsvm_kernels.linalg.decompositions import largest_magnitude
from r_tsvm_kernels.linalg.tall_matrix import add_gram


@pytest.mark.parametrize("columns", [0, 1, 128, 200, 513, 700, 1600])
def test_gram_matrices_by_blocks(columns):
    X = torch.randn(37, columns, dtype=torch.float64)
    total = torch.eye(columns, dtype=torch.float64)
    add_gram(total, X)
    add_gram(total, X)
    assert total.equal(total.mT)
    torch.testing.assert_close(total, torch.eye(columns, dtype=torch.float64) + 2 * X.mT @ X, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_largest_magnitude(dtype):
    x = torch.randn(30, 50).to(dtype)
    assert largest_magnitude(x) == largest_magnitude(-x.mT) == float(x.abs().amax())
    assert largest_magnitude(x[:0]) == 0
    for bad in (math.inf, -math.inf):
        x[3, 4] = bad
        assert largest_magnitude(x) == math.inf
    x[5, 6] = math.nan
    assert math.isnan(largest_magnitude(x))
