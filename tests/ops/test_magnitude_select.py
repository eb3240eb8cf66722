import math

import numpy as np
import pytest
import torch
from cases import check, check_on_another_stream
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    BEYOND_32_BITS,
    DTYPES,
    LAYOUTS,
    VALUES,
    every_backend,
    every_dtype,
    every_model_shape,
    large,
    layout_names,
    on_devices,
    shapes,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import MagnitudeSelection, kept_count, magnitude_select

native_backend = some_backends(magnitude_select, "cpu")
interpreted = some_backends(magnitude_select, "triton interpreted")


def stable_mask(x: torch.Tensor, keep: int) -> torch.Tensor:
    """Sort by magnitude, stable: what `magnitude_select` promises, done the slow way."""
    order = np.argsort(-x.abs().double().cpu().numpy(), axis=None, kind="stable")
    mask = np.zeros(x.numel(), dtype=bool)
    mask[order[:keep]] = True
    return torch.from_numpy(mask.reshape(tuple(x.shape))).to(x.device)


def same_selection(first, second):
    return same_bits(first.threshold, second.threshold) and same_bits(first.ties, second.ties)


def same_selections(first, second):
    return len(first) == len(second) and all(map(same_selection, first, second))


@every_backend(magnitude_select, reference=False)
def test_cases(backend):
    check(magnitude_select, backend)


@every_backend(magnitude_select)
@every_dtype
@given(values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 1e-3, -1e-3, 6e-8]), min_size=1), data=st.data())
def test_exactly_keep_survive_and_ties_go_by_index(backend, dtype, values, data):
    x = torch.tensor(values, dtype=dtype)
    keep = data.draw(st.integers(0, len(values)))
    mask = magnitude_select(x, keep, backend=backend).mask(x)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, stable_mask(x, keep))


@every_backend(magnitude_select)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (1, 64), (64, 1), (3, 5, 7), ()], ids=str)
def test_shapes(backend, shape):
    x = torch.randn(shape)
    for keep in {0, 1, x.numel() // 2, x.numel()}:
        assert torch.equal(magnitude_select(x, keep, backend=backend).mask(x), stable_mask(x, keep))


@every_backend(magnitude_select, reference=False)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(VALUES)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=2),
    layouts=st.lists(layout_names, min_size=2, max_size=2),
    with_base=st.booleans(),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(backend, data, kind, dtypes, layouts, with_base, density, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend).filter(lambda shape: math.prod(shape) > 0))
    base = torch.randn(shape) if with_base and "subnormal" not in kind else torch.zeros(shape)
    x = LAYOUTS[layouts[0]]((base + VALUES[kind](shape)).to(dtypes[0]))
    base = LAYOUTS[layouts[1]](base.to(dtypes[1]))
    arguments = (x, max(1, kept_count(density, x.numel())))
    origin = base if with_base else None
    expected = magnitude_select(*arguments, base=origin, backend="torch")
    assert same_selection(magnitude_select(*arguments, base=origin, backend=backend), expected)


@every_backend(magnitude_select)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float16)], ids=str)
def test_of_a_difference(backend, dtypes):
    x, base = torch.randn(31, 33).to(dtypes[0]), torch.randn(31, 33).to(dtypes[1])
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    difference = x.to(dtype) - base.to(dtype)
    for keep in (0, 100, 1023):
        selection = magnitude_select(x, keep, base=base, backend=backend)
        assert selection.threshold.dtype == dtype
        assert torch.equal(selection.mask(difference), stable_mask(difference, keep))


@every_backend(magnitude_select)
@given(
    data=st.data(),
    kind=st.sampled_from(sorted(VALUES)),
    dtype=st.sampled_from(DTYPES),
    with_base=st.booleans(),
    densities=st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.5, 0.501, 0.99, 1.0]), max_size=4),
    seed=st.integers(0, 1000),
)
def test_several_at_once_are_those_found_alone(backend, data, kind, dtype, with_base, densities, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base = torch.randn(shape).to(dtype) if with_base else None
    x = VALUES[kind](shape).to(dtype)
    keep = [kept_count(density, x.numel()) for density in densities]
    several = magnitude_select(x, keep, base=base, backend=backend)
    assert isinstance(several, tuple)
    assert len(several) == len(keep)
    for selection, count in zip(several, keep, strict=True):
        assert same_selection(selection, magnitude_select(x, count, base=base, backend="torch"))


@every_dtype
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
@every_dtype
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_number_of_threads_does_not_matter(backend, dtype, kind):
    x = VALUES[kind]((300, 1001)).to(dtype)
    expected = magnitude_select(x, 70_000, backend="torch")
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert same_selection(magnitude_select(x, 70_000, backend=backend), expected)
            of_difference = magnitude_select(x, 70_000, base=torch.zeros_like(x), backend=backend)
            assert float(of_difference.threshold) == float(expected.threshold)


def every_finite_16_bit_value(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@some_backends(magnitude_select, "torch", "cpu", "triton device", "cuda device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_16_bit_magnitude_can_be_the_threshold(backend, dtype):
    values = every_finite_16_bit_value(dtype).abs().sort().values[::2]
    for keep in range(1, values.numel(), 997):
        assert magnitude_select(values, keep, backend=backend).threshold == values[-keep]


@every_backend(magnitude_select, reference=False)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_selection_from_every_16_bit_value(backend, dtype, monkeypatch):
    """The CUDA kernel counts by all bits at once, or by digits where a block has too little shared memory for that."""
    if simulated(backend) and backend == "triton":
        monkeypatch.setattr(magnitude_select.triton_kernel, "BLOCK", 16384)
    values = every_finite_16_bit_value(dtype)
    values = values[torch.randperm(values.numel())]
    for shared in (227, 99) if simulated(backend) and backend == "cuda" else (0,):
        monkeypatch.setenv("CUDA_ON_CPU_SHARED", str(1024 * shared))
        for x in (values, values[1:]):
            keep = [1, 777, 20_001, x.numel() - 1, x.numel(), 0]
            assert same_selections(*(magnitude_select(x, keep, backend=which) for which in (backend, "torch")))


@every_backend(magnitude_select)
def test_subnormals_are_ordered(backend):
    x = torch.tensor([1e-40, -3e-40, 2e-40, 0.0])
    assert magnitude_select(x, 2, backend=backend).mask(x).tolist() == [False, True, True, False]


@every_backend(magnitude_select)
def test_empty(backend):
    x = torch.empty(0, 4)
    assert magnitude_select(x, 0, backend=backend).mask(x).shape == (0, 4)


@every_backend(magnitude_select)
@every_dtype
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, dtype, bad):
    size = 300 if backend == "triton" else 3000  # blocks of 128, slices of 1024
    for some in ([1], [7, -1]):
        x = torch.randn(size).to(dtype)
        x[some] = bad
        for keep in (0, [5, 10]) if simulated(backend) else (0, 2, size, [5, 10]):
            with pytest.raises(NonFiniteError, match=f"magnitude_select: {len(some)} of {size}"):
                magnitude_select(x, keep, backend=backend)
            with pytest.raises(NonFiniteError, match=f"magnitude_select: {len(some)} of {size}"):
                magnitude_select(torch.zeros(size), keep, base=x, backend=backend)


@every_backend(magnitude_select)
def test_what_it_refuses(backend):
    x = torch.ones(4)
    with pytest.raises(ConfigError, match="keep must be in"):
        magnitude_select(x, 5, backend=backend)
    with pytest.raises(ConfigError, match="keep must be in"):
        magnitude_select(x, [1, -1], backend=backend)
    for fraction in (0.5, 1.0, [0.5]):
        with pytest.raises(ConfigError, match=r"keep is a count, got .*; use kept_count"):
            magnitude_select(x, fraction, backend=backend)
    with pytest.raises(DTypeError):
        magnitude_select(torch.ones(4, dtype=torch.int32), 1, backend=backend)
    with pytest.raises(DTypeError):
        magnitude_select(x, 1, base=torch.ones(4, dtype=torch.int32), backend=backend)
    with pytest.raises(ShapeError):
        magnitude_select(x, 1, base=torch.ones(5), backend=backend)
    with pytest.raises(BackendUnavailableError, match="magnitude_select"):
        magnitude_select(x, 1, backend="abacus")


@interpreted
def test_small_and_large_blocks_agree(backend, monkeypatch):
    x = torch.randn(9000)
    small = magnitude_select(x, 1234, backend=backend)
    monkeypatch.undo()  # the fixture's small blocks
    assert same_selections([small], [magnitude_select(x, 1234, backend=backend)])
    assert same_selections([small], [magnitude_select(x, 1234, backend="torch")])


@interpreted
@pytest.mark.parametrize(("count", "expected"), [(1, 3), (2, 3), (3, 6), (5, 9)])
def test_selections_share_the_passes(backend, count, expected, monkeypatch):
    passes, kernel = [], magnitude_select.triton_kernel
    whole = kernel.count_digits
    monkeypatch.setattr(kernel, "count_digits", lambda *arguments: passes.append(1) or whole(*arguments))
    magnitude_select(torch.randn(300), [3, 100, 100, 299, 7][:count], base=torch.randn(300), backend=backend)
    assert len(passes) == expected


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


@on_devices(magnitude_select)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base = 0.02 * torch.randn(shape)
    x, base = (base + 1e-3 * torch.randn(shape)).to(dtype), base.to(dtype)
    keep = sorted({1, kept_count(0.3, x.numel()), x.numel()})
    for origin in (None, base):
        mine, expected = (magnitude_select(x, keep, base=origin, backend=which) for which in (backend, "torch"))
        assert same_selections(mine, expected)


@on_devices(magnitude_select)
def test_on_another_stream(backend):
    check_on_another_stream(
        magnitude_select, backend, lambda base, x, which: magnitude_select(x, 777, base=base, backend=which)
    )


@large
@on_devices(magnitude_select)
def test_more_elements_than_a_32_bit_index_counts(backend):
    x = torch.zeros(BEYOND_32_BITS, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    selection = magnitude_select(x, 2, backend=backend)
    assert (float(selection.threshold), int(selection.ties)) == (2.0, 1)
