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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(
    "one",
    [lambda x: x[::2][:1], lambda x: x[None, :, None][:, 1:2], lambda x: x.expand(5, 3)[4:, 1:2], lambda x: x[1]],
    ids=["every second", "three dimensions", "expanded", "scalar"],
)
def test_same_bits_of_one_element_with_any_strides(dtype, one):
    x, other = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([0, 1, 0]).to(dtype)
    assert same_bits(one(x), one(x).clone()) and same_bits(one(x).clone(), one(x))
    assert not same_bits(one(x), one(other)) and not same_bits(one(other).clone(), one(x))


def test_same_bits_of_strided_tensors():
    x = torch.randn(4, 6)
    assert same_bits(x.mT, x.mT.contiguous()) and same_bits(x[:, ::2], x[:, ::2].clone())
    assert not same_bits(x[:, ::2], x[:, 1::2]) and same_bits(x[:0], x[:0].clone())
