from contextlib import nullcontext

import numpy as np
import pytest
import torch
from merging import lapack_alone
from spectra import KINDS, spectrum

from r_tsvm_kernels.errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import eigenspaces, energy_rank, leading_subspaces, truncated_svd
from r_tsvm_kernels.linalg.rounding import Cut


def check(matrix, rank, expected_rank, residual=1e-11):
    parts = leading_subspaces(matrix, rank)
    exact = matrix.double()
    values = torch.from_numpy(np.linalg.svd(exact.numpy(), compute_uv=False))
    assert parts.rank == expected_rank
    eye = torch.eye(expected_rank, dtype=torch.float64)
    assert (parts.U.mT @ parts.U - eye).abs().max() < 1e-12
    assert (parts.Vh @ parts.Vh.mT - eye).abs().max() < 1e-12
    norm = exact.norm()
    assert (exact @ parts.Vh.mT - parts.U @ parts.core).norm() <= residual * norm
    assert (exact.mT @ parts.U - parts.Vh.mT @ parts.core.mT).norm() <= residual * norm
    assert torch.allclose(torch.linalg.svdvals(parts.core), values[:expected_rank], rtol=residual)
    assert parts.captured_energy == pytest.approx(float((values[:expected_rank] ** 2).sum() / (values**2).sum()))
    assert parts.residual <= residual
    assert parts.certificate.met
    return parts


@pytest.mark.parametrize("shape", [(40, 40), (64, 17), (17, 64), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_singular_subspaces(shape, dtype):
    check(torch.randn(shape, dtype=dtype), max(1, min(shape) // 3), max(1, min(shape) // 3))
    check(torch.randn(shape, dtype=dtype), min(shape), min(shape))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_badly_scaled(scale):
    check(torch.randn(20, 30) * scale, 7, 7)


def test_graded_and_repeated_spectra():
    U, V = (torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q for _ in range(2))
    check((U * torch.logspace(0, -5, 32, dtype=torch.float64)) @ V, 12, 12)
    check(torch.eye(32), 12, 12)
    check(torch.eye(300), 100, 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_is_clipped_to_the_numerical_rank(dtype):
    low = torch.randn(50, 4, dtype=dtype) @ torch.randn(4, 30, dtype=dtype)
    parts = check(low, 20, 4)
    assert parts.captured_energy == pytest.approx(1.0)
    check(torch.outer(torch.randn(8, dtype=dtype), torch.randn(5, dtype=dtype)), 5, 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("share", [3, 24])
def test_matrices_large_enough_for_float32(kind, share):
    # The residual of an approximately invariant subspace is as small as its angle to the exact one.
    rank = min(520 // share, 52 if kind == "low rank" else 520)
    with lapack_alone():
        parts = check(spectrum(kind, 540, 520, 1), 520 // share, rank, 1e-8)
    # Where the spectrum falls far before the cut, float32 squares it into noise, and that is foreseen.
    lost = (share == 3 and kind not in ("flat", "power 0.3")) or kind == "power 1.2"
    assert parts.certificate.route == ("gram-float64" if lost else "gram-float32")
    assert parts.certificate.escalations == ()


def test_a_row_tile_at_a_time():
    tall = torch.randn(3000, 12)
    parts = leading_subspaces(tall, 5)
    wide = leading_subspaces(tall.mT, 5)
    assert torch.allclose(parts.U @ parts.core @ parts.Vh, (wide.U @ wide.core @ wide.Vh).mT, atol=1e-12)


def test_fast_mode_says_how_far_off_it_may_be():
    matrix = spectrum("flat", 400, 400, 0)
    exact, fast = leading_subspaces(matrix, 50), leading_subspaces(matrix, 50, mode="fast")
    angle = torch.linalg.svdvals(fast.Vh - fast.Vh @ exact.Vh.mT @ exact.Vh).norm()
    assert angle <= 3 * fast.certificate.error <= 1e-2
    assert exact.certificate.error < 1e-7


def test_zero_matrix_and_rank_zero():
    parts = leading_subspaces(torch.zeros(6, 4), 3)
    assert (parts.rank, parts.U.shape, parts.Vh.shape, parts.captured_energy) == (0, (6, 0), (0, 4), 1.0)
    parts = leading_subspaces(torch.randn(6, 4), 0)
    assert (parts.rank, parts.captured_energy) == (0, 0.0)
    parts = leading_subspaces(torch.zeros(0, 4), 3)
    assert (parts.rank, parts.U.shape) == (0, (0, 0))


def test_a_rule_sees_the_singular_values():
    matrix = spectrum("power 0.7", 40, 60, 3)
    parts = leading_subspaces(matrix, lambda values: energy_rank(values, 0.8))
    assert parts.rank == energy_rank(torch.linalg.svdvals(matrix.double()), 0.8)


def test_truncated_svd_pads_to_the_largest_rank():
    matrices = torch.stack([spectrum("power 0.5", 30, 20, seed) for seed in range(3)])
    result = truncated_svd(matrices, [4, 7, 0])
    assert result.ranks == (4, 7, 0)
    assert (result.U.shape, result.S.shape, result.Vh.shape) == ((3, 30, 7), (3, 7), (3, 7, 20))
    for item, k in enumerate(result.ranks):
        U, s, Vh = torch.linalg.svd(matrices[item].double(), full_matrices=False)
        assert torch.allclose(result.S[item, :k], s[:k], rtol=1e-10)
        approximation = result.U[item] * result.S[item] @ result.Vh[item]
        assert torch.allclose(approximation, U[:, :k] * s[:k] @ Vh[:k], atol=1e-10)
        assert not result.U[item, :, k:].any() and not result.S[item, k:].any() and not result.Vh[item, k:].any()


def test_a_matrix_gives_one_result_and_a_batch_one_for_each():
    stack = torch.randn(3, 12, 9)
    U, core, Vh = leading_subspaces(stack[1], 4)
    assert (U.shape, core.shape, Vh.shape) == ((12, 4), (4, 4), (4, 9))
    assert torch.equal(leading_subspaces(stack, 4)[1].core, core)
    U, S, Vh = truncated_svd(stack[1], 4)
    batch = truncated_svd(stack, 4)
    for one, several in zip((U, S, Vh), batch, strict=True):
        assert torch.equal(several[1], one)
    assert batch.certificate.error == max(certificate.error for certificate in batch.certificates)
    assert repr(leading_subspaces(stack[1], 4)).startswith("Subspaces(12x9, rank 4, error ")
    assert repr(truncated_svd(stack[1], 4)).startswith("TruncatedSVD(12x9, rank 4, error ")
    assert repr(batch).startswith("TruncatedSVD(3 of 12x9, ranks 4/4/4, error ")


def test_what_it_refuses():
    with pytest.raises(ShapeError, match="expected matrices"):
        leading_subspaces([torch.zeros(2, 3, 4)], [1])
    with pytest.raises(ShapeError, match="2 ranks"):
        leading_subspaces([torch.zeros(2, 3)], [1, 1])
    with pytest.raises(ShapeError, match="negative"):
        leading_subspaces([torch.zeros(2, 3)], [-1])
    with pytest.raises(DTypeError, match="float16"):
        leading_subspaces([torch.zeros(2, 3, dtype=torch.float16)], [1])
    with pytest.raises(NonFiniteError, match="NaN"):
        leading_subspaces([torch.full((8, 8), torch.nan)], [2])
    with pytest.raises(ConfigError, match="mode"):
        leading_subspaces([torch.zeros(2, 3)], [1], mode="quick")
    with pytest.raises(ShapeError, match="one shape"):
        truncated_svd([torch.zeros(2, 3), torch.zeros(3, 2)], [1, 1])


@pytest.mark.parametrize("unit", [1e200, 1e-300, 1e-305])
def test_estimates_do_not_depend_on_the_unit(unit):
    generator = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(m, 40, generator=generator, dtype=torch.float64)).Q for m in (60, 40))
    matrix = (P * 10 ** (-torch.arange(40, dtype=torch.float64) / 3)) @ Q.T
    one, other = (truncated_svd(matrix * scale, 20) for scale in (1.0, unit))
    assert other.certificate.error == pytest.approx(one.certificate.error, rel=1e-3)
    assert other.certificate.arbitrary == one.certificate.arbitrary


def test_estimates_of_directions_that_do_not_count():
    assert Cut(torch.zeros(3, dtype=torch.float64), 3).error()[0] < 1e-14
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64)
    errors = [Cut(torch.tensor([3.0, 2.0, 1.0]).double() * unit, 2).error(weights=weights)[0] for unit in (1.0, 1e-305)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


@pytest.mark.parametrize("native", [True, False], ids=["two stages", "LAPACK"])
def test_close_values_far_below_the_largest_are_corrected(monkeypatch, native):
    """The Gram matrix rounds them to each other's neighbours; a correction from the images is enough."""
    values = torch.cat([torch.logspace(0, -2.8, 30), torch.linspace(1.2e-3, 1.0e-3, 570)]).double()
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(600, 600, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    matrix, rank, resolved = U * values @ V.mT, 200, []
    resolve = eigenspaces._resolve
    monkeypatch.setattr(eigenspaces, "_resolve", lambda *given: resolved.append(given) or resolve(*given))
    with nullcontext() if native else lapack_alone():
        found = leading_subspaces(matrix, rank, routes=["gram-float64"])
    assert not resolved
    assert bool((found.cut.values.diff() <= 0).all())
    apart = found.Vh.mT @ found.Vh - V[:, :rank] @ V[:, :rank].mT
    sine = float(torch.linalg.matrix_norm(apart)) / 2**0.5
    assert sine <= 2 * found.certificate.error <= 4e-8
    monkeypatch.setattr(eigenspaces, "_corrected", lambda matrix, V, others, values, window: (V, values[-rank:]))
    with nullcontext() if native else lapack_alone():
        leading_subspaces(matrix, rank, routes=["gram-float64"])
    assert resolved


def test_groups_of_eigenvalues_by_size():
    values = torch.cat([torch.zeros(3), torch.tensor([1e-6, 2e-6, 3.9e-6, 4e-6, 2e-4, 3e-4, 1e-2, 1.0, 1.0])]).double()
    assert eigenspaces._groups(values, 3, by_size=False) == [slice(3, 12)]
    assert eigenspaces._groups(values, 3, by_size=True) == [slice(3, 6), slice(6, 8), slice(8, 10), slice(10, 12)]
    assert eigenspaces._groups(values, 12, by_size=True) == []
    assert eigenspaces._groups(torch.zeros(3), 1, by_size=True) == [slice(1, 2), slice(2, 3)]


@pytest.mark.parametrize("native", [True, False], ids=["two stages", "LAPACK"])
def test_corrected_directions_may_be_resolved(monkeypatch, native):
    """After a correction the other eigenvectors must be orthogonal again: they are solved with it."""
    values = torch.cat([torch.logspace(0, -2.5, 25), 2.8e-3 * torch.linspace(1 + 5e-5, 1, 575).double()]).double()
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, 600, generator=generator, dtype=torch.float64)).Q for size in (640, 600))
    calls = []
    for name in ("_corrected", "_resolve"):
        own = getattr(eigenspaces, name)
        monkeypatch.setattr(eigenspaces, name, lambda *given, n=name, f=own: calls.append(n) or f(*given))
    rank = 400
    matrix = U * values @ V.mT
    with nullcontext() if native else lapack_alone():
        found = leading_subspaces(matrix, rank, routes=["gram-float64"])
    assert calls[0] == "_corrected" and "_resolve" in calls
    assert bool((found.cut.values.diff() <= 0).all())
    exact = torch.linalg.svd(matrix)[2][:rank].mT
    sine = float(torch.linalg.matrix_norm(found.Vh.mT - exact @ (exact.mT @ found.Vh.mT)))
    gap = float(values[rank - 1] - values[rank])
    assert sine <= 2 * found.certificate.error + 30 * 2.0**-52 * rank**0.5 / gap
