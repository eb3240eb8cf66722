"""The CUDA kernels without a GPU: their sources, built by a C++ compiler against tests/cuda_on_cpu, on CPU tensors.

tests/cuda_on_cpu/cuda_runtime.h says what this can and cannot show. Everything runs with the blocks and threads in both
orders, and must give the reference's bits.
"""

import math

import emulated_cuda
import pytest
import torch
from compare import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, VALUES, layout_names

from r_tsvm_kernels.ops import (
    MagnitudeSelection,
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
)
from r_tsvm_kernels.ops._checks import accumulation_dtype

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulated_cuda.CXX is None, reason="builds CUDA sources for the CPU: no C++ compiler on PATH"),
]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return emulated_cuda.load(emulated_cuda.build(tmp_path_factory.mktemp("cuda_on_cpu")))


@pytest.fixture(params=["forward", "reverse"])
def emulation(request, module, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", request.param)
    emulated_cuda.install(module, monkeypatch)


pytestmark.append(pytest.mark.usefixtures("emulation"))

# The patches do not change from example to example.
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
# Around the slice of 1024 elements, and around several.
sizes = st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2048, 4099, 9001]))
shapes = st.one_of(sizes.map(lambda n: (n,)), st.lists(st.integers(1, 30), min_size=2, max_size=3).map(tuple))
dtype_lists = st.lists(st.sampled_from(DTYPES), min_size=2, max_size=6)
kinds = st.sampled_from(sorted(VALUES))


def group(shape, dtypes, kind, layouts, seed):
    """A base and one tensor for each further dtype, of differences of a kind from it."""
    torch.manual_seed(seed)
    origin = torch.zeros(shape) if "subnormal" in kind else torch.randn(shape)
    values = [origin, *(origin + VALUES[kind](shape) for _ in dtypes[1:])]
    tensors = [LAYOUTS[how](v.to(dtype)) for v, dtype, how in zip(values, dtypes, layouts, strict=False)]
    return tensors[0], tensors[1:]


groups = st.builds(
    group, shapes, dtype_lists, kinds, st.lists(layout_names, min_size=6, max_size=6), st.integers(0, 99)
)
densities = st.sampled_from([0.0, 1e-3, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0])


def both(op, *arguments, **options):
    return (op(*arguments, **options, backend=backend) for backend in ("cuda", "torch"))


# --- elect_and_sum


def sparsifier(difference, kind, task):
    def top(density):
        return magnitude_select(difference, kept_count(density, difference.numel()), backend="torch")

    return {
        "all": Sparsifier(),
        "ties": Sparsifier(largest=top(0.4)),
        "breadcrumbs": Sparsifier(largest=top(0.5), outliers=top(0.1)),
        "dare": Sparsifier(keep_probability=0.4, seed=7, substream=task, rescale=2.5),
        "della": Sparsifier(
            ranked=RankedSparsifier(
                magnitude_ranks(difference, backend="torch"),
                della_probabilities(difference.shape[-1], 0.5, 0.3),
                rescale=task % 2 == 0,
            ),
            seed=11,
            substream=task,
        ),
        "mask": Sparsifier(mask=torch.rand(difference.shape) < 0.4, rescale=1.5),
        "everything": Sparsifier(
            largest=top(0.9), outliers=top(0.05), keep_probability=0.7, seed=2**63, rescale=0.3,
            mask=torch.rand(difference.shape) < 0.8,
        ),
    }[kind]  # fmt: skip


@many
@given(
    tensors=groups,
    kinds=st.lists(
        st.sampled_from(["all", "ties", "breadcrumbs", "dare", "della", "mask", "everything"]), min_size=5, max_size=5
    ),
    elect=st.sampled_from(["none", "sum", "count", "unweighted"]),
    normalize=st.booleans(),
    alpha=st.sampled_from([1.0, 0.3, -2.0]),
    weights=st.sampled_from([[1.0, 0.5, 2.0, -0.25, 0.75], [0.3, 0.1, 0.2, 0.6, -0.3]]),
)
def test_merging(tensors, kinds, elect, normalize, alpha, weights):
    base, tuned = tensors
    dtype = accumulation_dtype(base, *tuned)
    differences = [t.to(dtype) - base.to(dtype) for t in tuned]
    if elect == "unweighted":  # takes no ranks
        kinds = ["mask" if kind == "della" else kind for kind in kinds]
    keep = [sparsifier(d, kind, task) for task, (d, kind) in enumerate(zip(differences, kinds, strict=False))]
    weights = weights[: len(tuned)]
    options = {"elect": elect, "normalize": normalize, "alpha": alpha, "sparsifiers": keep}
    assert same_bits(*both(elect_and_sum, base, tuned, weights, **options))


@pytest.mark.parametrize("elect", ["none", "sum", "count", "unweighted"])
def test_merging_many_tasks_with_ties_in_every_slice(elect):
    base = torch.randint(-4, 5, (131, 97)).float()
    tuned = [base + torch.randint(-2, 3, base.shape) for _ in range(40)]
    keep = [sparsifier(t - base, ["breadcrumbs", "dare", "ties"][task % 3], task) for task, t in enumerate(tuned)]
    weights = [(1 + task % 7) / 10 for task in range(40)]  # many votes cancel up to rounding
    assert same_bits(*both(elect_and_sum, base, tuned, weights, elect=elect, normalize=True, sparsifiers=keep))


@pytest.mark.parametrize("ties", [0, 1, 1024, 1025, 30_000, 69_999, 70_000])
@pytest.mark.parametrize("field", ["largest", "outliers"])
def test_merging_takes_the_first_ties(ties, field):
    base, tuned = torch.zeros(70_001), torch.full((70_001,), 0.5)
    tuned[-1] = 3.0
    keep = [Sparsifier(**{field: MagnitudeSelection(torch.tensor(0.5), torch.tensor(ties))})]
    assert same_bits(*both(elect_and_sum, base, [tuned], [1.0], sparsifiers=keep))


def test_the_ties_of_more_slices_than_are_summed_at_once():
    size = 2**23 + 5000
    base, tuned = torch.zeros(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    keep = [Sparsifier(largest=MagnitudeSelection(torch.tensor(1.0), torch.tensor(2**23 + 1500)))]
    got = elect_and_sum(base, [tuned], [1.0], sparsifiers=keep, backend="cuda")
    assert got[: 2**23 + 1500].all() and not got[2**23 + 1500 :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_that_begin_anywhere(dtype):
    base, x, y = torch.randn(3, 3001).to(dtype).unbind()
    for offset in (1, 2, 3):
        tensors = [t[offset:] for t in (base, x, y)]
        assert same_bits(*both(elect_and_sum, tensors[0], tensors[1:], [1.0, 2.0], elect="sum"))


@pytest.mark.parametrize("elect", ["none", "sum", "count", "unweighted"])
@pytest.mark.parametrize("normalize", [False, True])
def test_merging_lets_nan_and_infinity_through(elect, normalize):
    base, tuned = group((2000,), [torch.float32] * 4, "gaussian", ["contiguous"] * 4, 0)
    tuned[1][5], tuned[2][700], tuned[0][9] = math.nan, math.inf, -math.inf
    got, expected = both(elect_and_sum, base, tuned, [1.0] * 3, elect=elect, normalize=normalize)
    assert torch.equal(got.isnan(), expected.isnan()) and same_bits(got.nan_to_num(), expected.nan_to_num())
