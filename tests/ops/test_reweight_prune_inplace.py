import math

import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import SHAPES, VALUES, available, torch_threads

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import reweight_prune, reweight_prune_, task_statistics

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
native_backend = pytest.mark.parametrize("backend", available("cpu"))
REAL = [torch.float32, torch.float64]
every_dtype = pytest.mark.parametrize("dtype", REAL, ids=str)
DENSITIES = st.sampled_from([0.0, 1e-4, 0.1, 0.3, 0.5, 0.9, 0.9999, 1.0])


def check(backend, deltas, weighting="clip", density=1.0, sigma=3.0, statistics=None):
    """Prunes copies in place; returns nothing."""
    base = torch.zeros_like(deltas[0])
    statistics = statistics or task_statistics(base, deltas, sigma)
    expected = reweight_prune(base, deltas, statistics, weighting, density, backend="torch")
    copies = [delta.clone() for delta in deltas]
    got = reweight_prune_(copies, statistics, weighting, density, backend=backend)
    for mine, copy, truth in zip(got, copies, expected, strict=True):
        assert mine is copy
        assert same_bits(mine, truth)


@every_backend
@given(
    kinds=st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3),
    shape=SHAPES,
    dtype=st.sampled_from(REAL),
    weighting=st.sampled_from(["clip", "damp", "boost", "none"]),
    density=st.lists(DENSITIES, min_size=3, max_size=3),
    sigma=st.sampled_from([0.0, 1.0, 3.0, math.inf]),
    seed=st.integers(0, 1000),
)
def test_equals_reweight_prune_from_a_base_of_zeros(backend, kinds, shape, dtype, weighting, density, sigma, seed):
    torch.manual_seed(seed)
    deltas = [VALUES[kind](shape).to(dtype) for kind in kinds]
    check(backend, deltas, weighting, density[: len(deltas)], sigma)


@native_backend
@every_dtype
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_many_chunks_and_any_number_of_threads(backend, dtype, kind):
    torch.manual_seed(1)
    deltas = [VALUES[kind]((601, 503)).to(dtype) for _ in range(2)]
    for threads, density in ((1, 0.3), (2, 0.3), (3, 0.3), (2, [0.01, 0.97])):
        with torch_threads(threads):
            check(backend, deltas, "clip", density, sigma=1.0)


@every_backend
@every_dtype
@pytest.mark.parametrize("density", [1.0, 0.999, 0.5, 0.1, 0.0])
def test_signs_of_zero_and_clipped_ties(backend, dtype, density):
    zeros = torch.where(torch.arange(1000) % 3 == 0, -0.0, 0.0).to(dtype)
    signs = 1 - 2 * torch.randint(0, 2, (1000,))
    mostly_clipped = (signs * torch.linspace(0.01, 100, 1000)).to(dtype)
    check(backend, [zeros, -zeros, mostly_clipped], "clip", density, sigma=0.0)


@native_backend
@pytest.mark.parametrize("share", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("first", [0, 32_768, 200_000])
def test_a_stretch_unlike_the_rest(backend, share, first):
    torch.manual_seed(2)
    delta = 0.01 * torch.randn(400_000)
    stretch = delta[first : first + 100_000]
    stretch[torch.rand(stretch.shape) < share] = 0.02
    delta[first + 70_000 : first + 75_000] = torch.linspace(-0.0101, 0.0102, 5_000)
    for density in (0.5, 0.25, 0.3125, 0.04, 1e-5):
        check(backend, [delta], "none", density)


@native_backend
def test_few_values_among_zeros(backend):
    delta = torch.zeros(1_048_576)
    delta[:: 1_048_576 // 9] = torch.arange(1.0, 11.0)
    for keep in (1, 4, 9, 11):
        check(backend, [delta], "none", keep / delta.numel())


@every_backend
@every_dtype
@pytest.mark.parametrize("density", [0.0, 0.5])
@pytest.mark.parametrize("size", [4, 100_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_is_changed(backend, dtype, density, size, bad):
    deltas = [torch.arange(1.0, size + 1, dtype=dtype), torch.ones(size, dtype=dtype)]
    deltas[1][2] = bad
    copies = [delta.clone() for delta in deltas]
    base = torch.zeros_like(deltas[0])
    for sigma, count in ((math.inf, 1), (3.0, size)):  # theta is NaN, and so is everything clipped at it
        statistics = task_statistics(base, deltas, sigma)
        with pytest.raises(NonFiniteError, match=f"{count} of {size} values"):
            reweight_prune_(copies, statistics, "clip", density, backend=backend)
        assert all(same_bits(copy, delta) for copy, delta in zip(copies, deltas, strict=True))


@every_backend
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_finite_bound_makes_infinity_finite(backend, density):
    delta = torch.randn(1000)
    statistics = task_statistics(torch.zeros(1000), [delta])
    delta[5], delta[7] = math.inf, -math.inf
    check(backend, [delta], "clip", density, statistics=statistics)


@every_backend
def test_without_pruning_they_pass(backend):
    delta = torch.tensor([1.0, math.nan, math.inf, -math.inf, 0.0])
    statistics = task_statistics(torch.zeros(5), [delta])
    (got,) = reweight_prune_([delta.clone()], statistics, "none", backend=backend)
    assert torch.equal(got.nan_to_num(7.0), delta.nan_to_num(7.0))
    (got,) = reweight_prune_([delta.clone()], statistics, "clip", backend=backend)
    assert got.isnan().all()


def test_what_it_refuses():
    x = torch.randn(3, 4)

    def prune(*deltas, weighting="clip", density=0.5, **options):
        statistics = task_statistics(torch.zeros(3, 4), [x] * max(1, len(deltas)))
        reweight_prune_(deltas, statistics, weighting, density, **options)

    with pytest.raises(ShapeError, match="at least one"):
        prune()
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        prune(x, torch.randn(4, 3))
    with pytest.raises(DTypeError, match="all float32 or all float64"):
        prune(x, x.double())
    for dtype in (torch.bfloat16, torch.float16, torch.int32):
        with pytest.raises(DTypeError):
            prune(x.to(dtype))
    with pytest.raises(ConfigError, match="not contiguous"):
        prune(x, torch.randn(4, 3).T)
    with pytest.raises(ConfigError, match="not contiguous"):
        prune(torch.tensor([1 + 2j]).conj().imag)  # one element, but its sign is only noted
    with pytest.raises(ConfigError, match=r"deltas.0. and deltas.1. share memory"):
        prune(x, x)
    with pytest.raises(ConfigError, match="outlier_weighting"):
        prune(x, weighting="squash")
    with pytest.raises(ConfigError, match="reweight_prune_: density: 1 tasks but 2 numbers"):
        prune(x, density=[0.1, 0.2])
    with pytest.raises(BackendUnavailableError, match="reweight_prune_inplace"):
        prune(x, backend="abacus")


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    with pytest.raises(RuntimeError, match="reweight_prune_inplace: unknown element type code 3"):
        backends.native(backend).reweight_prune_inplace([], 0, 3, 1)
