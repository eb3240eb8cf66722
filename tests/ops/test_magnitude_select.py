import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels.errors import BackendUnavailable, ConfigError, DTypeError, NonFiniteError
from r_tsvm_kernels.ops import kept_count, magnitude_select

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def stable_mask(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Sort by magnitude, stable: what `magnitude_select` promises, done the slow way."""
    order = np.argsort(-x.abs().double().numpy(), axis=None, kind="stable")
    mask = np.zeros(x.numel(), dtype=bool)
    mask[order[:keep]] = True
    return torch.from_numpy(mask.reshape(tuple(x.shape)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-3, -1e-3, 6e-8]), min_size=1), data=st.data())
def test_exactly_keep_survive_and_ties_go_by_index(dtype, values, data):
    x = torch.tensor(values, dtype=dtype)
    keep = data.draw(st.integers(0, len(values)))
    mask = magnitude_select(x, keep).mask(x)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, stable_mask(x, keep))


@pytest.mark.parametrize("shape", [(1,), (7, 13), (1, 64), (64, 1), (3, 5, 7), ()], ids=str)
def test_shapes(shape):
    x = torch.randn(shape)
    for keep in {0, 1, x.numel() // 2, x.numel()}:
        assert torch.equal(magnitude_select(x, keep).mask(x), stable_mask(x, keep))


def test_rows_that_are_not_contiguous():
    x = torch.randn(9, 20)[:, ::2]
    assert torch.equal(magnitude_select(x, 31).mask(x), stable_mask(x, 31))
    assert torch.equal(magnitude_select(x.mT, 31).mask(x.mT), stable_mask(x.mT.contiguous(), 31))


def test_subnormals_are_ordered():
    x = torch.tensor([1e-40, -3e-40, 2e-40, 0.0])
    assert magnitude_select(x, 2).mask(x).tolist() == [False, True, True, False]


def test_empty():
    x = torch.empty(0, 4)
    assert magnitude_select(x, 0).mask(x).shape == (0, 4)


def test_what_it_refuses():
    x = torch.ones(4)
    with pytest.raises(ConfigError, match="keep must lie in"):
        magnitude_select(x, 5)
    with pytest.raises(DTypeError):
        magnitude_select(torch.ones(4, dtype=torch.int32), 1)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="1 of 4"):
            magnitude_select(torch.tensor([1.0, bad, 2.0, 3.0]), 2)
    with pytest.raises(BackendUnavailable, match="magnitude_select"):
        magnitude_select(x, 1, backend="abacus")


@pytest.mark.parametrize(
    ("density", "numel", "expected"),
    [(0.07, 100, 7), (0.3, 10, 3), (1.0, 11, 11), (0.0, 11, 0), (1e-9, 10, 1), (0.5, 3, 2), (0.1, 0, 0)],
)
def test_kept_count_is_exact_for_the_number_as_written(density, numel, expected):
    assert kept_count(density, numel) == expected


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_kept_count_refuses(density):
    with pytest.raises(ConfigError, match="density"):
        kept_count(density, 10)
