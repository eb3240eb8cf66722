"""Overlap of the tasks' subspaces, against the principal angles themselves."""

import math

import pytest
import torch

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import (
    Factored,
    interference_above_chance,
    interference_of_bases,
    interference_of_gram,
    tsv_merge,
)


def basis(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


def by_angles(bases):
    """Root mean square of the cosines of all principal angles between different tasks."""
    cosines = [
        torch.linalg.svdvals(a.mT @ b) for i, a in enumerate(bases) for b in bases[i + 1 :] if a.numel() and b.numel()
    ]
    return float(torch.cat(cosines).square().mean().sqrt()) if cosines else 0.0


@pytest.mark.parametrize("ranks", [(3, 3), (5, 2, 4), (6, 0, 3), (7,), (0, 0), (1, 1, 1, 1)])
def test_it_is_the_root_mean_square_cosine(ranks):
    bases = [basis(20, k, seed) for seed, k in enumerate(ranks)]
    X = torch.cat(bases, 1)
    expected = by_angles(bases)
    assert interference_of_gram(X.mT @ X, ranks) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert interference_of_bases(bases) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    identity = torch.eye(sum(ranks), dtype=torch.float64)
    pairs = sum(min(a, b) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if i != j)
    distance = float(torch.linalg.matrix_norm(X.mT @ X - identity)) if pairs else 0.0
    assert expected == pytest.approx(distance / math.sqrt(pairs or 1), abs=1e-12)  # the formula of the docstring


def test_its_limits():
    Q = basis(12, 12, 0)
    assert interference_of_bases([Q[:, :4], Q[:, 4:9], Q[:, 9:]]) == pytest.approx(0, abs=1e-6)
    assert interference_of_bases([Q[:, :4], Q[:, :4] @ basis(4, 4, 1)]) == pytest.approx(1)
    assert interference_of_bases([Q[:, :2], Q[:, :6]]) == pytest.approx(1)  # one contains the other


@pytest.mark.parametrize(
    ("n", "ranks"), [(64, (16, 16)), (200, (5, 60)), (90, (30, 30, 30)), (100, (40, 0, 60)), (300, (1, 1))]
)
def test_independent_subspaces_have_none_above_chance(n, ranks):
    draws = []
    for seed in range(40):
        found = interference_of_bases([basis(n, k, 10 * seed + task) for task, k in enumerate(ranks)])
        draws.append(interference_above_chance(found, ranks, n))
    draws = torch.tensor(draws, dtype=torch.float64)
    assert abs(float(draws.mean())) < 4 * float(draws.std()) / math.sqrt(len(draws))
    assert float(draws.std()) < 0.05
    identical = [basis(n, max(ranks), 0)[:, :k] for k in ranks]
    assert interference_above_chance(interference_of_bases(identical), ranks, n) == pytest.approx(1, abs=1e-6)


def test_above_chance_by_hand():
    assert interference_above_chance(0.5, [16, 16], 64) == 0  # sqrt(16 / 64)
    assert interference_above_chance(1, [16, 16], 64) == 1
    assert interference_above_chance(0, [16, 16], 64) == pytest.approx(-1 / 3)  # orthogonal: less than by chance
    # Three pairs of 2, 2 and 4 angles, of mean square cosines 4 / 10, 6 / 10 and 6 / 10.
    assert interference_above_chance(0.9, [2, 4, 6], 10) == pytest.approx((0.81 - 0.55) / 0.45)
    for ranks in ([], [5], [5, 0], [0, 0]):
        assert interference_above_chance(0.0, ranks, 10) is None  # nothing to compare
    for ranks in ([10, 10], [3, 10]):
        assert interference_above_chance(1.0, ranks, 10) is None  # the whole space overlaps with all


@pytest.mark.parametrize("method", ["tsvm", "rtsvm"])
def test_reports_tell_independent_tasks_from_equal_ones(method):
    generator = torch.Generator().manual_seed(0)
    base, *tasks = torch.randn(5, 96, 160, generator=generator)

    def interference(tuned, **parameters):
        return merge_tensors(base, tuned, MergeConfig(method, **parameters)).report.interference

    independent = interference([base + 0.01 * task for task in tasks])
    assert len(independent) == 2 and all(abs(value) < 0.05 for value in independent)
    assert interference([base + 0.01 * tasks[0]] * 4) == pytest.approx([1, 1], abs=1e-3)
    assert interference([base + 0.01 * tasks[0]]) == []


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("kind", ["eigen", "products", "factored"])
def test_every_route_reports_left_and_right(shape, kind):
    ranks, tasks = (4, 6), []
    for seed, k in enumerate(ranks):
        # Two of the left directions are nearly common to both tasks, and none of the right ones.
        near = basis(shape[0], 2, 9) + 0.5 * basis(shape[0], 2, 10 + seed)
        U = torch.linalg.qr(torch.cat([near, basis(shape[0], k - 2, seed)], 1)).Q
        V = basis(shape[1], 12, 5)[:, 6 * seed : 6 * seed + k]
        tasks.append((U, torch.linspace(2, 1, k, dtype=torch.float64), V))
    if kind == "factored":
        matrices = [Factored(U * s, V.mT) for U, s, V in tasks]
    else:
        matrices = [((U * s) @ V.mT).float() for U, s, V in tasks]
    merged = tsv_merge(matrices, ranks, solver="products" if kind == "products" else "eigen")
    assert merged.certificate.route.startswith({"eigen": "svd", "products": "products", "factored": "factored"}[kind])
    left, right = merged.interference
    assert left == pytest.approx(by_angles([U for U, _, _ in tasks]), rel=1e-4) and left > 0.5
    assert right == pytest.approx(0, abs=1e-5)
