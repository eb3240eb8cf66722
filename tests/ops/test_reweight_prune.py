import math

import numpy as np
import oracle
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

from r_tsvm_kernels.errors import ConfigError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import pruned_sparsity, reweight_prune, task_statistics

native_backend = some_backends(reweight_prune, "cpu")
MODES = st.sampled_from(["clip", "none"])
DENSITIES = st.sampled_from([0.0, 1e-4, 0.1, 0.3, 0.5, 0.9, 0.9999, 1.0])


def prepare(base, tuned, weighting="clip", density=1.0, sigma=3.0, backend=None):
    statistics = task_statistics(base, tuned, sigma=sigma)
    return reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density, backend=backend)


def check(backend, base, tuned, weighting="clip", density=1.0, sigma=3.0):
    statistics = task_statistics(base, tuned, sigma=sigma)
    expected = reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density, backend="torch")
    got = reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density, backend=backend)
    for mine, truth in zip(got, expected, strict=True):
        assert same_bits(mine, truth)


def heavy(shape=(40, 30)):
    return torch.randn(shape) ** 5 * 1e-3


@every_backend(reweight_prune, reference=False)
def test_cases(backend):
    check_cases(reweight_prune, backend)


@every_backend(reweight_prune)
def test_without_clipping_and_pruning_it_is_the_task_vector(backend):
    base, tuned = torch.randn(5, 7, dtype=torch.bfloat16), [torch.randn(5, 7) for _ in range(2)]
    for got, t in zip(prepare(base, tuned, "none", backend=backend), tuned, strict=True):
        assert got.dtype == torch.float32
        assert same_bits(got, t - base.float())


@every_backend(reweight_prune)
@pytest.mark.parametrize("weighting", ["clip", "none"])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.01, 0.0])
def test_equals_the_formula(backend, weighting, density):
    base, tuned = torch.zeros(40, 30), [heavy(), heavy()]
    for got, t in zip(prepare(base, tuned, weighting, density, backend=backend), tuned, strict=True):
        expected = t.double().cpu().numpy()
        magnitude = np.abs(expected)
        if weighting == "clip":
            theta = np.float32(magnitude.mean() + 3 * magnitude.std())
            expected = np.clip(expected, -theta, theta)
        expected = oracle.keep_largest(expected, density)
        assert np.array_equal(got.double().cpu().numpy(), expected)
        assert int((got != 0).sum()) == math.ceil(density * got.numel())


@every_backend(reweight_prune)
def test_infinite_sigma_clips_nothing(backend):
    base, tuned = torch.zeros(40, 30), [heavy()]
    assert same_bits(prepare(base, tuned, "clip", sigma=math.inf, backend=backend)[0], tuned[0])


@every_backend(reweight_prune)
def test_one_density_per_task(backend):
    base, tuned = torch.zeros(10, 10), [torch.randn(10, 10) for _ in range(2)]
    assert [int((d != 0).sum()) for d in prepare(base, tuned, density=[0.2, 0.7], backend=backend)] == [20, 70]
    with pytest.raises(ConfigError, match="density: 2 tasks but 3 numbers"):
        prepare(base, tuned, density=[0.1, 0.2, 0.3])


@every_backend(reweight_prune)
def test_inputs_are_left_alone(backend):
    base, tuned = torch.randn(6, 6), [torch.randn(6, 6)]
    copies = base.clone(), tuned[0].clone()
    prepare(base, tuned, density=0.5, backend=backend)
    assert same_bits(base, copies[0]) and same_bits(tuned[0], copies[1])


@every_backend(reweight_prune, reference=False)
@given(
    data=st.data(),
    kinds=st.lists(st.sampled_from(sorted(VALUES)), min_size=3, max_size=3),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    layouts=st.lists(layout_names, min_size=4, max_size=4),
    weighting=MODES,
    density=st.lists(DENSITIES, min_size=3, max_size=3),
    sigma=st.sampled_from([0.0, 1.0, 3.0, math.inf]),
    from_zero=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_reference(backend, data, kinds, dtypes, layouts, weighting, density, sigma, from_zero, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    origin = torch.zeros(shape) if from_zero else torch.randn(shape)
    values = [origin, *(origin + VALUES[kind](shape) for kind in kinds)]
    tensors = [LAYOUTS[how](v.to(dtype)) for v, dtype, how in zip(values, dtypes, layouts, strict=False)]
    check(backend, tensors[0], tensors[1:], weighting, density[: len(tensors) - 1], sigma)


@native_backend
@every_dtype
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_many_chunks_and_any_number_of_threads(backend, dtype, kind):
    torch.manual_seed(1)
    base = torch.randn(601, 503).to(dtype) if "subnormal" not in kind else torch.zeros(601, 503, dtype=dtype)
    tuned = [(base.double() + VALUES[kind]((601, 503)).double()).to(dtype) for _ in range(2)]
    statistics = task_statistics(base, tuned)
    for density, counts in ((0.3, (1, 2, 3)), ([0.01, 0.97], (2,))):
        expected = reweight_prune(base, tuned, statistics, density=density, backend="torch")
        for threads in counts:
            with torch_threads(threads):
                got = reweight_prune(base, tuned, statistics, density=density, backend=backend)
            assert all(map(same_bits, got, expected))


@native_backend
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("first", [0, 32_768, 200_000])
def test_what_the_sample_does_not_show(backend, share, first):
    """A stretch with other values than the rest, one of which may be the threshold; full lists; a missed bracket."""
    torch.manual_seed(2)
    tuned = 0.01 * torch.randn(400_000)
    stretch = tuned[first : first + 100_000]
    stretch[torch.rand(stretch.shape) < share] = 0.02
    tuned[first + 70_000 : first + 75_000] = torch.linspace(-0.0101, 0.0102, 5_000)
    for density in (0.5, 0.25, 0.3125, 0.04, 1e-5):
        check(backend, torch.zeros_like(tuned), [tuned], "none", density)


def sampled(size):
    """Mark the elements that csrc/cpu/sample.h reads of a tensor of this size."""
    run = 32
    runs = min(size // (16 * run), 8192)
    stride = size // runs
    hashes = (np.arange(1, runs + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    starts = np.arange(runs) * stride + (hashes % np.uint64(stride - run + 1)).astype(np.int64)
    marks = np.zeros(size, bool)
    marks[(starts // run * run)[:, None] + np.arange(run)] = True
    return torch.from_numpy(marks)


@native_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_undecided_elements_than_the_sample_promised(backend, dtype):
    """Every chunk lists fewer elements than its limit, but all chunks together exceed the space."""
    size, chunk, per_chunk = 2**20, 2**15, 3500
    tuned, seen = torch.randn(size, dtype=dtype), sampled(size)
    threshold = tuned[seen].abs().median()
    for first in range(0, size, chunk):
        unseen = first + (~seen[first : first + chunk]).nonzero()[:per_chunk, 0]
        tuned[unseen] = threshold * (1 + 1e-4 * torch.randn(per_chunk, dtype=dtype))
    check(backend, torch.zeros(size, dtype=dtype), [tuned], "none", density=0.5)


@native_backend
def test_a_sample_that_sees_nothing_but_zeros(backend):
    """All elements that it is likely to read are 0; the threshold is among the others."""
    tuned = torch.zeros(1_048_576)
    tuned[:: 1_048_576 // 9] = torch.arange(1.0, 11.0)
    for keep in (1, 4, 9, 11):
        check(backend, torch.zeros_like(tuned), [tuned], "none", keep / tuned.numel())


@every_backend(reweight_prune, reference=False)
@pytest.mark.parametrize("density", [1.0, 0.999, 0.5])
def test_signs_of_zero_survive_as_in_the_reference(backend, density):
    base = torch.zeros(1000)
    tuned = torch.where(torch.arange(1000) % 3 == 0, -0.0, 0.0)
    tuned[500:] *= 0.0
    check(backend, base, [tuned, -tuned], "clip", density)
    check(backend, -base, [tuned, -tuned], "none", density)


@every_backend(reweight_prune)
@pytest.mark.parametrize("density", [0.0, 0.5])
@pytest.mark.parametrize("size", [4, 100_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, density, size, bad):
    if simulated(backend) and size > 3000:
        size = {"triton": 300, "cuda": 3000}[backend]
    base, tuned = torch.zeros(size), [torch.ones(size), torch.ones(size)]
    tuned[1][2] = bad
    statistics = task_statistics(base, tuned, sigma=math.inf)
    with pytest.raises(NonFiniteError, match=f"1 of {size} values"):
        reweight_prune(base, tuned, statistics, density=density, backend=backend)
    statistics = task_statistics(base, tuned)  # theta is NaN, and so is everything clipped at it
    with pytest.raises(NonFiniteError, match=f"{size} of {size} values"):
        reweight_prune(base, tuned, statistics, density=density, backend=backend)


@every_backend(reweight_prune)
def test_without_pruning_they_pass(backend):
    base, tuned = torch.zeros(5), torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0])
    (got,) = prepare(base, [tuned], "none", backend=backend)
    assert torch.equal(got.nan_to_num(7.0), tuned.nan_to_num(7.0))
    (got,) = prepare(base, [tuned], "clip", backend=backend)
    assert got.isnan().all()


@given(
    kind=st.sampled_from(sorted(VALUES)),
    weighting=MODES,
    density=DENSITIES,
    sigma=st.sampled_from([0.0, 0.5, 3.0, math.inf]),
    eps=st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 50.0]),
    size=st.sampled_from([0, 1, 2, 1000]),
)
def test_pruned_sparsity_is_the_share_of_small_elements(kind, weighting, density, sigma, eps, size):
    base, tuned = torch.zeros(size, dtype=torch.float64), [VALUES[kind]((size,)).double()]
    statistics = task_statistics(base, tuned, sigma=sigma, eps=eps)
    (matrix,) = reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density)
    small = int((matrix.abs() <= eps * float(statistics.mean)).sum())
    assert pruned_sparsity(statistics, outlier_weighting=weighting, density=density, eps=eps) == [
        small / size if size else 1.0
    ]


@every_backend(reweight_prune)
def test_without_statistics_it_measures(backend):
    base, tuned = torch.zeros(40, 30), [heavy(), heavy()]
    for weighting in ("clip", "none"):
        expected = prepare(base, tuned, weighting, 0.3, backend=backend)
        got = reweight_prune(base, tuned, outlier_weighting=weighting, density=0.3, backend=backend)
        assert all(same_bits(mine, truth) for mine, truth in zip(got, expected, strict=True))
    assert not same_bits(got[0], prepare(base, tuned, "clip", 0.3, backend=backend)[0])


@every_backend(reweight_prune, reference=False)
def test_the_first_ties_survive(backend):
    """Around the slices of 1024 of the CUDA kernels, and around many; for others as hard as any number."""
    size = 601 if simulated(backend) and backend == "triton" else 60_001
    tuned = torch.full((size,), 0.5)
    tuned[::2], tuned[-1] = -0.5, 3.0
    for ties in (0, 1, 127, 128, 129, 599, 600) if size == 601 else (0, 1, 1023, 1024, 1025, 20_000, 59_999, 60_000):
        (got,) = prepare(torch.zeros(size), [tuned], "none", (ties + 0.5) / size, backend=backend)
        expected = torch.where(torch.arange(size) < ties, tuned, 0)
        expected[-1] = 3.0
        assert same_bits(got, expected)


@every_backend(reweight_prune, reference=False)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_many_tasks_of_which_the_last_is_not_finite(backend, bad):
    size = 300 if simulated(backend) and backend == "triton" else 3000
    base, tuned = torch.zeros(size), [torch.randn(size) for _ in range(6)]
    tuned[5][77] = bad
    for density in (0.0, 0.5, [1.0, 0.5, 0.5, 0.5, 0.5, 0.0], [1.0, 0.5, 0.5, 0.5, 0.5, 0.5]):
        with pytest.raises(NonFiniteError, match=f"1 of {size}"):
            prepare(base, tuned, "clip", density, sigma=math.inf, backend=backend)


@every_backend(reweight_prune)
def test_what_it_refuses(backend):
    base = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match="outlier_weighting"):
        reweight_prune(base, [base], outlier_weighting="squash", backend=backend)
    with pytest.raises(ConfigError, match="expected statistics of the 2 tasks, got those of 1"):
        reweight_prune(base, [base, base], task_statistics(base, [base]), backend=backend)
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        reweight_prune(base, [base, torch.zeros(3, 4)], task_statistics(base, [base]), backend=backend)
    with pytest.raises(ShapeError, match="at least one"):
        reweight_prune(base, [], task_statistics(base, [base]), backend=backend)
    with pytest.raises(TypeError, match="positional"):
        reweight_prune(base, [base], None, "clip", 0.5)


@on_devices(reweight_prune)
@every_model_shape
@every_dtype
def test_sizes_of_models(backend, shape, dtype):
    base = 0.02 * torch.randn(shape)
    tuned = [(base + 1e-3 * torch.randn(shape)).to(dtype) for _ in range(3)]
    check(backend, base.to(dtype), tuned, "clip", 0.3)
    check(backend, base.to(dtype), tuned, "none", 1.0)


@on_devices(reweight_prune)
def test_on_another_stream(backend):
    check_on_another_stream(
        reweight_prune, backend, lambda base, x, which: reweight_prune(base, [x], density=0.3, backend=which)
    )


@large
@on_devices(reweight_prune)
def test_more_elements_than_a_32_bit_index_counts(backend):
    base, tuned = torch.zeros(2, BEYOND_32_BITS, dtype=torch.bfloat16).unbind()
    tuned[-3:] = torch.tensor([1.0, -2.0, 3.0])
    density = 1.5 / BEYOND_32_BITS  # two elements
    (pruned,) = reweight_prune(base, [tuned], outlier_weighting="none", density=density, backend=backend)
    assert pruned[-3:].tolist() == [0.0, -2.0, 3.0] and not pruned[:-3].any()
