"""Leading eigenvectors in two stages: against LAPACK in float64, by residual, orthogonality and eigenvalues."""

import pytest
import torch
from variants import torch_threads

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.linalg import divide_and_conquer, leading_subspaces, two_stage
from r_tsvm_kernels.linalg.two_stage import leading_eigenvectors

pytestmark = pytest.mark.skipif(
    not two_stage.two_stage_runs(torch.device("cpu")), reason="the native module is not built: LAPACK is used"
)


def largest(x):
    return float(x.abs().amax()) if x.numel() else 0.0


def with_spectrum(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)).Q
    matrix = Q * values @ Q.mT
    return (matrix + matrix.mT) / 2


def check(matrix, k):
    """Compare with LAPACK; errors relative to the norm, a few roundings for each of n steps."""
    n, eps = len(matrix), 2.0**-52
    exact = torch.linalg.eigh(matrix)[0]  # closer to the truth than eigvalsh
    asked = []
    values, V = leading_eigenvectors(matrix.clone(), lambda found: asked.append(found) or k)
    size = largest(exact)
    allowed = 4 * eps * max(n, 16) ** 0.5
    assert values.shape == (n,) and V.shape == (n, k)
    assert torch.equal(asked[0], values)
    assert bool((values.diff() >= 0).all())
    assert largest(values - exact) <= 4 * allowed * size
    assert largest(V.mT @ V - torch.eye(k, dtype=torch.float64)) <= allowed
    residual = matrix / (size or 1.0) @ V - V * (values[n - k :] / (size or 1.0))
    assert largest(torch.linalg.vector_norm(residual, dim=0)) <= 4 * allowed


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 47, 48, 49, 63, 64, 65, 66, 67, 97, 127, 128, 129, 130, 200, 321, 513])
def test_every_size(n):
    generator = torch.Generator().manual_seed(n)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    for k in sorted({1, max(1, n // 3), n - 1, n} - {0}):
        check(matrix + matrix.mT, k)


@pytest.mark.parametrize("k", [0, 1, 7, 80, 149, 150])
def test_every_number_of_vectors(k):
    check(with_spectrum(torch.linspace(-1, 2, 150)), k)


@pytest.mark.parametrize("n", [1, 2, 40, 100, 101, 180])
@pytest.mark.parametrize("kind", ["random", "zero"])
def test_further_vectors_of_a_reduced_matrix(n, kind):
    matrix = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * (kind == "random")
    matrix = matrix + matrix.mT
    reduced = two_stage.Reduced(matrix.clone())
    most = reduced.vectors(n // 3)
    V = torch.cat([reduced.vectors(n, before=n // 3), most], dim=1)
    assert V.shape == (n, n)
    assert largest(V.mT @ V - torch.eye(n, dtype=torch.float64)) <= 1e-13
    assert largest(matrix @ V - V * reduced.values) <= 1e-13 * max(largest(reduced.values), 1)


SPECTRA = {
    "falling": torch.arange(1, 261).double() ** -2,
    "root": torch.arange(1, 261).double() ** -0.5,
    "exponential": torch.logspace(0, -12, 260),
    "far below rounding": torch.logspace(0, -40, 260),
    "clusters": torch.arange(40).repeat_interleave(7)[:260].double() + 1,
    "near clusters": torch.arange(40).repeat_interleave(7)[:260] + 1 + 1e-12 * torch.arange(260).double(),
    "one large": torch.cat([torch.ones(1), torch.full((259,), 1e-9)]),
    "two values": torch.cat([torch.ones(100), -torch.ones(160)]),
    "low rank": torch.cat([torch.rand(37, dtype=torch.float64), torch.zeros(223)]),
    "negative": -torch.arange(1, 261).double(),
    "both signs": torch.linspace(-1, 1, 260),
}


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_every_spectrum(kind, scale):
    check(with_spectrum(SPECTRA[kind]) * scale, 87)
    check(with_spectrum(SPECTRA[kind]) * scale, 260)


@pytest.mark.parametrize("level", [1, 3])
def test_every_instruction_set(monkeypatch, level):
    monkeypatch.setattr(two_stage, "LEVEL", level)
    for kind in ("clusters", "root", "far below rounding"):
        check(with_spectrum(SPECTRA[kind]), 87)
    for n in (130, 193, 257):
        check(with_spectrum(torch.linspace(-1, 1, n)), n // 2)


PANELS = {
    "random": lambda x: x,
    "equal columns": lambda x: x[:, :1].expand(-1, 64) + 0,
    "zero columns": lambda x: x.index_fill(1, torch.arange(0, 64, 3), 0),
    "triangular": lambda x: x.triu(),
    "small": lambda x: x * 1e-170,
    "far apart": lambda x: x * torch.logspace(0, -160, 64, dtype=torch.float64),
    "zero": lambda x: x * 0,
}


@pytest.mark.parametrize("kind", PANELS)
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 63, 64, 65, 100, 520, 1030])
@pytest.mark.parametrize("level", [1, 3, 4])
def test_reflectors_of_a_panel(monkeypatch, level, m, kind):
    monkeypatch.setattr(two_stage, "LEVEL", level)
    generator = torch.Generator().manual_seed(m)
    columns = PANELS[kind](torch.randn(m, 64, generator=generator, dtype=torch.float64) / max(m, 64) ** 0.5)
    whole = torch.full((m, 70), 7.0, dtype=torch.float64)
    whole[:, 3:67] = columns
    V, U = two_stage._panel(whole[:, 3:67])
    assert V.shape == U.shape == (m, 64)
    assert torch.equal(whole[:, :3], torch.full((m, 3), 7.0)) and torch.equal(whole[:, 67:], torch.full((m, 3), 7.0))
    R = whole[:64, 3:67]
    assert torch.equal(R, R.triu()) and torch.equal(V, V.tril())
    diagonal = V.diagonal()
    assert torch.equal(diagonal, (U != 0).any(0)[: len(diagonal)].double())
    Q = torch.eye(m, dtype=torch.float64) - U @ V.mT
    assert largest(Q.mT @ Q - torch.eye(m, dtype=torch.float64)) <= 1e-14
    lengths = torch.linalg.vector_norm(columns, dim=0)
    wrong = torch.linalg.vector_norm(Q[:, : len(R)] @ R - columns, dim=0)
    assert bool((wrong <= 1e-14 * lengths + 2.0**-449).all())  # shorter columns are not reduced
    if kind == "random":  # of full rank: R is unique but for signs
        assert largest(R.abs() - torch.geqrf(columns)[0][: len(R)].triu().abs()) <= 1e-14


def structured(kind, n=200):
    if kind == "zero":
        return torch.zeros(n, n, dtype=torch.float64)
    if kind == "identity":
        return torch.eye(n, dtype=torch.float64)
    if kind == "diagonal":
        return torch.randperm(n, generator=torch.Generator().manual_seed(0)).double().diag()
    if kind == "ones":
        return torch.ones(n, n, dtype=torch.float64)
    if kind == "tridiagonal":  # eigenvalues in pairs that agree in all digits
        return (torch.arange(n) - n // 2).abs().double().diag() + torch.ones(n - 1).double().diag(1).add(
            torch.ones(n - 1).double().diag(-1)
        )
    if kind == "blocks":  # independent, and equal
        block = with_spectrum(torch.linspace(0, 1, n // 4))
        return torch.block_diag(*[block] * 4)
    if kind == "a row":
        matrix = torch.zeros(n, n, dtype=torch.float64)
        matrix[0] = matrix[:, 0] = 1
        return matrix
    graded = torch.logspace(0, -300, n, dtype=torch.float64)  # elements that underflow beside the largest
    return torch.minimum(graded, graded[:, None])


@pytest.mark.parametrize("kind", ["zero", "identity", "diagonal", "ones", "tridiagonal", "blocks", "a row", "graded"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_structure(kind, threads):
    with torch_threads(threads):  # products round otherwise with more
        for k in (1, 66, 200):
            check(structured(kind), k)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    matrix = torch.eye(100, dtype=torch.float64)
    matrix[3, 70] = matrix[70, 3] = bad
    with pytest.raises(NonFiniteError, match="100x100"):
        leading_eigenvectors(matrix, lambda values: 3)


def test_the_bits_are_the_same_each_time_and_for_every_number_of_threads():
    matrix = with_spectrum(SPECTRA["root"])
    values, V = leading_eigenvectors(matrix.clone(), lambda found: 87)
    assert all(map(torch.equal, leading_eigenvectors(matrix.clone(), lambda found: 87), (values, V)))
    band = two_stage._lower_band(matrix)
    one = two_stage._chase(band, 260)
    turned = []
    for number in (1, 2, 3, 5):
        with torch_threads(number):
            halves = divide_and_conquer.Halves(band[:260, 0].clone(), band[:259, 1].clone())
            X = halves.vectors(87)
            Y = X.clone()
            two_stage._turn_by_chasing(Y, *one)
            turned.append((halves.values, X, Y))
    for found in turned[1:]:
        assert torch.equal(found[0], turned[0][0])
        assert torch.allclose(found[1], turned[0][1], rtol=0, atol=1e-13)  # products by BLAS


TRIDIAGONAL = {
    "random": (torch.randn(300), torch.randn(299)),
    "no links": (torch.randn(300), torch.zeros(299)),
    "one link missing": (torch.ones(300), torch.ones(299).index_fill(0, torch.tensor(149), 0)),
    "equal": (torch.ones(300), torch.ones(299)),
    "tiny links": (torch.arange(300.0), torch.full((299,), 1e-14)),
    "negative links": (torch.zeros(300), -torch.rand(299)),
    "graded": (torch.logspace(0, -200, 300, dtype=torch.float64), torch.logspace(-1, -200, 299, dtype=torch.float64)),
    "glued": (
        torch.arange(-10, 11).abs().repeat(15)[:300],
        torch.ones(299).index_fill(0, torch.arange(20, 299, 21), 1e-8),
    ),
}


@pytest.mark.parametrize("kind", TRIDIAGONAL)
def test_divide_and_conquer(kind):
    diagonal, beside = (x.double() for x in TRIDIAGONAL[kind])
    T = diagonal.diag() + beside.diag(1) + beside.diag(-1)
    found = divide_and_conquer.solved(diagonal.clone(), beside)
    size = float(torch.linalg.eigvalsh(T).abs().amax())
    assert (found.values - torch.linalg.eigh(T)[0]).abs().amax() <= 1e-14 * size
    assert (found.vectors.mT @ found.vectors - torch.eye(300, dtype=torch.float64)).abs().amax() <= 1e-14
    assert (T @ found.vectors - found.vectors * found.values).abs().amax() <= 1e-14 * size


def test_without_the_native_module_lapack_gives_the_subspaces(monkeypatch):
    matrix = torch.randn(600, 520, generator=torch.Generator().manual_seed(0))
    ours = leading_subspaces(matrix, 100)
    assert ours.certificate.route == "gram-float64"
    monkeypatch.setattr(backends, "state", lambda backend: "not built")
    assert not two_stage.two_stage_runs(torch.device("cpu"))
    theirs = leading_subspaces(matrix, 100)
    assert theirs.certificate.route == "gram-float32"
    angle = torch.linalg.matrix_norm(ours.Vh - ours.Vh @ theirs.Vh.mT @ theirs.Vh, 2)
    assert angle <= ours.certificate.error + theirs.certificate.error


@pytest.mark.parametrize("kind", ["falling", "exponential", "clusters", "low rank"])
def test_subspaces_of_steep_and_tied_spectra_are_certified(kind):
    wanted = torch.cat([SPECTRA[kind].double().flip(0).sort(descending=True).values] * 2).sort(descending=True).values
    U, V = (torch.linalg.qr(torch.randn(520, 520, dtype=torch.float64)).Q for _ in range(2))
    matrix = U * wanted.abs() @ V.mT
    rank = 70
    parts = leading_subspaces(matrix, rank)
    assert parts.certificate.met
    assert parts.residual <= 1e-7
