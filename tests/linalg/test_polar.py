import pytest
import torch

from r_tsvm_kernels.errors import ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.linalg import leading_subspaces, polar, polar_factor, tall_matrix


def random_orthogonal(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


@pytest.mark.parametrize("shape", [(30, 30), (50, 12), (12, 50), (1, 5), (1, 1)], ids=str)
def test_nearest_matrix_with_orthonormal_columns(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    factor = polar(matrix)
    Q = factor.matrix if shape[0] >= shape[1] else factor.matrix.mT
    X = matrix if shape[0] >= shape[1] else matrix.mT
    assert factor.rank == min(shape)
    assert (Q.mT @ Q - torch.eye(min(shape))).abs().max() < 1e-11
    # X = Q H with H symmetric and positive semi-definite characterises the polar decomposition.
    H = Q.mT @ X
    assert (H - H.mT).abs().max() < 1e-11
    assert torch.linalg.eigvalsh(H).min() > 0
    assert (Q @ H - X).abs().max() < 1e-11


def test_a_batch_of_several_shapes():
    matrices = [torch.randn(9, 4), torch.randn(3, 8)]
    for matrix, factor in zip(matrices, polar(matrices), strict=True):
        assert torch.equal(factor.matrix, polar(matrix).matrix)


def test_a_matrix_gives_a_factor_and_a_batch_a_list():
    stack = torch.randn(3, 5, 4)
    factors = polar(stack)
    assert [factor.matrix.shape for factor in factors] == [(5, 4)] * 3
    assert torch.equal(factors[1].matrix, polar(stack[1]).matrix)
    assert repr(factors[1]) == f"PolarFactor(5x4 float64, rank 4, error {factors[1].certificate.error:.1g} ok)"
    for shape in [(4,), (2, 3, 4, 5)]:
        with pytest.raises(ShapeError, match="polar: expected a matrix"):
            polar(torch.zeros(shape))


@pytest.mark.parametrize(("decades", "route"), [(3, "gram-float64"), (5.5, "svd-float64")])
def test_ill_conditioned_basis_keeps_full_rank(decades, route):
    U, V = random_orthogonal(40), random_orthogonal(40)
    factor = polar((U * torch.logspace(0, -decades, 40, dtype=torch.float64)) @ V)
    assert factor.rank == 40
    assert factor.condition == pytest.approx(10**decades, rel=1e-5)
    assert (factor.matrix - U @ V).abs().max() < 1e-8
    assert factor.certificate.route == route
    assert bool(factor.certificate.escalations) == (route == "svd-float64")


def test_rank_deficient_gives_a_partial_isometry():
    Q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q
    factor = polar(torch.cat([Q, Q], dim=1))
    assert factor.rank == 5
    assert torch.allclose(factor.matrix, torch.cat([Q, Q], dim=1) / 2**0.5)
    values = torch.linalg.svdvals(factor.matrix)
    assert torch.allclose(values[:5], torch.ones(5, dtype=torch.float64))
    assert values[5:].max() < 1e-12


def test_singular_values_below_the_tolerance_are_left_out():
    U, V = random_orthogonal(12), random_orthogonal(12)
    factor = polar((U * torch.tensor([1.0] * 9 + [1e-7] * 3, dtype=torch.float64)) @ V)
    assert factor.rank == 9
    assert (factor.matrix - U[:, :9] @ V[:9]).abs().max() < 1e-8


def test_zero_rows_stay_zero():
    matrix = torch.randn(10, 4, dtype=torch.float64)
    matrix[3:7] = 0
    matrix[:, 3] = matrix[:, 0]
    factor = polar(matrix)
    assert factor.rank == 3
    assert factor.matrix[3:7].abs().max() < 1e-14


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_badly_scaled(scale):
    matrix = torch.randn(20, 7)
    assert torch.allclose(polar(matrix * scale).matrix, polar(matrix).matrix, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 0), (0, 6), (0, 0), (5, 3)], ids=str)
def test_empty_and_zero(shape):
    factor = polar(torch.zeros(shape, dtype=torch.float64))
    assert (factor.matrix.shape, factor.rank, factor.condition) == (shape, 0, 1.0)
    assert not factor.matrix.any()


def test_what_it_refuses():
    with pytest.raises(ShapeError, match="polar"):
        polar([torch.zeros(2, 3, 4)])
    with pytest.raises(DTypeError, match="float"):
        polar([torch.zeros(2, 3, dtype=torch.float16)])
    with pytest.raises(ConfigError, match="mode"):
        polar(torch.zeros(2, 3), mode="quick")


@pytest.mark.parametrize("shape", [(90, 90), (120, 70), (70, 120), (0, 0), (5, 0)], ids=str)
@pytest.mark.parametrize("kind", ["random", "falling", "singular", "zero"])
def test_polar_factor_and_subspaces_from_one_decomposition(monkeypatch, shape, kind):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    short = min(shape)
    if kind == "falling" and short:  # the Gram matrix loses the smallest singular values
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        matrix = U * torch.logspace(0, -5.5, short, dtype=torch.float64) @ Vh
    elif kind == "singular":
        matrix[:, : shape[1] // 2] = 0
    elif kind == "zero":
        matrix.zero_()
    decompositions = []
    every = tall_matrix.every_eigenvector
    monkeypatch.setattr(tall_matrix, "every_eigenvector", lambda gram: decompositions.append(len(gram)) or every(gram))
    rank = short // 3
    factor, lead = polar_factor.polar_and_subspaces(matrix, rank)
    assert decompositions == [short]
    alone, subspaces = polar(matrix), leading_subspaces(matrix, rank)
    assert factor.rank == alone.rank and factor.certificate.met
    torch.testing.assert_close(factor.matrix, alone.matrix, rtol=0, atol=1e-9)
    assert lead.rank == subspaces.rank and lead.certificate.met
    torch.testing.assert_close(lead.Vh.mT @ lead.Vh, subspaces.Vh.mT @ subspaces.Vh, rtol=0, atol=1e-9)
    torch.testing.assert_close(lead.U.mT @ matrix @ lead.Vh.mT, lead.core, rtol=0, atol=1e-12)
    torch.testing.assert_close(lead.cut.values, subspaces.cut.values, rtol=0, atol=1e-7)
