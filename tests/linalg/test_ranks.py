from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg import (
    asked_rank,
    choose_rank,
    energy_rank,
    fixed_rank,
    noise_rank,
    rank_limit,
    shared_ranks,
    sparsity_power_rank,
    sparsity_rank,
)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.floats(0, 1), st.floats(0, 8))
def test_ranks_share_the_short_side(m, n, tasks, sparsity, rho):
    fixed = fixed_rank((m, n), tasks)
    assert fixed in (min(m, n) // tasks, min(m, n) // tasks - 1)  # the published expression rounds down twice
    rank = sparsity_rank((m, n), tasks, sparsity, rho)
    assert 1 <= rank <= max(1, fixed)
    assert sparsity_rank((m, n), tasks, sparsity, 0.0) == max(1, fixed)
    if fixed:
        assert tasks * choose_rank("sparsity", (m, n), tasks, sparsity=sparsity, rho=rho) <= min(m, n)


def test_sparsity_rank_by_hand():
    assert sparsity_rank((96, 200), 3, 0.5, 1.0) == 16
    assert sparsity_rank((96, 200), 3, 0.5, 2.0) == 8
    assert sparsity_rank((96, 200), 3, 1.0, 1.0) == 1


def test_a_negative_exponent_gives_sparser_matrices_more():
    assert sparsity_rank((96, 200), 3, 0.5, -0.5) == 45  # 32 * sqrt(2)
    assert sparsity_rank((96, 200), 3, 0.9, -2.0) == 96
    assert sparsity_rank((96, 200), 3, 1.0, -1e6) == 96  # neither a division by 0 nor an overflow
    assert choose_rank("sparsity", (96, 200), 3, sparsity=0.9, rho=-2.0) == 32


def test_sparsity_power_rank_by_hand():
    assert sparsity_power_rank((96, 200), 3, 0.5, 1.0) == 16
    assert sparsity_power_rank((96, 200), 3, 0.5, 3.0) == 28
    assert sparsity_power_rank((96, 200), 3, 1.0, 3.0) == sparsity_power_rank((96, 200), 3, 0.3, 0.0) == 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 300), st.floats(-1000, 1000))
def test_shared_ranks_share_all_directions(sparsities, spare, rho):
    short = len(sparsities) + spare
    ranks = shared_ranks((short, short + 5), sparsities, rho)
    assert sum(ranks) == short and min(ranks) >= 1
    by_sparsity = [rank for _, rank in sorted(zip(sparsities, ranks, strict=True), reverse=rho > 0)]
    assert all(a <= b + 1 for a, b in pairwise(by_sparsity))  # monotone, up to what rounding leaves


def test_shared_ranks_by_hand():
    assert shared_ranks((90, 200), [0.5, 0.0, 0.0], 1.0) == [18, 36, 36]
    assert shared_ranks((90, 200), [0.5, 0.0, 0.0], -1.0) == [45, 23, 22]  # 22.5 twice
    assert shared_ranks((10, 9), [0.2, 0.2], 2.0) == [5, 4]
    assert shared_ranks((90, 200), [1.0, 0.0], 1.0) == [1, 89]
    assert shared_ranks((2, 4), [1.0, 0.7], -570.0) == [1, 1] and shared_ranks((9, 4), [1.0, 0.7], -570.0) == [3, 1]
    assert shared_ranks((90, 200), [1.0, 1.0], 1.0) == [45, 45]
    with pytest.raises(ConfigError, match="3 tasks cannot share 2 directions"):
        shared_ranks((2, 9), [0.0] * 3, 1.0)


def test_fractions_of_the_short_side():
    assert asked_rank(0.29, (100, 200), 3) == 29  # 0.29 * 100 is below 29 in floating point
    assert (asked_rank(0.001, (100, 200), 3), asked_rank(0.5, (100, 200), 3)) == (1, 50)
    assert choose_rank(0.5, (100, 200), 3) == rank_limit((100, 200), 3) == 33
    for bad in (1.5, -0.5, 0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="rank"):
            asked_rank(bad, (100, 200), 3)


def test_rules_remember_what_they_asked_for():
    rule = choose_rank("energy", (30, 60), 4, energy=1.0)
    assert rule.asked == 0 and rule(torch.linspace(1.0, 0.1, 30)) == 7 and rule.asked == 30


def test_energy_rank():
    values = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert energy_rank(values, 4 / 6) == 1
    assert energy_rank(values, 0.7) == 2
    assert energy_rank(values, 1.0) == 3
    assert energy_rank(torch.zeros(4), 0.9) == 1


def test_noise_rank_finds_the_signal():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((120, 200))
    signal = sum(60 * np.outer(*(v / np.linalg.norm(v) for v in (rng.standard_normal(120), rng.standard_normal(200))))
                 for _ in range(6))  # fmt: skip
    values = torch.linalg.svdvals(torch.from_numpy(noise + signal))
    assert noise_rank(values, (120, 200)) == 6
    assert noise_rank(torch.linalg.svdvals(torch.from_numpy(noise)), (120, 200)) == 1


def test_choose_rank_never_exceeds_the_share():
    assert choose_rank("fixed", (30, 60), 4, sparsity=0.9) == 7
    assert choose_rank(5, (30, 60), 4) == 5
    assert choose_rank(25, (30, 60), 4) == 7
    assert choose_rank("fixed", (3, 60), 4) == 0
    values = torch.linspace(1.0, 0.1, 30)
    for rule, small in (("energy", {"energy": 0.1}), ("noise", {})):
        chosen = choose_rank(rule, (30, 60), 4, **small)
        assert 1 <= chosen(values) < 7
    assert choose_rank("energy", (30, 60), 4, energy=1.0)(values) == 7
    with pytest.raises(ConfigError, match="rank"):
        choose_rank("guess", (30, 60), 4)
    with pytest.raises(ConfigError, match="rank"):
        choose_rank(0, (30, 60), 4)
