"""The Triton kernels for random masks, ranks, histograms and merging against the references, in the interpreter."""

import math

import pytest
import torch
from compare import same_bits
from interpreted import MIXES, TINY, every_dtype, every_mix, interpreted, nasty, pair, small_blocks
from test_elect_and_sum import ELECTIONS, KINDS, WEIGHTS, sparsifiers, whole_numbers
from test_random_mask import word

from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.ops import (
    Keep,
    MagnitudeSelection,
    RankedKeep,
    della_probabilities,
    elect_and_sum,
    elect_and_sum_many,
    magnitude_histogram,
    magnitude_ranks,
    magnitude_select_many,
    random_mask,
)

pytestmark = [*interpreted, pytest.mark.usefixtures(small_blocks.__name__)]

every_election = pytest.mark.parametrize("elect", ELECTIONS)
normalized_or_not = pytest.mark.parametrize("normalize", [False, True])


# --- random_mask


@pytest.mark.parametrize("numel", [0, 1, 3, 4, 127, 128, 300])
@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 7), (2**32, 2**31), (2**63 + 5, 1), (2**64 - 1, 2**32 - 1)])
def test_mask(numel, seed, stream):
    for probability in (0.0, 0.3, 1 - 2.0**-32, 1.0):
        got = random_mask((numel,), probability, seed, stream, backend="triton")
        assert got.dtype == torch.bool
        assert got.tolist() == [word(seed, stream, i) < round(probability * 2**32) for i in range(numel)]


# --- magnitude_histogram and the selections made from it


@every_mix
@pytest.mark.parametrize("bits", [1, 4, 11])
def test_histogram(mix, bits):
    base, (x, _) = pair((301,), mix)
    for options in ({}, {"base": base}):
        for prefix_bits in (0, 9, 20):
            for prefix in (0, 0b001111010, 2**prefix_bits - 1):
                if prefix < 2**prefix_bits:
                    options |= {"prefix": prefix, "prefix_bits": prefix_bits}
                    got, expected = (magnitude_histogram(x, bits, backend=b, **options) for b in ("triton", "torch"))
                    assert same_bits(got, expected), options


@every_dtype
def test_histogram_of_nasty_values(dtype):
    for name, x in nasty(dtype):
        got, expected = (magnitude_histogram(x, 11, backend=backend) for backend in ("triton", "torch"))
        assert same_bits(got, expected), name
    x = torch.tensor([1.0, math.inf, -math.inf, math.nan], dtype=dtype)
    assert same_bits(magnitude_histogram(x[:3], 11, backend="triton"), magnitude_histogram(x[:3], 11, backend="torch"))
    # Which NaN a narrower NaN is widened to is up to the processor: one with all bits of the exponent.
    assert magnitude_histogram(x, 11, backend="triton")[-8:].sum() == 3
    assert magnitude_histogram(x[:0], 3, backend="triton").tolist() == [0] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_selection_over_a_model(dtype):
    tensors = [torch.randint(-3, 4, (140,)).to(dtype) / 8, torch.randn(9, 11), torch.zeros(3)]
    for keep in (1, 100, 241):
        got, expected = (magnitude_select_many(lambda: iter(tensors), keep, backend=b) for b in ("triton", "torch"))
        for g, e in zip(got, expected, strict=True):
            assert same_bits(g.threshold, e.threshold) and same_bits(g.ties, e.ties)


# --- magnitude_ranks


def assert_ranks(x, **options):
    got, expected = (magnitude_ranks(x, backend=backend, **options) for backend in ("triton", "torch"))
    assert got.is_contiguous() and same_bits(got, expected)


@every_mix
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3, 17), (1, 2, 33)], ids=str)
def test_ranks(mix, shape):
    base, (x, _) = pair(shape, mix)
    assert_ranks(x)
    assert_ranks(x.mT if x.ndim == 2 else x, base=base.mT if x.ndim == 2 else base)


@every_dtype
def test_ranks_of_nasty_values(dtype):
    for _, x in nasty(dtype):
        assert_ranks(x[:30])


@every_dtype
def test_ranks_in_rows_too_long_for_the_kernel(dtype):
    assert_ranks(torch.randint(-300, 300, (2, 4097)).to(dtype))


@pytest.mark.parametrize("cols", [20, 5000])
def test_ranks_of_nan_and_infinity_are_refused(cols):
    x = torch.randn(3, cols)
    x[1, 7], x[2, 0] = math.nan, -math.inf
    with pytest.raises(NonFiniteError, match=f"magnitude_ranks: 2 of {3 * cols}"):
        magnitude_ranks(x, backend="triton")


# --- elect_and_sum


def assert_merged(base, tuned, **options):
    weights = WEIGHTS[: len(tuned)]
    got, expected = (elect_and_sum(base, tuned, weights, backend=b, **options) for b in ("triton", "torch"))
    assert got.is_contiguous() and same_bits(got, expected)


@every_election
@normalized_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_merging(elect, normalize, kind):
    for mix in MIXES[2:5:2]:
        base, tuned = pair((11, 13), mix, tasks=3)
        assert_merged(base, tuned, elect=elect, normalize=normalize, alpha=0.3, keep=sparsifiers(base, tuned, kind))


@every_mix
def test_merging_mixed_dtypes(mix):
    base, tuned = pair((300,), mix, tasks=4)
    assert_merged(base, tuned, elect="sum", normalize=True, keep=sparsifiers(base, tuned, "mixture"))


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("kind", ["all", "ties", "mixture"])
def test_merging_ties_and_drawn_elections(tasks, kind):
    base, tuned = whole_numbers(17, 31, tasks=tasks)
    for elect in ELECTIONS:
        assert_merged(base, tuned, elect=elect, normalize=tasks < 8, keep=sparsifiers(base, tuned, kind))


@every_election
@every_dtype
def test_means_of_subnormals(elect, dtype):
    steps = torch.arange(-150, 150).double()
    tuned = [(steps * factor % 97 * TINY[dtype]).to(dtype) for factor in (1, -3, 7)]
    assert_merged(torch.zeros_like(tuned[0]), tuned, elect=elect, normalize=True)


@pytest.mark.parametrize("field", ["largest", "outliers"])
@pytest.mark.parametrize("threshold", [torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_the_first_ties_go_by_index(field, threshold):
    base, tuned = torch.zeros(500), torch.full((500,), 0.5)
    tuned[::2] = -0.5
    for ties in (0, 1, 127, 128, 129, 500):
        keep = [Keep(**{field: MagnitudeSelection(threshold, torch.tensor(ties))})]
        got = elect_and_sum(base, [tuned], [1.0], keep=keep, backend="triton")
        assert same_bits(got, torch.where((torch.arange(500) < ties) == (field == "largest"), tuned, 0))


def test_a_threshold_between_two_float32():
    tuned = torch.tensor([1.0, 1 + 2.0**-23, 1 + 2.0**-22])
    selection = MagnitudeSelection(torch.tensor(1 + 2.0**-24, dtype=torch.float64), torch.tensor(0))
    for keep in (Keep(largest=selection), Keep(outliers=selection)):
        assert_merged(torch.zeros(3), [tuned], keep=[keep])


@every_election
@normalized_or_not
def test_base_comes_back_bit_for_bit(elect, normalize):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0, 5e-8], dtype=torch.float16).repeat(50)
    for keep, alpha in ((None, 0.0), ([Keep(probability=0.0)] * 2, 1.0)):
        options = {"elect": elect, "normalize": normalize, "alpha": alpha, "keep": keep, "backend": "triton"}
        assert same_bits(elect_and_sum(base, [base + 1, base - 1], [1.0, 0.5], **options).half(), base)


@every_election
@normalized_or_not
def test_nan_and_infinity_reach_the_result(elect, normalize):
    base, tuned = pair((300,), tasks=3)
    tuned[1][5], tuned[2][200], tuned[0][9] = math.nan, math.inf, -math.inf
    got, expected = (
        elect_and_sum(base, tuned, WEIGHTS[:3], elect=elect, normalize=normalize, backend=b)
        for b in ("triton", "torch")
    )
    assert torch.equal(got.isnan(), expected.isnan()) and same_bits(got.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1)])
def test_merging_nothing_and_one_element(shape):
    base, tuned = pair(shape, tasks=3)
    assert_merged(base, tuned, elect="sum", keep=sparsifiers(base, tuned, "everything"))


def test_the_default_block_merges_too(monkeypatch):
    monkeypatch.undo()
    base, tuned = whole_numbers(3000)
    assert_merged(base, tuned, elect="sum", normalize=True, keep=sparsifiers(base, tuned, "mixture"))


def test_merging_views():
    base, tuned = torch.randn(12, 30)[:, ::2], [torch.randn(15, 12).mT]
    assert_merged(base, tuned, elect="count", keep=sparsifiers(base, tuned, "everything"))


@every_election
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mix", MIXES[:1] + MIXES[3:5], ids=str)
def test_ranked_sparsifiers(elect, rescale, mix):
    base, tuned = pair((11, 33), mix, tasks=4)
    ranked = [
        RankedKeep(magnitude_ranks(t, base=base, backend="torch"), della_probabilities(33, 0.5, epsilon), rescale)
        for t, epsilon in zip(tuned, (0.5, 0.1), strict=False)
    ]
    selection = sparsifiers(base, tuned[1:2], "ties")[0].largest
    keep = [
        Keep(ranked=ranked[0], seed=5),
        Keep(ranked=ranked[1], seed=2**63 + 1, stream=1, rescale=0.7, largest=selection),
        Keep(probability=0.3, rescale=3.0, stream=2),
        Keep(),
    ]
    assert_merged(base, tuned, elect=elect, normalize=True, alpha=0.5, keep=keep)


@pytest.mark.parametrize("elect", ["none", "sum"])
def test_many_small_merges(elect):
    groups = [pair((size,), mix, tasks=3) for size in (1, 5, 140) for mix in MIXES[:5:2]]
    got, expected = (elect_and_sum_many(groups, WEIGHTS[:3], elect=elect, backend=b) for b in ("triton", "torch"))
    assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True))
