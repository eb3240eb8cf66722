import math

import numpy as np
import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, SHAPES, VALUES, available, layout_names, torch_threads

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import MagnitudeSelection, kept_count, magnitude_select

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
native_backend = pytest.mark.parametrize("backend", available("cpu"))


def stable_mask(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Sort by magnitude, stable: what `magnitude_select` promises, done the slow way."""
    order = np.argsort(-x.abs().double().numpy(), axis=None, kind="stable")
    mask = np.zeros(x.numel(), dtype=bool)
    mask[order[:keep]] = True
    return torch.from_numpy(mask.reshape(tuple(x.shape)))


def same_selection(first, second):
    return same_bits(first.threshold, second.threshold) and same_bits(first.ties, second.ties)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-3, -1e-3, 6e-8]), min_size=1), data=st.data())
def test_exactly_keep_survive_and_ties_go_by_index(backend, dtype, values, data):
    x = torch.tensor(values, dtype=dtype)
    keep = data.draw(st.integers(0, len(values)))
    mask = magnitude_select(x, keep, backend=backend).mask(x)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, stable_mask(x, keep))


@every_backend
@pytest.mark.parametrize("shape", [(1,), (7, 13), (1, 64), (64, 1), (3, 5, 7), ()], ids=str)
def test_shapes(backend, shape):
    x = torch.randn(shape)
    for keep in {0, 1, x.numel() // 2, x.numel()}:
        assert torch.equal(magnitude_select(x, keep, backend=backend).mask(x), stable_mask(x, keep))


@native_backend
@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=SHAPES.filter(lambda shape: math.prod(shape) > 0),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    layouts=st.lists(layout_names, min_size=2, max_size=2),
    with_base=st.booleans(),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(backend, kind, shape, dtypes, layouts, with_base, density, seed):
    torch.manual_seed(seed)
    base = torch.randn(shape) if with_base and "subnormal" not in kind else torch.zeros(shape)
    x = LAYOUTS[layouts[0]]((base + VALUES[kind](shape)).to(dtypes[0]))
    base = LAYOUTS[layouts[1]](base.to(dtypes[1]))
    arguments = (x, max(1, kept_count(density, x.numel())))
    origin = base if with_base else None
    expected = magnitude_select(*arguments, base=origin, backend="torch")
    assert same_selection(magnitude_select(*arguments, base=origin, backend=backend), expected)


@every_backend
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16)], ids=str)
def test_of_a_difference(backend, dtypes):
    x, base = torch.randn(31, 33).to(dtypes[0]), torch.randn(31, 33).to(dtypes[1])
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    difference = x.to(dtype) - base.to(dtype)
    for keep in (0, 100, 1023):
        selection = magnitude_select(x, keep, base=base, backend=backend)
        assert selection.threshold.dtype == dtype
        assert torch.equal(selection.mask(difference), stable_mask(difference, keep))


@every_backend
@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    with_base=st.booleans(),
    densities=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.5, 0.501, 0.99, 1.0]), max_size=4),
    seed=st.integers(0, 1000),
)
def test_several_at_once_are_those_found_alone(backend, kind, shape, dtype, with_base, densities, seed):
    torch.manual_seed(seed)
    base = torch.randn(shape).to(dtype) if with_base else None
    x = VALUES[kind](shape).to(dtype)
    keep = [kept_count(density, x.numel()) for density in densities]
    several = magnitude_select(x, keep, base=base, backend=backend)
    assert isinstance(several, tuple)
    assert len(several) == len(keep)
    for selection, count in zip(several, keep, strict=True):
        assert same_selection(selection, magnitude_select(x, count, base=base, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold_dtype", DTYPES, ids=str)
@given(values=st.lists(st.sampled_from([0.1, 0.2, 0.3, 1 / 3, 1e-9, 1e30, 0.0]), min_size=1), threshold=st.floats(0))
def test_masks_compare_exactly_whatever_the_dtypes(dtype, threshold_dtype, values, threshold):
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    for limit in (threshold, *values, math.inf):
        selection = MagnitudeSelection(torch.tensor(limit, dtype=torch.float64).to(threshold_dtype), torch.tensor(1))
        exact = MagnitudeSelection(selection.threshold.double(), selection.ties)
        expected = exact.mask(x.double())
        assert torch.equal(selection.mask(x), expected)
        for real in (torch.float32, torch.float64):
            if torch.promote_types(real, dtype) == real:
                rounded = selection.rounded(real)
                assert rounded.threshold.dtype == real
                assert torch.equal(rounded.mask(x), expected)


@native_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_number_of_threads_does_not_matter(backend, dtype, kind):
    x = VALUES[kind]((300, 1001)).to(dtype)
    expected = magnitude_select(x, 70_000, backend="torch")
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert same_selection(magnitude_select(x, 70_000, backend=backend), expected)
            of_difference = magnitude_select(x, 70_000, base=torch.zeros_like(x), backend=backend)
            assert float(of_difference.threshold) == float(expected.threshold)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_16_bit_magnitude_can_be_the_threshold(backend, dtype):
    values = torch.arange(0, 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    for keep in range(1, values.numel(), 997):
        assert magnitude_select(values, keep, backend=backend).threshold == values[-keep]


@every_backend
def test_subnormals_are_ordered(backend):
    x = torch.tensor([1e-40, -3e-40, 2e-40, 0.0])
    assert magnitude_select(x, 2, backend=backend).mask(x).tolist() == [False, True, True, False]


@every_backend
def test_empty(backend):
    x = torch.empty(0, 4)
    assert magnitude_select(x, 0, backend=backend).mask(x).shape == (0, 4)


@every_backend
@pytest.mark.parametrize("keep", [0, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, keep, dtype, bad):
    x = torch.tensor([1.0, bad, 2.0, 3.0], dtype=dtype)
    with pytest.raises(NonFiniteError, match="magnitude_select: 1 of 4"):
        magnitude_select(x, keep, backend=backend)
    with pytest.raises(NonFiniteError, match="magnitude_select: 1 of 4"):
        magnitude_select(torch.zeros(4), keep, base=x, backend=backend)


def test_what_it_refuses():
    x = torch.ones(4)
    with pytest.raises(ConfigError, match="keep must lie in"):
        magnitude_select(x, 5)
    with pytest.raises(ConfigError, match="keep must lie in"):
        magnitude_select(x, [1, -1])
    with pytest.raises(DTypeError):
        magnitude_select(torch.ones(4, dtype=torch.int32), 1)
    with pytest.raises(DTypeError):
        magnitude_select(x, 1, base=torch.ones(4, dtype=torch.int32))
    with pytest.raises(ShapeError):
        magnitude_select(x, 1, base=torch.ones(5))
    with pytest.raises(BackendUnavailableError, match="magnitude_select"):
        magnitude_select(x, 1, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native, base = backends.native(backend), (0, 1, 4, 4, 1)
    with pytest.raises(RuntimeError, match="magnitude_select: the tensors differ in size"):
        native.magnitude_select((0, 1, 5, 5, 1), base, [1], (0,) * 3, 1)
    with pytest.raises(RuntimeError, match="reweight_prune: the tensors differ in size"):
        native.reweight_prune(base, [((0, 1, 5, 5, 1), 1.0, 1, 0, 0)], 1)


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
