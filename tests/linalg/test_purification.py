"""Leading eigenspaces by purification, in every number format; on the CPU fp16 planes are simulated by rounding."""

import pytest
import torch
from spectra import spectrum

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg.orthonormal import cholesky_qr, orthogonality
from r_tsvm_kernels.linalg.products.number_formats import arithmetic
from r_tsvm_kernels.linalg.products.purification import STEPS, compress, largest_eigenvalue, leading_eigenspaces, purify

N = 96


def grams(kind, count=2, n=N):
    matrices = torch.stack([spectrum(kind, n + 10, n, seed) for seed in range(count)]).double()
    gram = matrices.mT @ matrices
    return (gram + gram.mT) / 2


def distance(V, gram, k):
    """Largest sine between the space of V and the top-k eigenspace."""
    Q = torch.linalg.eigh(gram).eigenvectors[:, -k:]
    return float(torch.linalg.matrix_norm(V - Q @ (Q.mT @ V), 2))


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float64", 1e-6), ("float32", 3e-4), ("fp16x3", 3e-4), ("fp16", 0.3)]
)
@pytest.mark.parametrize("kind", ["flat", "power 0.3"])
@pytest.mark.parametrize("k", [1, 12, 32, 70])
def test_finds_the_eigenspace(kind, k, precision, allowed):
    gram = grams(kind)
    spaces = leading_eigenspaces(gram, [k, k], precision)
    for V, matrix in zip(spaces.bases, gram, strict=True):
        assert V.shape == (N, k) and V.dtype == torch.float64
        assert orthogonality(V) < 1e-13
        assert distance(V, matrix, k) < allowed
    assert (spaces.rank_defect < 0.02).all()
    assert (spaces.inner_steps > 0).all() == (k < 70)


def test_a_rank_for_each_matrix():
    gram = grams("power 0.7", 3)
    spaces = leading_eigenspaces(gram, [3, 40, 17], "float64")
    for V, matrix, k in zip(spaces.bases, gram, [3, 40, 17], strict=True):
        assert V.shape == (N, k) and distance(V, matrix, k) < 1e-6


def test_exact_low_rank_stops_early():
    gram = grams("low rank")
    for precision, allowed in [("float64", 1e-12), ("fp16x3", 1e-4)]:
        spaces = leading_eigenspaces(gram, [9, 9], precision)
        assert max(distance(V, matrix, 9) for V, matrix in zip(spaces.bases, gram, strict=True)) < allowed
        assert (spaces.outer_steps < 25).all()


@pytest.mark.parametrize("k", [16, 64])
@pytest.mark.parametrize("kind", ["power 0.003", "power 0.01"])
def test_the_first_of_nearly_equal_eigenvectors_are_found(kind, k):
    # Power iteration does not converge here. What exceeds a bound taken from it is lost, or squared to infinity.
    for seed in range(6):
        D = spectrum(kind, 192, 192, seed).double()
        gram = (D.mT @ D)[None]
        spaces = leading_eigenspaces(gram, [k])
        assert distance(spaces.bases[0], gram[0], k) < 2e-3
        assert max(int(spaces.outer_steps), int(spaces.inner_steps)) < STEPS["fp16x3"]


@pytest.mark.parametrize("precision", ["fp16x3", "float32"])
@pytest.mark.parametrize(("n", "k"), [(40, 20), (96, 20), (96, 32), (192, 16)])
def test_spectra_without_a_gap_reach_the_cap(n, k, precision):
    for seed in range(2):
        D = spectrum("power 0.0", n, n, seed).double()
        spaces = leading_eigenspaces((D.mT @ D)[None], [k], precision)
        assert max(int(spaces.outer_steps), int(spaces.inner_steps)) == STEPS[precision]


@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_compression_repairs_heavy_tails(factor):
    gram, k = grams("power 1.2"), 32
    level = factor * torch.linalg.eigvalsh(gram)[:, -k]
    plain = leading_eigenspaces(gram, [k, k], "fp16x3")
    better = leading_eigenspaces(compress(gram, level), [k, k], "fp16x3", largest=torch.ones(2))
    bad, good = (
        max(distance(V, matrix, k) for V, matrix in zip(spaces.bases, gram, strict=True)) for spaces in (plain, better)
    )
    assert bad > 2e-4 and good < 1e-4
    assert better.outer_steps.sum() < plain.outer_steps.sum()


def test_steps_that_are_done_change_nothing():
    numbers = arithmetic("float64")
    start = numbers.measured(torch.diag(torch.tensor([0.9, 0.8, 0.1, 0.0], dtype=torch.float64))[None])
    rank, tolerances = torch.tensor([2.0]), [(torch.tensor([0.5]), torch.tensor([1e-3]))]
    got = purify(start, rank, tolerances, 6, numbers, steps=90)
    assert torch.allclose(got.matrix, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)), atol=1e-12)
    assert 6 < got.steps < 20
    cut = purify(start, rank, tolerances, 6, numbers, steps=3)
    assert cut.steps == 3 and cut.impurity > 1e-3


@pytest.mark.parametrize(
    "kind", ["flat", "power 0.0", "power 0.003", "power 0.01", "power 0.3", "power 1.2", "low rank"]
)
@pytest.mark.parametrize("n", [5, 96, 600])
def test_the_bound_is_one(n, kind):
    gram = grams(kind, n=max(n, 10) if kind == "low rank" else n)
    exact = torch.linalg.eigvalsh(gram)[:, -1]
    assert (largest_eigenvalue(gram) >= exact).all() and (largest_eigenvalue(gram) < 1.3 * exact).all()
    assert largest_eigenvalue(torch.zeros(1, 5, 5)) == 1


def test_cholesky_qr_is_a_qr_decomposition():
    Y = torch.randn(2, 50, 20, dtype=torch.float64) @ torch.diag(
        10.0 ** -torch.linspace(0, 10, 20, dtype=torch.float64)
    )
    Q, R = cholesky_qr(Y)
    assert (orthogonality(Q) < 1e-14).all()
    assert torch.equal(R, R.triu()) and torch.allclose(Q @ R, Y, rtol=0, atol=1e-14)
    assert orthogonality(cholesky_qr(Y, passes=1)[0]).max() > 1e-3
    assert orthogonality(torch.empty(5, 0)) == 0


def test_unknown_precision():
    with pytest.raises(ConfigError, match="fp16x3"):
        leading_eigenspaces(torch.eye(4)[None], [2], "bfloat16")
