import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, SHAPES, VALUES, available, layout_names, torch_threads

from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.ops import accumulation_dtype, magnitude_histogram

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
native_backend = pytest.mark.parametrize("backend", available("cpu"))


def patterns(x: torch.Tensor) -> tuple[list[int], int]:
    """Return the bit pattern of each magnitude, and how many bits a pattern has."""
    values = x.to(accumulation_dtype(x)).numpy().reshape(-1)
    integer, bits = (np.uint64, 63) if values.dtype == np.float64 else (np.uint32, 31)
    return [int(word) & (2**bits - 1) for word in values.view(integer)], bits


def counted(x, bits, prefix=0, prefix_bits=0):
    words, total = patterns(x)
    counts = [0] * 2**bits
    for word in words:
        text = f"{word:0{total}b}"
        if int("0" + text[:prefix_bits], 2) == prefix:
            counts[int(text[prefix_bits : prefix_bits + bits], 2)] += 1
    return counts


@every_backend
@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    bits=st.integers(1, 11),
    data=st.data(),
)
def test_equals_counting_the_written_out_bits(backend, kind, shape, dtype, bits, data):
    x = VALUES[kind](shape).to(dtype) if shape else torch.tensor(-0.75, dtype=dtype)
    words, total = patterns(x)
    prefix_bits = data.draw(st.integers(0, total - bits))
    # The prefix of an element, so that something is counted.
    prefix = data.draw(st.sampled_from(words)) >> (total - prefix_bits) if words else 0
    got = magnitude_histogram(x, bits, prefix=prefix, prefix_bits=prefix_bits, backend=backend)
    assert got.dtype == torch.int64
    assert got.tolist() == counted(x, bits, prefix, prefix_bits)


@every_backend
@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=SHAPES,
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    layouts=st.lists(layout_names, min_size=2, max_size=2),
    prefix_bits=st.sampled_from([0, 8, 9, 20]),
    seed=st.integers(0, 1000),
)
def test_of_a_difference_in_any_layout(backend, kind, shape, dtypes, layouts, prefix_bits, seed):
    torch.manual_seed(seed)
    base = torch.randn(shape)
    x, base = (base + VALUES[kind](shape)).to(dtypes[0]), base.to(dtypes[1])
    dtype = accumulation_dtype(x, base)
    difference = x.to(dtype) - base.to(dtype)
    prefix = 0
    if difference.numel() > 0:
        word, total = patterns(difference.flatten()[:1])
        prefix = word[0] >> (total - prefix_bits)
    options = {"prefix": prefix, "prefix_bits": prefix_bits, "backend": backend}
    got = magnitude_histogram(LAYOUTS[layouts[0]](x), 11, base=LAYOUTS[layouts[1]](base), **options)
    assert torch.equal(got, magnitude_histogram(difference, 11, **{**options, "backend": "torch"}))


@native_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_number_of_threads_does_not_matter(backend, dtype, kind):
    x = VALUES[kind]((300, 1001)).to(dtype)
    base = torch.zeros_like(x)
    for options in ({}, {"prefix": 0x3E8 >> 3, "prefix_bits": 8}, {"base": base}):
        expected = magnitude_histogram(x, 10, backend="torch", **options)
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert torch.equal(magnitude_histogram(x, 10, backend=backend, **options), expected)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_and_nan_are_counted_in_the_last_exponent(backend, dtype):
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, torch.finfo(dtype).max, 0.0, -0.0], dtype=dtype)
    exponent_bits = 11 if dtype == torch.float64 else 8
    counts = magnitude_histogram(x, exponent_bits, backend=backend)
    assert counts[-1] == 4
    assert counts[0] == 2
    largest = magnitude_histogram(x, 11, prefix=2**exponent_bits - 1, prefix_bits=exponent_bits, backend=backend)
    assert largest[0] == 2
    assert int(largest.sum()) == 4


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_digits_down_to_the_last_bit(backend, dtype):
    """The whole pattern is found again, digit by digit, of a subnormal and of the largest number."""
    total = 63 if dtype == torch.float64 else 31
    for value in (5 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.finfo(dtype).max):
        x = torch.tensor([value, -value], dtype=dtype)
        prefix = prefix_bits = 0
        while prefix_bits < total:
            bits = min(7, total - prefix_bits)
            counts = magnitude_histogram(x, bits, prefix=prefix, prefix_bits=prefix_bits, backend=backend)
            assert int(counts.max()) == 2
            prefix, prefix_bits = (prefix << bits) + int(counts.argmax()), prefix_bits + bits
        assert prefix == patterns(x)[0][0]


def test_what_it_refuses():
    x = torch.ones(4)
    for bits in (0, 12):
        with pytest.raises(ConfigError, match="bits must lie"):
            magnitude_histogram(x, bits)
    for prefix_bits in (-1, 21):
        with pytest.raises(ConfigError, match="prefix_bits must lie in"):
            magnitude_histogram(x, 11, prefix_bits=prefix_bits)
    assert magnitude_histogram(x.double(), 11, prefix_bits=21).sum() == 0
    with pytest.raises(ConfigError, match="prefix_bits must lie in"):
        magnitude_histogram(x.double(), 11, prefix_bits=53)
    for prefix in (-1, 8):
        with pytest.raises(ConfigError, match="prefix must lie in"):
            magnitude_histogram(x, 11, prefix=prefix, prefix_bits=3)
    with pytest.raises(DTypeError):
        magnitude_histogram(x.int(), 1)
    with pytest.raises(DTypeError):
        magnitude_histogram(x, 1, base=x.int())
    with pytest.raises(ShapeError):
        magnitude_histogram(x, 1, base=torch.ones(5))
    with pytest.raises(BackendUnavailableError, match="magnitude_histogram"):
        magnitude_histogram(x, 1, backend="abacus")
