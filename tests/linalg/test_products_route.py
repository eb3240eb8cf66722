"""TSV-Merge from matrix products alone, against the float64 SVD; formats of tensor cores are simulated by rounding."""

import math

import pytest
import torch
from compare import relative_error
from spectra import KINDS, rank_of, spectrum

from r_tsvm_kernels import backends
from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.linalg import orthonormal, tsv_merge
from r_tsvm_kernels.linalg.products import subspaces
from r_tsvm_kernels.linalg.products.merge import LOWER, cholesky, extremes_of_bases, lower_bound, products_tsv_merge
from r_tsvm_kernels.linalg.products.number_formats import arithmetic, padded
from r_tsvm_kernels.linalg.products.subspaces import extremes, products_subspaces

# Of the merged matrix, relative; exact mode's contract is 1e-4. That of single fp16 products grows with the condition
# of the bases: the limit is for 1,000, above most that these matrices have.
EXACT, FAST = 3e-5, 2e-2


def tasks_of(kind, m, n, tasks):
    return torch.stack([spectrum(kind, m, n, seed) for seed in range(tasks)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(96, 96), (80, 130)])
@pytest.mark.parametrize("tasks", [2, 3, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_merged_matrix(kind, m, n, tasks):
    matrices, rank = tasks_of(kind, m, n, tasks), rank_of(kind, min(m, n), tasks)
    exact = tsv_merge(matrices.double(), [rank] * tasks).matrix
    precise = products_tsv_merge(matrices, [rank] * tasks)
    assert relative_error(precise.matrix, exact) < EXACT
    assert precise.orthogonality < 1e-5
    fast = products_tsv_merge(matrices, [rank] * tasks, None, "fp16")
    assert relative_error(fast.matrix, exact) < FAST * max(1, max(fast.condition) / 1000)
    assert relative_error(products_tsv_merge(matrices, [rank] * tasks, None, "float64").matrix, exact) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp16x3", "fp16"])
def test_the_error_estimate_is_not_too_small(kind, precision):
    matrices, rank = tasks_of(kind, 90, 90, 3), rank_of(kind, 90, 3)
    exact = tsv_merge(matrices.double(), [rank] * 3).matrix
    for tolerance in (math.inf, 0.0):
        got = products_tsv_merge(matrices, [rank] * 3, None, precision, tolerance)
        error = min(1.0, relative_error(got.matrix, exact))
        estimate = max(part.error_estimate for part in got.parts)
        assert error < 2 * estimate
        assert all(part.compressed == (tolerance == 0) for part in got.parts)


@pytest.mark.parametrize(("seed", "precision"), [(32, "fp16x3"), (133, "fp16x3"), (148, "fp16x3"), (21, "fp16")])
def test_a_single_pair_of_close_directions_is_not_averaged_away(seed, precision):
    """Without a term for that pair, these estimates are a fifth to a third of the error."""
    size, rank = (300, 30) if precision == "fp16x3" else (480, 48)
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True).values
    (got,) = products_subspaces(((U * values) @ V.mT).float()[None], [1], precision)
    beside = got.Vh.mT - V[:, :1] @ (V[:, :1].mT @ got.Vh.mT)
    error = float(torch.linalg.vector_norm(beside))
    assert 0.2 < error / got.subspace_error < 2


def test_heavy_heads_are_compressed_and_others_are_not():
    matrices = tasks_of("flat", 90, 90, 3)
    matrices[1] += 1e3 * torch.randn(90, 1) @ torch.randn(1, 90)
    got = products_tsv_merge(matrices, [30, 30, 30], [1.0, 2.0, 0.5])
    assert [part.compressed for part in got.parts] == [False, True, False]
    assert got.parts[1].ratio > 1e3
    exact = tsv_merge(matrices.double(), [30, 30, 30], [1.0, 2.0, 0.5]).matrix
    assert relative_error(got.matrix, exact) < EXACT


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
@pytest.mark.parametrize("shape", [(70, 40), (40, 70)])
def test_subspaces_are_singular_ones(shape, scale):
    matrices = scale * torch.randn(3, *shape)
    ranks = [1, 9, 30]
    for matrix, rank, part in zip(matrices, ranks, products_subspaces(matrices, ranks), strict=True):
        U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert part.U.shape == (shape[0], rank) and part.Vh.shape == (rank, shape[1])
        truncated = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert relative_error(part.U @ part.core @ part.Vh, truncated) < 1e-4
        assert part.orthogonality < 1e-13 and part.residual < 1e-6 and part.invariance < 3e-6
        assert part.ratio == pytest.approx(float(s[0] / s[rank - 1]), rel=0.2)
        assert part.smallest == pytest.approx(float(s[rank - 1]), rel=0.2)


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "float64"])
def test_a_rank_above_the_numerical_rank_is_seen(precision):
    got = products_tsv_merge(tasks_of("low rank", 90, 90, 3), [30, 30, 30], None, precision)
    assert all(part.error_estimate == math.inf for part in got.parts)


def test_shared_directions_are_seen():
    matrix = torch.randn(60, 60)
    got = products_tsv_merge(torch.stack([matrix, matrix]), [30, 30])
    assert not got.orthogonality < 1e-3


def test_one_task_of_full_rank_comes_back():
    matrix = torch.randn(1, 40, 30)
    assert relative_error(products_tsv_merge(matrix, [30]).matrix, matrix[0]) < EXACT


def test_well_conditioned_bases_take_few_steps():
    """Each step of a polar factor adds rounding errors: eleven would leave an error of 3e-6."""
    matrices = tasks_of("power 0.7", 120, 96, 3)
    merged = products_tsv_merge(matrices, [8] * 3)
    assert merged.polar_steps <= 4 and merged.orthogonality < 1e-6
    assert relative_error(merged.matrix, tsv_merge(matrices.double(), [8] * 3).matrix) < 1.5e-6


@pytest.mark.parametrize("smallest", [1.0, 0.3, 1e-3, 1e-9, 0.0])
def test_the_smallest_singular_value_is_bounded_from_below(smallest):
    basis = torch.linalg.qr(torch.randn(2, 50, 20, dtype=torch.float64)).Q
    basis[1, :, 3] *= smallest
    factors = torch.linalg.cholesky_ex(basis.mT @ basis, upper=True).L
    bound = lower_bound(min(float(extremes(factor)[1].nan_to_num(0.0)) for factor in factors))
    assert math.log2(bound).is_integer() and LOWER <= bound <= max(smallest, LOWER)
    assert bound >= smallest / 4 or smallest == 0


@pytest.mark.parametrize("smallest", [1e-1, 1e-4])
def test_a_cholesky_factor_in_two_blocks(monkeypatch, smallest):
    monkeypatch.setattr(orthonormal, "BLOCKED_FROM", 16)
    for n in (16, 41):
        Q = torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64)).Q
        H = Q * torch.logspace(0, math.log10(smallest), n, dtype=torch.float64) @ Q.mT
        for precision, error in (("float64", 1e-14), ("fp16x3", 1e-6)):
            R = cholesky(H, arithmetic(precision))
            assert torch.equal(R, R.triu()) and relative_error(R.mT @ R, H) < error
            assert torch.linalg.svdvals(R)[:, -1].square() == pytest.approx(smallest, rel=0.01)


@pytest.mark.parametrize("widths", [(20,), (20, 7), (5, 12, 9)], ids=str)
def test_extremes_of_bases_side_by_side(widths):
    numbers = arithmetic("fp16x3")
    bases = torch.cat([torch.linalg.qr(torch.randn(3, 60, width, dtype=torch.float64)).Q for width in widths], -1)
    if len(widths) > 1:  # nearly parallel directions
        bases[1, :, -1] = torch.nn.functional.normalize(bases[1, :, 0] + 0.1 * bases[1, :, -1], dim=0)
        bases[1, :, -widths[-1] :] = torch.linalg.qr(bases[1, :, -widths[-1] :]).Q
    k = sum(widths)
    exact = torch.linalg.svdvals(bases)
    smallest, largest = extremes_of_bases([numbers.gram(numbers.load(padded(bases, k)))], k, widths[0], numbers)
    assert (0.999 * exact[:, -1] <= smallest).all() and (smallest <= 1.2 * exact[:, -1]).all()
    assert (0.8 * exact[:, 0] <= largest).all() and (largest <= 1.001 * exact[:, 0]).all()


@pytest.mark.parametrize("precision", ["float32", "fp16x3"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["low rank + noise", "power 0.3", "power 0.7"])
def test_few_directions_are_found_as_well_as_told(kind, compressed, precision):
    # With few wanted directions the first level has little margin, and the second one cannot recover what it loses.
    matrices = torch.stack([spectrum(kind, 160, 128, seed) for seed in range(3)])
    for k in (3, 10):
        decomposed = [torch.linalg.svd(matrix.double(), full_matrices=False) for matrix in matrices]
        levels = torch.stack([s[k - 1] for _, s, _ in decomposed]) if compressed else None
        for (_, s, Vh), part in zip(decomposed, products_subspaces(matrices, [k] * 3, precision, levels), strict=True):
            lost = part.Vh.double() - part.Vh.double() @ Vh[:k].mT @ Vh[:k]
            gap = float(1 - s[k] / s[k - 1])
            assert float(torch.linalg.matrix_norm(lost, 2)) <= part.error_estimate / min(gap, 1.0) < 1e-2


PRODUCTS = ("split_planes", "symm_gram", "symm_square", "purify_step", "gemm3")
INTERPRETER = backends.triton_interpreter_state()


@pytest.mark.skipif(INTERPRETER != backends.READY, reason=f"needs Triton's interpreter: {INTERPRETER}")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.exhaustive
def test_a_merge_on_the_interpreted_kernels():
    matrices = torch.randn(2, 44, 36)
    matrices[1, :, 0] *= 100  # the two tasks take different numbers of steps, and one is compressed
    with use_backend(**dict.fromkeys(PRODUCTS, "triton")):
        got = products_tsv_merge(matrices, [9, 4])
    assert relative_error(got.matrix, tsv_merge(matrices.double(), [9, 4]).matrix) < 3e-5
    assert len({part.outer_steps for part in got.parts}) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels on a GPU: needs a CUDA device")
def test_a_merge_on_the_kernels_of_a_gpu():
    matrices = torch.randn(3, 1200, 1024, device="cuda")
    reference = products_tsv_merge(matrices, [341] * 3, None, "float64").matrix
    with use_backend(**dict.fromkeys(PRODUCTS, "triton")):
        got = products_tsv_merge(matrices, [341] * 3)
    assert relative_error(got.matrix.cpu(), reference.cpu()) < 1e-4
    assert got.orthogonality < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_steep_spectra_are_solved_once(monkeypatch, kind):
    solves = []
    solve = subspaces.products_subspaces

    def counted(matrices, ranks, precision, levels=None, gram=None):
        solves.append(levels is not None)
        return solve(matrices, ranks, precision, levels, gram)

    monkeypatch.setattr(subspaces, "products_subspaces", counted)
    matrices = torch.stack([spectrum(kind, 96, 80, seed) for seed in range(2)])
    ranks = [rank_of(kind, 80, 3)] * 2
    late = subspaces.accurate_subspaces(matrices, ranks)
    assert solves in ([False], [False, True])
    monkeypatch.setattr(subspaces, "FORESEEN_FROM", 16)
    solves.clear()
    soon = subspaces.accurate_subspaces(matrices, ranks)
    assert len(solves) == 1
    for first, second in zip(late, soon, strict=True):
        assert first.compressed == second.compressed == solves[0]
        angle = torch.linalg.matrix_norm(first.Vh - first.Vh @ second.Vh.mT @ second.Vh, 2)
        assert float(angle) <= first.subspace_error + second.subspace_error
