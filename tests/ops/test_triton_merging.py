"""The Triton kernels for masks, ranks, histograms, products of task vectors and merging, in the interpreter."""

import math

import pytest
import torch
from compare import same_bits
from interpreted import MIXES, TINY, every_dtype, every_mix, interpreted, pair, small_blocks
from test_elect_and_sum import ELECTIONS, KINDS, WEIGHTS, sparsifiers, whole_numbers

from r_tsvm_kernels.ops import (
    MagnitudeSelection,
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    magnitude_ranks,
)

pytestmark = [*interpreted, pytest.mark.usefixtures(small_blocks.__name__)]

every_election = pytest.mark.parametrize("elect", ELECTIONS)
normalized_or_not = pytest.mark.parametrize("normalize", [False, True])


# --- elect_and_sum

# By these many sums of whole numbers are 0 but for rounding.
CANCELLING = [0.3, 0.1, 0.2, 0.6, -0.3, -0.1, 0.7, 0.9]


def assert_merged(base, tuned, weights=WEIGHTS, **options):
    weights = weights[: len(tuned)]
    got, expected = (elect_and_sum(base, tuned, weights, backend=b, **options) for b in ("triton", "torch"))
    assert got.is_contiguous() and same_bits(got, expected)


@every_election
@normalized_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_merging(elect, normalize, kind):
    for mix in MIXES[2:5:2]:
        base, tuned = pair((11, 13), mix, tasks=3)
        assert_merged(
            base, tuned, elect=elect, normalize=normalize, alpha=0.3, sparsifiers=sparsifiers(base, tuned, kind)
        )


@every_mix
def test_merging_mixed_dtypes(mix):
    base, tuned = pair((300,), mix, tasks=4)
    assert_merged(base, tuned, elect="sum", normalize=True, sparsifiers=sparsifiers(base, tuned, "mixture"))


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("kind", ["all", "ties", "mixture"])
def test_merging_ties_and_drawn_elections(tasks, kind):
    base, tuned = whole_numbers(17, 31, tasks=tasks)
    for elect in ELECTIONS:
        for weights in (WEIGHTS, CANCELLING):
            assert_merged(
                base, tuned, weights, elect=elect, normalize=tasks < 8, sparsifiers=sparsifiers(base, tuned, kind)
            )


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
        keep = [Sparsifier(**{field: MagnitudeSelection(threshold, torch.tensor(ties))})]
        got = elect_and_sum(base, [tuned], [1.0], sparsifiers=keep, backend="triton")
        assert same_bits(got, torch.where((torch.arange(500) < ties) == (field == "largest"), tuned, 0))


def test_a_threshold_between_two_float32():
    tuned = torch.tensor([1.0, 1 + 2.0**-23, 1 + 2.0**-22])
    selection = MagnitudeSelection(torch.tensor(1 + 2.0**-24, dtype=torch.float64), torch.tensor(0))
    for keep in (Sparsifier(largest=selection), Sparsifier(outliers=selection)):
        assert_merged(torch.zeros(3), [tuned], sparsifiers=[keep])


@every_election
@normalized_or_not
def test_base_comes_back_bit_for_bit(elect, normalize):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0, 5e-8], dtype=torch.float16).repeat(50)
    for keep, alpha in ((None, 0.0), ([Sparsifier(keep_probability=0.0)] * 2, 1.0)):
        options = {"elect": elect, "normalize": normalize, "alpha": alpha, "sparsifiers": keep, "backend": "triton"}
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
    assert_merged(base, tuned, elect="sum", sparsifiers=sparsifiers(base, tuned, "everything"))


def test_the_default_block_merges_too(monkeypatch):
    monkeypatch.undo()
    base, tuned = whole_numbers(3000)
    assert_merged(base, tuned, elect="sum", normalize=True, sparsifiers=sparsifiers(base, tuned, "mixture"))


def test_merging_views():
    base, tuned = torch.randn(12, 30)[:, ::2], [torch.randn(15, 12).mT]
    assert_merged(base, tuned, elect="count", sparsifiers=sparsifiers(base, tuned, "everything"))


@every_election
@normalized_or_not
def test_masks_beside_other_selections_under_weights_of_both_signs(elect, normalize):
    base, tuned = whole_numbers(13, 27, tasks=6)
    some = torch.rand(27, 13).mT < 0.6
    selections, weights = sparsifiers(base, tuned, "breadcrumbs"), [1.0, -0.5, 2.0, -3.0, 0.25, 4.0]
    keep = [
        Sparsifier(mask=some),
        Sparsifier(mask=some, rescale=-2.5),
        Sparsifier(mask=some, keep_probability=0.7, seed=2**63 + 5, substream=2, rescale=1 / 0.7),
        Sparsifier(mask=torch.zeros_like(some)),
        Sparsifier(mask=~some, largest=selections[4].largest, outliers=selections[4].outliers),
        Sparsifier(),
    ]
    if elect != "unweighted":
        ranked = RankedSparsifier(
            magnitude_ranks(tuned[5], base=base, backend="torch"), della_probabilities(27, 0.5, 0.4)
        )
        keep[5] = Sparsifier(mask=some, ranked=ranked, seed=3)
    for rules in (keep, [Sparsifier(mask=some)] * 6):
        assert_merged(base, tuned, weights, elect=elect, normalize=normalize, alpha=0.3, sparsifiers=rules)


@pytest.mark.parametrize("elect", [elect for elect in ELECTIONS if elect != "unweighted"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mix", MIXES[:1] + MIXES[3:5], ids=str)
def test_ranked_sparsifiers(elect, rescale, mix):
    base, tuned = pair((11, 33), mix, tasks=4)
    ranked = [
        RankedSparsifier(magnitude_ranks(t, base=base, backend="torch"), della_probabilities(33, 0.5, epsilon), rescale)
        for t, epsilon in zip(tuned, (0.5, 0.1), strict=False)
    ]
    selection = sparsifiers(base, tuned[1:2], "ties")[0].largest
    keep = [
        Sparsifier(ranked=ranked[0], seed=5),
        Sparsifier(ranked=ranked[1], seed=2**63 + 1, substream=1, rescale=0.7, largest=selection),
        Sparsifier(keep_probability=0.3, rescale=3.0, substream=2),
        Sparsifier(),
    ]
    assert_merged(base, tuned, elect=elect, normalize=True, alpha=0.5, sparsifiers=keep)
