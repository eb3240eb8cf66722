"""The comparison rule itself can fail."""

import pytest
import torch
from compare import assert_as_accurate, relative_error, same_bits


def test_accepts_rounding_and_rejects_more():
    exact = torch.randn(100, dtype=torch.float64)
    eager = exact.float()
    assert_as_accurate(eager.clone(), eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_as_accurate(eager + 8 * torch.finfo(torch.float32).eps * exact.abs().amax().float(), eager, exact)
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.full_like(eager, torch.nan), eager, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(eager.double(), eager, exact)


def test_rejects_a_baseline_that_would_allow_anything():
    exact = torch.tensor([1e6], dtype=torch.float64)
    overflowed = exact.to(torch.float16)
    with pytest.raises(AssertionError, match="baseline"):
        assert_as_accurate(overflowed, overflowed, exact)


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)


def test_same_bits_sees_the_sign_of_zero():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.0]))
