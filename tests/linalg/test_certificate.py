"""What certificates say where little is certain: rounding of stored weights, and equal singular values."""

import numpy as np
import pytest
import torch
from honesty import truth

from r_tsvm_kernels.linalg import Certificate, Factored, leading_subspaces, merge_factored, truncated_svd, tsv_merge


def lora_born(m, n, seed, dtype=torch.float32):
    """Differences of stored weights: rank 4, and rounding at the 1e-7th part of it."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(m, n, generator=generator) * 0.02).to(dtype)
    updates = [torch.randn(m, 4, generator=generator) @ torch.randn(4, n, generator=generator) for _ in range(2)]
    return [(base + 1e-4 * update.to(dtype)).to(dtype).float() - base.float() for update in updates]


@pytest.mark.parametrize("shape", [(64, 2048), (48, 1024), (2048, 64), (300, 400)])
@pytest.mark.parametrize("seed", range(3))
def test_routers_of_lora_born_fine_tunes_are_merged_as_by_numpy(shape, seed):
    tasks, rank = lora_born(*shape, seed), min(shape) // 2
    merged = tsv_merge(tasks, [rank, rank])
    parts = [truth.leading(task.double().numpy(), rank, True, truth.plain) for task in tasks]
    exact = truth.tsv_merge(parts, [1.0, 1.0], truth.plain)
    error = np.linalg.norm(merged.matrix.double().numpy() - exact) / np.linalg.norm(exact)
    assert merged.certificate.met and not merged.certificate.arbitrary
    assert error <= min(merged.certificate.error, 1e-5)


@pytest.mark.parametrize("dropped", range(33))
def test_no_estimate_is_zero_however_few_directions_are_dropped(dropped):
    (part,) = leading_subspaces([lora_born(64, 256, 0)[0]], 64 - dropped)
    assert part.certificate.subspace_error > 0 and part.certificate.error > 0
    svd = truth.leading(lora_born(64, 256, 0)[0].double().numpy(), 64 - dropped, True, truth.plain)
    sine = np.linalg.norm(part.Vh.numpy().T - svd.Vh.T @ (svd.Vh @ part.Vh.numpy().T))
    assert sine <= 2 * part.certificate.error


def ties(solver):
    tasks = [torch.eye(40, 30), 2 * torch.eye(40, 30)]
    if solver == "factored":
        factored = [Factored(task, torch.eye(30)) for task in tasks]
        return merge_factored(factored, 15).certificate
    return tsv_merge(tasks, 15, solver=solver).certificate


@pytest.mark.parametrize("solver", ["eigen", "products", "factored"])
def test_a_choice_among_equal_singular_values_is_admitted_to(solver):
    certificate = ties(solver)
    assert certificate.arbitrary and certificate.gap < 1e-12


def test_no_choice_is_admitted_to_where_all_of_equal_values_are_kept():
    certificate = tsv_merge([torch.eye(40, 30), 2 * torch.eye(40, 30)], 30).certificate
    assert not certificate.arbitrary and certificate.gap == 1.0
    for matrix in (torch.eye(40, 30), torch.diag(torch.tensor([2.0] * 10 + [1.0] * 20))):
        (part,) = leading_subspaces([matrix], 10 if matrix.shape[0] == 30 else 30)
        assert not part.certificate.arbitrary


def test_the_gap_is_that_of_the_singular_values_at_the_cut():
    matrix = torch.diag(torch.tensor([5.0, 4.0, 2.0, 1.0]))
    assert truncated_svd([matrix] * 2, [2, 3]).certificates[0].gap == pytest.approx(0.5)
    assert truncated_svd([matrix] * 2, [2, 3]).certificates[1].gap == pytest.approx(0.5)
    assert truncated_svd([matrix], [4]).certificates[0].gap == 1.0
    assert tsv_merge([matrix, matrix.T.flip(0)], [1, 2]).certificate.gap == pytest.approx(0.2)


def test_the_worst_of_several_certificates_keeps_what_any_of_them_says():
    fine = Certificate(1e-9, 1e-12, 1e-10, 1e-4, "svd-float64", gap=0.5)
    tied = Certificate(1e-12, 1e-12, 1e-10, 1e-4, "gram-float64", gap=0.0, arbitrary=True, escalations=("a: b",))
    missed = Certificate(float("nan"), 1e-12, 1e-10, 1e-4, "gram-float32")
    assert Certificate.worst([fine, tied]) == Certificate(
        1e-9, 1e-12, 1e-10, 1e-4, "svd-float64", gap=0.0, arbitrary=True, escalations=("a: b",)
    )
    assert not Certificate.worst([fine, missed]).met


@pytest.mark.parametrize(("rows", "columns", "rank"), [(465, 258, 247), (300, 300, 150)])
def test_float32_eigenvectors_open_no_gap_among_equal_singular_values(rows, columns, rank):
    # Mixing among the leading directions alone moves eigenvalues by its square: here by 1e-10, in one direction.
    values = np.arange(1, columns + 1) ** -0.6
    values[rank - 2 : rank + 2] = values[rank - 1]
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, columns)))[0] for size in (rows, columns))
    (part,) = leading_subspaces([torch.from_numpy((left * values) @ right.T)], rank)
    assert part.certificate.arbitrary and part.certificate.gap < 1e-13
