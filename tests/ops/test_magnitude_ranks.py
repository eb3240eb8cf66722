import math

import numpy as np
import pytest
import torch
from cases import check, check_on_another_stream
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    DTYPES,
    LAYOUTS,
    VALUES,
    every_backend,
    every_dtype,
    every_model_shape,
    large,
    layout_names,
    on_devices,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import magnitude_ranks, magnitude_select

native_backend = some_backends(magnitude_ranks, "cpu")

# Rows of few elements, and of more than one byte and 16 bits can count.
ROWS = st.one_of(st.integers(0, 70), st.sampled_from([255, 256, 257, 2049, 65535, 65537]))
SHAPES = st.one_of(ROWS.map(lambda n: (n,)), st.lists(st.integers(0, 40), min_size=2, max_size=3).map(tuple))


def shapes(backend):
    """Triton's interpreter sorts slowly, and in the emulator every row is a block, even a short one."""
    if not simulated(backend):
        return SHAPES
    long = st.sampled_from([63, 64, 65, 300, 4097]).map(lambda n: (n,))
    return st.one_of(long, st.tuples(st.integers(0, 3), st.integers(0, 33)))


def sorted_ranks(x: torch.Tensor) -> torch.Tensor:
    """Order by magnitude, then by falling index, and number; done the slow way."""
    magnitude = x.abs().double().cpu().numpy().reshape(-1, x.shape[-1])
    ranks = np.empty(magnitude.shape, dtype=np.int32)
    for row, values in enumerate(magnitude):
        for rank, col in enumerate(sorted(range(len(values)), key=lambda i: (values[i], -i))):
            ranks[row, col] = rank
    return torch.from_numpy(ranks.reshape(tuple(x.shape))).to(x.device)


@every_backend(magnitude_ranks)
@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
)
def test_equals_sorting(backend, kind, shape, dtype):
    if simulated(backend):
        shape = (*(min(size, 2) for size in shape[:-1]), shape[-1])
    x = VALUES[kind](shape).to(dtype)
    assert same_bits(magnitude_ranks(x, backend=backend), sorted_ranks(x))


@every_backend(magnitude_ranks, reference=False)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(VALUES)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    layouts=st.lists(layout_names, min_size=2, max_size=2),
    with_base=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(backend, data, kind, dtypes, layouts, with_base, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base = torch.randn(shape) if with_base and "subnormal" not in kind else torch.zeros(shape)
    x = LAYOUTS[layouts[0]]((base + VALUES[kind](shape)).to(dtypes[0]))
    base = LAYOUTS[layouts[1]](base.to(dtypes[1])) if with_base else None
    got = magnitude_ranks(x, base=base, backend=backend)
    assert got.is_contiguous()
    assert same_bits(got, magnitude_ranks(x, base=base, backend="torch"))


@every_backend(magnitude_ranks)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16)], ids=str)
def test_of_a_difference(backend, dtypes):
    x, base = torch.randn(31, 33).to(dtypes[0]), torch.randn(31, 33).to(dtypes[1])
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    assert same_bits(magnitude_ranks(x, base=base, backend=backend), sorted_ranks(x.to(dtype) - base.to(dtype)))


@every_backend(magnitude_ranks)
@every_dtype
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_select_in_each_row_like_magnitude_select(backend, kind, dtype):
    x = VALUES[kind]((5, 70)).to(dtype)
    ranks = magnitude_ranks(x, backend=backend)
    for keep in (0, 1, 35, 70):
        rows = [magnitude_select(row, keep, backend="torch").mask(row) for row in x]
        assert torch.equal(ranks >= 70 - keep, torch.stack(rows))


@every_backend(magnitude_ranks)
def test_by_hand(backend):
    x = torch.tensor([[3.0, -3.0, 0.0, -0.0, 1.0], [-0.0, 0.0, 0.0, -0.0, 0.0], [1e-45, -3e-45, 0.0, 1e-38, -2e38]])
    assert magnitude_ranks(x, backend=backend).tolist() == [[4, 3, 1, 0, 2], [4, 3, 2, 1, 0], [1, 2, 0, 3, 4]]


@every_backend(magnitude_ranks)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_16_bit_magnitude(backend, dtype):
    values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    order = torch.randperm(len(values))
    assert torch.equal(magnitude_ranks(-values[order], backend=backend).long(), order)


@native_backend
@every_dtype
@pytest.mark.parametrize("shape", [(300, 1001), (100_000, 3), (2, 70_001), (301, 64), (299, 65)], ids=str)
def test_number_of_threads_does_not_matter(backend, dtype, shape):
    x = torch.randn(shape).to(dtype)
    base = (x.double() + 0.01 * torch.randint(-3, 4, shape)).to(dtype)
    for origin in (None, base):
        expected = magnitude_ranks(x, base=origin, backend="torch")
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert same_bits(magnitude_ranks(x, base=origin, backend=backend), expected)


@every_backend(magnitude_ranks)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
def test_empty(backend, shape):
    assert same_bits(magnitude_ranks(torch.empty(shape), backend=backend), torch.empty(shape, dtype=torch.int32))


@every_backend(magnitude_ranks)
@pytest.mark.parametrize("cols", [4, 300])
@every_dtype
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, cols, dtype, bad):
    x = torch.ones(3, cols, dtype=dtype)
    x[1, 2] = x[2, 0] = bad
    with pytest.raises(NonFiniteError, match=f"magnitude_ranks: 2 of {3 * cols}"):
        magnitude_ranks(x, backend=backend)
    with pytest.raises(NonFiniteError, match=f"magnitude_ranks: 2 of {3 * cols}"):
        magnitude_ranks(torch.zeros(3, cols), base=x, backend=backend)


def test_what_it_refuses():
    x = torch.ones(4)
    with pytest.raises(ShapeError, match="shape"):
        magnitude_ranks(torch.tensor(1.0))
    with pytest.raises(ShapeError, match="rows of less"):
        magnitude_ranks(torch.ones(1).expand(2**31))
    with pytest.raises(DTypeError):
        magnitude_ranks(x.int())
    with pytest.raises(DTypeError):
        magnitude_ranks(x, base=x.int())
    with pytest.raises(ShapeError):
        magnitude_ranks(x, base=torch.ones(2, 2))
    with pytest.raises(BackendUnavailableError, match="magnitude_ranks"):
        magnitude_ranks(x, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native, x = backends.native(backend), (0, 1, 4, 4, 1)
    for cols in (0, 3):
        with pytest.raises(RuntimeError, match="magnitude_ranks: not whole rows"):
            native.magnitude_ranks(x, None, cols, (0, 0), 1)
    with pytest.raises(RuntimeError, match="magnitude_ranks: the tensors differ in size"):
        native.magnitude_ranks(x, (0, 1, 5, 5, 1), 4, (0, 0), 1)


@every_backend(magnitude_ranks, reference=False)
def test_cases(backend):
    check(magnitude_ranks, backend)


@every_backend(magnitude_ranks, reference=False)
@every_dtype
@pytest.mark.parametrize("cols", [511, 4097, 20_000])
def test_long_rows_with_ties(backend, dtype, cols):
    """20,000 columns do not fit into the shared memory of a GPU."""
    x = torch.randn(20, cols).to(dtype)
    x[:, ::7] = 0.5
    assert same_bits(*(magnitude_ranks(x, backend=which) for which in (backend, "torch")))


@on_devices(magnitude_ranks)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base, x = 0.02 * torch.randn(shape), 1e-3 * torch.randn(shape)
    base, x = base.to(dtype), (base + x).to(dtype)
    for origin in (None, base):
        assert same_bits(*(magnitude_ranks(x, base=origin, backend=which) for which in (backend, "torch")))


@on_devices(magnitude_ranks)
def test_on_another_stream(backend):
    check_on_another_stream(
        magnitude_ranks, backend, lambda base, x, which: magnitude_ranks(x, base=base, backend=which)
    )


@large
@on_devices(magnitude_ranks)
def test_more_elements_than_a_32_bit_index_counts(backend):
    x = torch.zeros(2**19 + 2, 4096, dtype=torch.bfloat16)
    x[-1] = torch.randn(4096)
    assert torch.equal(magnitude_ranks(x, backend=backend)[-2:], magnitude_ranks(x[-2:], backend="torch"))
