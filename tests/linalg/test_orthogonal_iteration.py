import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.linalg import subspace_iteration


def matrix_of(values, shape, noise=0.0, dtype=torch.float32):
    U, V = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64)).Q for size in shape)
    return ((U * torch.tensor(values, dtype=torch.float64)) @ V.mT + noise * torch.randn(shape).double()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (160, 900)])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_the_truncated_matrix_is_that_of_a_full_svd(shape, rank, dtype):
    # Close values above the gap, also at the cut; float64 separates them.
    matrix = matrix_of([1.3, 1.2999, 1.2, 1.1, 1.099, 1.0], shape, noise=0.002, dtype=dtype)
    U, values, Vh = subspace_iteration(matrix, rank, 6)
    expected = torch.linalg.svd(matrix.double(), full_matrices=False)
    cut = expected.U[:, :rank] * expected.S[:rank] @ expected.Vh[:rank]
    assert relative_error(U * values @ Vh, cut) < 1e-5
    torch.testing.assert_close(values, expected.S[:rank], rtol=1e-9, atol=0)
    for basis in (U, Vh.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_do_not_matter(scale):
    matrix = matrix_of([3.0, 2.0, 1.0], (150, 120), noise=0.001)
    U, values, Vh = subspace_iteration(matrix, 2, 3)
    scaled = subspace_iteration(matrix * scale, 2, 3)
    torch.testing.assert_close(scaled[1] / scale, values, rtol=1e-6, atol=0)
    assert relative_error(scaled[0] * scaled[1] / scale @ scaled[2], U * values @ Vh) < 1e-5


def test_nothing_comes_where_there_is_no_gap_or_too_little_to_gain():
    flat = torch.randn(200, 300)
    assert subspace_iteration(flat, 4, 6) is None
    assert subspace_iteration(torch.zeros(200, 300), 4, 6) is None
    assert subspace_iteration(matrix_of([1.0, 0.5], (200, 300)), 4, 6) is None  # fewer directions than were asked for
    assert subspace_iteration(matrix_of([3.0, 2.0, 1.0], (80, 90)), 2, 3) is None
    assert subspace_iteration(matrix_of([3.0, 2.0, 1.0], (200, 200)), 4, 3) is None


def test_the_same_matrix_gives_the_same_bits():
    matrix = matrix_of([3.0, 2.0, 1.0], (150, 120), noise=0.001)
    first, second = (subspace_iteration(matrix, 3, 3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_parameter_leaves_no_graph():
    found = subspace_iteration(torch.nn.Parameter(matrix_of([3.0, 2.0], (200, 300), noise=0.001)), 1, 2)
    assert not any(part.requires_grad for part in found)
