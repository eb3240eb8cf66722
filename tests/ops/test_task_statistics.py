"""Every implementation against sums in extended precision by numpy; the native ones also to the bit where promised."""

import math

import numpy as np
import pytest
import torch
from cases import check as check_cases
from cases import check_on_another_stream
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    BEYOND_32_BITS,
    DTYPES,
    LAYOUTS,
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
from r_tsvm_kernels.errors import ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.ops._native import matrix, with_rows
from r_tsvm_kernels.ops.task_statistics import task_statistics

FIELDS = ["mean", "sd", "max", "zeros", "theta", "outlier_mass", "small"]


native_backend = some_backends(task_statistics, "cpu")


def measure(backend, base, tuned, sigma=3.0, eps=0.1):
    """Return the statistics as numpy arrays."""
    result = task_statistics(base, tuned, sigma=sigma, eps=eps, backend=backend)
    assert result.numel == base.numel()
    for field in FIELDS:
        tensor = getattr(result, field)
        assert tensor.shape == (len(tuned),)
        assert tensor.device == base.device
        assert tensor.dtype == (torch.int64 if field in ("zeros", "small") else torch.float64)
    return {field: getattr(result, field).cpu().numpy() for field in FIELDS}


def magnitudes(base, tuned):
    in_float64 = torch.float64 in {t.dtype for t in [base, *tuned]}
    dtype = np.float64 if in_float64 else np.float32
    # Through float64, which holds every input exactly: numpy has no bfloat16.
    origin = base.cpu().double().numpy().astype(dtype)
    return [np.abs(t.cpu().double().numpy().astype(dtype) - origin).astype(np.float64) for t in tuned]


def assert_correct(got, base, tuned, sigma=3.0, eps=0.1):
    """Thresholds are checked against mean and sd, and counts against the thresholds, so that no tie can fail a test."""
    for task, a in enumerate(magnitudes(base, tuned)):
        mean, sd, largest, zeros, theta, mass, small = (got[field][task] for field in FIELDS)
        if a.size == 0:
            assert (mean, sd, largest, zeros, theta, mass, small) == (0,) * 7
            continue
        exact = a.astype(np.longdouble)
        total = exact.sum()
        deviation = np.sqrt(np.square(exact - total / a.size).sum() / a.size)
        assert largest == a.max()
        assert zeros == (a == 0).sum()
        assert mean == pytest.approx(float(total / a.size), rel=1e-12, abs=0)
        assert sd == pytest.approx(float(deviation), rel=1e-11, abs=1e-14 * largest)
        assert theta == (math.inf if math.isinf(sigma) else mean + sigma * sd)
        assert mass == pytest.approx(float(exact[a > theta].sum() / total) if total > 0 else 0.0, rel=1e-12, abs=0)
        assert small == (a <= eps * mean).sum()


def check(backend, base, tuned, sigma=3.0, eps=0.1):
    got = measure(backend, base, tuned, sigma, eps)
    assert_correct(got, base, tuned, sigma, eps)
    return got


def pair(*shape, tasks=1, dtype=torch.float32, scale=0.05):
    base = torch.randn(shape).to(dtype)
    return base, [(base.double() + scale * torch.randn(shape)).to(dtype) for _ in range(tasks)]


@every_backend(task_statistics, reference=False)
def test_cases(backend):
    check_cases(task_statistics, backend)


@every_backend(task_statistics)
@given(
    data=st.data(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    layouts=st.lists(layout_names, min_size=4, max_size=4),
    scale=st.sampled_from([1e-6, 0.05, 100.0]),
    sigma=st.sampled_from([0.0, 0.5, 3.0, math.inf]),
    eps=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_dtype_and_layout(backend, data, dtypes, layouts, scale, sigma, eps, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    origin = torch.randn(shape)
    values = [origin, *(origin + scale * torch.randn(shape) for _ in dtypes[1:])]
    tensors = [LAYOUTS[how](v.to(dtype)) for v, dtype, how in zip(values, dtypes, layouts, strict=False)]
    check(backend, tensors[0], tensors[1:], sigma, eps)


@every_backend(task_statistics)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 5), (), (1,), (1, 1, 1)])
@every_dtype
def test_nothing_and_single_elements(backend, shape, dtype):
    check(backend, *pair(*shape, tasks=2, dtype=dtype))


@every_backend(task_statistics)
@pytest.mark.parametrize("tasks", [1, 8, 9, 17])
def test_number_of_tasks(backend, tasks):
    check(backend, *pair(37, 113, tasks=tasks, dtype=torch.bfloat16))


@every_backend(task_statistics)
@pytest.mark.parametrize("size", [7, 300, 5000, 70001])
def test_equal_magnitudes(backend, size):
    if simulated(backend) and size > 5000:
        size = 1001
    base = torch.zeros(size)
    tuned = torch.full((size,), 0.1)
    tuned[::3] = -0.1
    got = check(backend, base, [tuned])
    assert got["sd"][0] <= 1e-14
    assert got["zeros"][0] == got["small"][0] == 0


@every_backend(task_statistics)
def test_equal_tensors_and_negative_zero(backend):
    base = torch.zeros(3000, dtype=torch.bfloat16)
    got = check(backend, base, [base.clone(), -base, torch.full_like(base, 1.0)])
    assert got["zeros"].tolist() == [3000, 3000, 0]
    assert got["small"].tolist() == [3000, 3000, 0]
    assert got["outlier_mass"].tolist() == [0.0, 0.0, 0.0]
    assert not np.signbit([got["mean"], got["max"], got["outlier_mass"]]).any()


@every_backend(task_statistics)
@every_dtype
def test_heavy_tails(backend, dtype):
    size = 2000 if simulated(backend) else 50_000
    base = torch.zeros(size, dtype=dtype)
    exponent = torch.rand(size) * 6 - 4
    got = check(backend, base, [(10**exponent).to(dtype)], sigma=2.0)
    assert got["outlier_mass"][0] > 0.1


@every_backend(task_statistics)
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2.0**-149), (torch.float16, 2.0**-24)])
def test_subnormals(backend, dtype, unit):
    steps = torch.arange(-500, 500, dtype=torch.float64)
    got = check(backend, torch.zeros(1000, dtype=dtype), [(steps * unit).to(dtype)], sigma=1.0)
    assert got["max"][0] == 500 * unit
    assert got["zeros"][0] == 1


@every_backend(task_statistics)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16),
                                    (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64)])  # fmt: skip
def test_mixed_dtypes(backend, dtypes):
    base, tuned = pair(61, 67, tasks=2)
    check(backend, base.to(dtypes[0]), [tuned[0].to(dtypes[1]), tuned[1].to(dtypes[0])])


@every_backend(task_statistics)
def test_thresholds_between_two_float32_values_are_not_rounded(backend):
    tuned = torch.ones(5000)
    tuned[77] = 1 - 2.0**-24
    # The mean is 1 - 1e-11: the nearest float32 is 1.0, and every 1.0 is above the mean.
    got = check(backend, torch.zeros(5000), [tuned], sigma=0.0, eps=1.0)
    assert got["small"][0] == 1
    assert got["outlier_mass"][0] > 0.999


@every_backend(task_statistics)
def test_float64_is_not_rounded(backend):
    base = torch.ones(5000, dtype=torch.float64)
    got = check(backend, base, [base + 1e-12 * torch.rand(5000, dtype=torch.float64)])
    assert 0 < got["mean"][0] < 1e-12


@every_backend(task_statistics)
def test_float64_that_overflows(backend):
    base = torch.zeros(4100, dtype=torch.float64)
    # Squares overflow in the first task, already the sum in the second.
    got = measure(backend, base, [base + 1e200, base + 1e306])
    assert got["mean"].tolist() == [pytest.approx(1e200), math.inf]
    assert got["max"].tolist() == [1e200, 1e306]
    assert got["sd"][1] == math.inf


@every_backend(task_statistics)
@pytest.mark.parametrize("sigma", [3.0, 0.0, math.inf])
@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_nan_and_infinity(backend, sigma, eps):
    base, tuned = pair(5000, tasks=5)
    tuned[0][4321] = math.nan
    tuned[1][17] = -math.inf
    tuned[2][17], tuned[2][4999] = math.inf, math.nan
    tuned[4][:] = math.nan
    got = measure(backend, base, tuned, sigma, eps)
    theta = math.inf if math.isinf(sigma) else math.nan
    for task in (0, 2, 4):
        assert np.isnan([got[field][task] for field in ("mean", "sd", "max", "outlier_mass")]).all()
        assert (got["zeros"][task], got["small"][task]) == (0, 0)
        np.testing.assert_equal(got["theta"][task], theta)
    infinite = {field: got[field][1] for field in FIELDS}
    small = 5000 if eps else 0  # 0 * inf is NaN, and nothing is below that
    expected = {"mean": math.inf, "sd": math.nan, "max": math.inf, "zeros": 0, "theta": theta, "outlier_mass": 0.0}
    np.testing.assert_equal(infinite, {**expected, "small": small})
    assert_correct({field: got[field][3:4] for field in FIELDS}, base, tuned[3:4], sigma, eps)


@native_backend
@every_dtype
@pytest.mark.parametrize("how", [how for how in LAYOUTS if how != "contiguous"])
def test_layout_does_not_change_a_bit(backend, dtype, how):
    base, tuned = pair(23, 1789, tasks=2, dtype=dtype)
    strided = measure(backend, LAYOUTS[how](base), [LAYOUTS[how](t) for t in tuned])
    mixed = measure(backend, base, [LAYOUTS[how](t) for t in tuned])
    expected = measure(backend, base, tuned)
    for field in FIELDS:
        assert expected[field].tobytes() == strided[field].tobytes() == mixed[field].tobytes()


@native_backend
@pytest.mark.parametrize(("size", "tasks"), [(300_001, 3), (40_000, 8), (1_000_003, 1)])
def test_number_of_threads_does_not_change_a_bit(backend, size, tasks):
    base, tuned = pair(size, tasks=tasks, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3, 16):
        with torch_threads(threads):
            results.append(measure(backend, base, tuned))
    for other in results[1:]:
        assert all(results[0][field].tobytes() == other[field].tobytes() for field in FIELDS)
    assert_correct(results[0], base, tuned)


@native_backend
@pytest.mark.parametrize("sigma", [0.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0, 5.0])
def test_limits_that_a_sample_finds(backend, sigma, eps):
    """Large enough for a sample, with more elements between its brackets than a list holds, and with fewer."""
    base, tuned = pair(300_000, tasks=2)
    rounded, (coarse,) = pair(300_000, dtype=torch.bfloat16, scale=1e-3)
    check(backend, base, [*tuned, base + torch.rand(300_000)], sigma, eps)
    check(backend, rounded, [coarse, rounded], sigma, eps)


@native_backend
@pytest.mark.parametrize("first", [0, 150_000, 299_000])
@pytest.mark.parametrize("size", [16, 1_000, 100_000])
@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e6])
def test_what_the_sample_does_not_show(backend, first, size, factor):
    """A stretch with other values than the rest moves mean and deviation out of the sample's brackets."""
    tuned = torch.randn(300_000)
    tuned[first : first + size] *= factor
    for sigma, eps in [(3.0, 0.1), (0.5, 1.0)]:
        check(backend, torch.zeros_like(tuned), [tuned, tuned.abs()], sigma, eps)


@native_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_sample_of_nothing_but_outliers(backend, bad):
    """Every 16th element and its neighbours, so that the sample meets them; NaN and infinity leave no pivot."""
    tuned = torch.rand(300_000)
    tuned[::16] = bad
    got = measure(backend, torch.zeros_like(tuned), [tuned])
    if math.isfinite(bad):
        assert_correct(got, torch.zeros_like(tuned), [tuned])
    else:
        np.testing.assert_equal([got["mean"][0], got["sd"][0]], [bad, math.nan])
        np.testing.assert_equal(got["small"][0], 0 if math.isnan(bad) else 300_000)


@native_backend
def test_a_deviation_far_smaller_than_the_mean(backend):
    base = torch.zeros(300_000, dtype=torch.float64)
    check(backend, base, [1 + 1e-6 * torch.randn(300_000, dtype=torch.float64)])


@native_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("partner", [torch.float32, torch.float64])
def test_every_16_bit_value_is_widened_exactly(backend, dtype, partner):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # One task per value: the maximum of a single element is its magnitude.
    rows = values.reshape(-1, 1)
    got = measure(backend, torch.zeros(1, dtype=partner), list(rows))["max"]
    assert same_bits(torch.from_numpy(got).nan_to_num(nan=-1.0), values.double().abs().nan_to_num(nan=-1.0))


@native_backend
def test_float16_subnormals_survive_flush_to_zero(backend):
    tiny = torch.full((100,), 3 * 2.0**-24, dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        got = measure(backend, torch.zeros_like(tiny), [tiny])
    finally:
        torch.set_flush_denormal(False)
    assert got["max"][0] == got["mean"][0] == 3 * 2.0**-24


@every_backend(task_statistics)
def test_wrong_inputs_raise(backend):
    base, tuned = pair(4, 5)
    with pytest.raises(ShapeError, match="at least one"):
        task_statistics(base, [], backend=backend)
    with pytest.raises(ShapeError, match=r"tuned\[1\] has shape \(5, 4\)"):
        task_statistics(base, [*tuned, tuned[0].T], backend=backend)
    with pytest.raises(DTypeError, match="int32"):
        task_statistics(base, [tuned[0].int()], backend=backend)
    for sigma, eps in [(-1.0, 0.1), (math.nan, 0.1), (3.0, -0.1), (3.0, math.nan)]:
        with pytest.raises(ConfigError, match="must be >= 0"):
            task_statistics(base, tuned, sigma=sigma, eps=eps, backend=backend)


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native = backends.native(backend)
    base, row = matrix(torch.zeros(4)), matrix(torch.zeros(5))
    with pytest.raises(RuntimeError, match="task_statistics: the tensors differ in size"):
        native.task_statistics(base, [row], 3.0, 0.1, (0,) * 7, 1)
    with pytest.raises(RuntimeError, match="task_statistics: unknown element type code 9"):
        native.task_statistics((*base[:4], 9), [base], 3.0, 0.1, (0,) * 7, 1)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3, 4, 5), (1, 60, 60)),
        (torch.zeros(3, 4, 9)[..., :5], (12, 5, 9)),
        (torch.zeros(6, 4, 5)[::2], (3, 20, 40)),
        (torch.zeros(3, 4).expand(2, 3, 4), (2, 12, 0)),
        (torch.zeros(9, 1, 4)[::3], (3, 4, 12)),
    ],
)
def test_views_with_rows_are_not_copied(tensor, expected):
    assert with_rows(tensor) is tensor
    assert matrix(tensor)[:4] == (tensor.data_ptr(), *expected)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4, 6)[:, ::2], torch.zeros(4, 6).T, torch.zeros(1).expand(7), torch.zeros(6, 8, 9)[:, :4, :5]],
)
def test_other_views_are_copied(tensor):
    assert with_rows(tensor).is_contiguous()


@on_devices(task_statistics)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base = 0.02 * torch.randn(shape)
    tuned = [(base + 1e-3 * torch.randn(shape)).to(dtype) for _ in range(3)]
    got, expected = (task_statistics(base.to(dtype), tuned, backend=which) for which in (backend, "torch"))
    for name in ("mean", "sd", "max", "theta", "outlier_mass"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-12, equal_nan=True)
    assert torch.equal(got.zeros, expected.zeros)


@on_devices(task_statistics)
def test_on_another_stream(backend):
    check_on_another_stream(
        task_statistics, backend, lambda base, x, which: task_statistics(base, [x], backend=which).mean
    )


@large
@on_devices(task_statistics)
def test_more_elements_than_a_32_bit_index_counts(backend):
    x = torch.zeros(BEYOND_32_BITS, dtype=torch.bfloat16)
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    statistics = task_statistics(torch.zeros_like(x), [x], backend=backend)
    assert (int(statistics.zeros), float(statistics.max)) == (BEYOND_32_BITS - 3, 3.0)
