import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg import choose_rank, energy_rank, fixed_rank, noise_rank, sparsity_rank


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
