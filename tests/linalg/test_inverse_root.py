"""Inverse roots of Gram matrices: each route against the SVD in float64, and when it gives way to the next."""

from dataclasses import replace

import pytest
import torch

from r_tsvm_kernels.bench import published
from r_tsvm_kernels.errors import ConvergenceError
from r_tsvm_kernels.linalg import eigen_merge
from r_tsvm_kernels.linalg.inverse_root import (
    FEW,
    SplitMatrix,
    root_of_factor,
    root_of_gram,
    root_of_gram_float32,
    root_of_pair,
)

ROUTES = [
    lambda X: by_float32(X),
    lambda X: root_of_gram(X.mT @ X),
    root_of_factor,
]


def by_float32(X):
    return root_of_gram_float32(X.mT @ X, lambda z: (X @ z).mT @ (X @ z))


def concatenated(n, ranks, seed=0):
    """Random orthonormal bases side by side, as in a merge."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64)).Q for rank in ranks],
        dim=1,
    )


def distance(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("route", range(3))
@pytest.mark.parametrize("ranks", [(100, 100, 100), (150, 150), (40, 30, 20)], ids=str)
def test_polar_factor(route, ranks):
    X = concatenated(300, ranks)
    root = ROUTES[route](X)
    error = distance(root.matrix.after(X), published.polar(X))
    assert error < (4e-6 if route == 0 else 1e-9)
    values = torch.linalg.svdvals(X)
    assert root.rank == sum(ranks)
    assert root.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-3)
    assert root.route == ("gram-float32", "gram-float64", "svd-float64")[route]
    # The defect bounds the error, and is at most a few times as large.
    defect = root.defect(X.mT @ X)
    assert error < 1.2 * defect + 1e-12 and defect < 20 * error + 1e-9


@pytest.mark.parametrize("decades", [1, 2, 3, 4, 5, 5.5])
def test_float32_eigenvectors_with_small_eigenvalues(decades):
    """Eigenvalues far below the resolution of float32: their eigenvectors are corrected in float64."""
    X = concatenated(256, [128, 64])
    P, s, Qh = torch.linalg.svd(X, full_matrices=False)
    s[-6:] = torch.logspace(-1, -decades, 6, dtype=torch.float64)
    X = (P * s) @ Qh
    root = by_float32(X)
    assert distance(root.matrix.after(X), P @ Qh) < 1e-5
    assert root.condition == pytest.approx(float(s[0]) * 10**decades, rel=1e-3)


def test_float32_eigenvectors_where_many_eigenvalues_are_small():
    """As in bases of trained task matrices, which share their main directions."""
    X = concatenated(256, [128, 64])
    P, s, Qh = torch.linalg.svd(X, full_matrices=False)
    s[80:] = torch.logspace(-1.1, -3, 112, dtype=torch.float64)
    X = (P * s) @ Qh
    root = by_float32(X)
    assert root.matrix.left.shape[1] >= 112 and root.route == "gram-float32"
    assert distance(root.matrix.after(X), P @ Qh) < 1e-5


def test_float32_gives_way():
    Q = concatenated(60, [20])
    with pytest.raises(ConvergenceError, match="eigenvalue of the basis is"):  # rank deficient
        by_float32(torch.cat([Q, Q[:, :3]], dim=1))
    with pytest.raises(ConvergenceError, match="are small"):
        by_float32(torch.diag(torch.logspace(0, -6, 60, dtype=torch.float64)))
    with pytest.raises(ConvergenceError, match="are small"):
        by_float32(torch.zeros(5, 5, dtype=torch.float64))
    assert 0 < FEW < 1


@pytest.mark.parametrize("pair", [0, 150])
@pytest.mark.parametrize("allowed", [1e-4, 1e-9])
def test_a_root_in_float32_that_is_not_accurate_enough_is_not_used(monkeypatch, pair, allowed):
    monkeypatch.setattr(eigen_merge, "LARGE", 300)
    X, probes = concatenated(300, [150, 150]), torch.randn(300, 2, dtype=torch.float64)
    tolerance = allowed / eigen_merge.WHITENING_SHARE
    side, reasons = eigen_merge._find_root(
        X.mT @ X, probes, lambda z: (X @ z).mT @ (X @ z), lambda: X, tolerance, True, pair
    )
    assert side.defect <= allowed
    assert len(reasons) == (allowed < 1e-8) and all("estimated error" in reason for reason in reasons)


@pytest.mark.parametrize("ranks", [(150, 150), (150, 149), (60, 150), (150, 60), (1, 3), (7, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("single", [False, True])
def test_two_bases_in_closed_form(ranks, single):
    X = concatenated(300, ranks)
    root = root_of_pair(X.mT @ X, ranks[0], single)
    assert root.matrix.bulk.dtype == (torch.float32 if single else torch.float64)
    error = distance(root.matrix.after(X), published.polar(X))
    assert error < (1e-6 if single else 1e-11)
    values = torch.linalg.svdvals(X)
    assert root.rank == sum(ranks) and root.largest == pytest.approx(float(values[0]))
    assert root.condition == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
    defect = root.defect(X.mT @ X)
    assert error < 1.2 * defect + 1e-12 and defect < 20 * error + 1e-9
    exact = root_of_gram(X.mT @ X)
    assert torch.allclose(root.sensitivity, exact.sensitivity, rtol=1e-5)


@pytest.mark.parametrize("angle", [1e-1, 1e-2, 1e-3, 1e-4, 1e-6])
def test_nearly_parallel_bases_in_closed_form(angle):
    """A direction of one basis is nearly one of the other; others are the same or orthogonal to it."""
    Q = concatenated(40, [40])
    near = Q[:, :1] * (1 - angle**2) ** 0.5 + Q[:, 20:21] * angle
    X = torch.cat([Q[:, :10], near, Q[:, 21:25]], dim=1)
    if angle < 1e-4:
        with pytest.raises(ConvergenceError, match="eigenvalue of the basis"):
            root_of_pair(X.mT @ X, 10, False)
        return
    for single in (False, True):
        root = root_of_pair(X.mT @ X, 10, single)
        assert distance(root.matrix.after(X), published.polar(X)) < 1e-13 / angle**2 + 1e-6 * single


def test_unrelated_bases_in_closed_form():
    Q = concatenated(40, [40])[:, :20]
    root = root_of_pair(torch.eye(20, dtype=torch.float64), 12, False)
    assert distance(root.matrix.after(Q), Q) < 1e-15


def test_a_wrong_root_has_a_defect():
    X = concatenated(50, [25, 25])
    gram = X.mT @ X
    root = root_of_gram(gram)
    wrong = replace(root, matrix=SplitMatrix.whole(root.matrix.bulk * 1.01))
    assert root.defect(gram) < 1e-9
    assert wrong.defect(gram) == pytest.approx(0.0201, rel=1e-3)


def test_the_defect_of_an_ill_conditioned_basis_needs_its_factor():
    X = concatenated(60, [60])
    X = (X * torch.logspace(0, -5.5, 60, dtype=torch.float64)) @ concatenated(60, [60], seed=1)
    R = torch.linalg.qr(X, mode="r").R
    root = root_of_factor(R)
    assert distance(root.matrix.after(X), published.polar(X)) < 1e-9
    assert root.defect(R.mT, R) < 1e-8 < root.defect(X.mT @ X)


def test_split_matrix():
    bulk, left, right = (
        torch.randn(6, 5),
        torch.randn(6, 2, dtype=torch.float64),
        torch.randn(2, 5, dtype=torch.float64),
    )
    x, square = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6)
    split = SplitMatrix(bulk, left, right)
    dense = bulk.double() + left @ right
    assert split.after(x).dtype == torch.float32
    assert torch.allclose(split.after(x).double(), x @ dense, atol=1e-5)
    mapped = split.map_rows(lambda part: square.to(part.dtype) @ part)
    assert torch.allclose(mapped.after(x).double(), x @ square.double() @ dense, atol=1e-4)


@pytest.mark.parametrize("n", [250, 301, 360])
@pytest.mark.parametrize("ranks", [(125, 125), (80, 80, 80)], ids=str)
def test_row_norms_are_those_of_the_whole_matrix(ranks, n):
    X = concatenated(n, ranks)
    gram = X.mT @ X
    roots = [by_float32(X), root_of_gram(gram)]
    if len(ranks) == 2:
        roots += [root_of_pair(gram, ranks[0], single) for single in (True, False)]
    exact = torch.linalg.vector_norm(torch.linalg.pinv(X) @ published.polar(X), dim=1)
    for root in roots:
        split = root.matrix
        whole = torch.linalg.vector_norm(split.bulk.double() + split.left @ split.right, dim=1)
        torch.testing.assert_close(split.row_norms(), whole, rtol=1e-5, atol=0)
        torch.testing.assert_close(root.sensitivity, 2 * exact, rtol=1e-4, atol=0)
    assert n > 350 or any(root.matrix.left.shape[1] for root in roots)  # there are small eigenvalues
