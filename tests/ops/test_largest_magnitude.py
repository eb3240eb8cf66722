"""The largest magnitude, by which NaN and infinity are found."""

import math

import pytest
import torch

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.ops import _checks
from r_tsvm_kernels.ops._checks import FLOAT_DTYPES, check_finite, is_finite


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """Run with the native module, and without it."""
    if request.param == "torch":
        monkeypatch.setattr(_checks.backends, "state", lambda name: "not built")
    elif backends.state("cpu") != backends.READY:
        pytest.skip(reason="the native module was not built")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 31, 4099, 70_001])
def test_it_is_that_of_torch(path, dtype, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert check_finite(values, "x") == float(values.abs().max())
    for place in {0, size // 2, size - 1}:
        for wrong in (math.nan, -math.nan, math.inf, -math.inf):
            damaged = values.clone()
            damaged[place] = wrong
            assert not is_finite(damaged)
            with pytest.raises(NonFiniteError, match=f"x: 1 of {size}"):
                check_finite(damaged, "x")
        values[place] = -torch.finfo(dtype).max
        assert check_finite(values, "x") == torch.finfo(dtype).max


def test_infinity_does_not_hide_nan(path):
    values = torch.tensor([math.inf, math.nan, -math.inf])
    assert math.isnan(_checks._largest_magnitude(values))


def test_any_layout(path):
    values = torch.arange(-600.0, 600.0).reshape(30, 40)
    views = [values[3:, 5:7], values.T, values[::2, ::3], values.expand(2, 30, 40), values[:0], values[0, 0]]
    assert [check_finite(view, "x") for view in views] == [float(v.abs().max()) if v.numel() else 0.0 for v in views]
    unaligned = torch.frombuffer(bytearray(b"\0" + values.numpy().tobytes()), dtype=torch.float32, offset=1)
    assert check_finite(unaligned, "x") == 600
    negated = torch.view_as_complex(torch.ones(5, 2)).conj().imag
    assert negated.is_neg() and check_finite(negated, "x") == 1
