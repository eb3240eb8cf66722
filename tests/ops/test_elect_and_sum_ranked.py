"""Sparsifiers by rank: DELLA."""

import math
from dataclasses import replace

import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import (
    DTYPES,
    LAYOUTS,
    every_backend,
    every_dtype,
    group,
    layout_names,
    shapes,
    simulated,
    some_backends,
    torch_threads,
)

from r_tsvm_kernels.errors import ConfigError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import (
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    magnitude_ranks,
    magnitude_select,
    random_mask,
)
from r_tsvm_kernels.ops._checks import accumulation_dtype

every_election = pytest.mark.parametrize("elect", ["none", "sum", "count"])
KINDS = ["della", "zero and one", "selected too", "masked too", "one task of two"]


def ranked(base, tuned, probabilities, divide=True, **options):
    """One sparsifier per task."""
    ranks = [magnitude_ranks(t, base=base, backend="torch") for t in tuned]
    return [
        Sparsifier(ranked=RankedSparsifier(own, probabilities, divide), substream=task, **options)
        for task, own in enumerate(ranks)
    ]


@every_backend(elect_and_sum)
@every_election
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
def test_equals_the_formula(backend, elect, normalize, rescale):
    """Each element is drawn on its own, from one mask per rank; then divided by its probability."""
    base, tuned = group((11 if simulated(backend) else 31, 17), [torch.float64] * 4)
    weights, probabilities = [1.0, -0.5, 2.0], della_probabilities(17, 0.6, 0.3)
    keep = ranked(base, tuned, probabilities, rescale, seed=11, rescale=0.75)
    expected = [torch.zeros_like(base) for _ in tuned]
    for rank, p in enumerate(probabilities.tolist()):
        for task, (t, rule) in enumerate(zip(tuned, keep, strict=True)):
            drawn = random_mask(base.shape, p, seed=11, substream=task, device=base.device, backend="torch")
            survivors = (rule.ranked.ranks == rank) & drawn
            expected[task] += torch.where(survivors, (t - base) * 0.75 / (p if rescale else 1.0), 0)
    options = {"elect": elect, "normalize": normalize, "alpha": 0.5}
    got = elect_and_sum(base, tuned, weights, sparsifiers=keep, backend=backend, **options)
    truth = elect_and_sum(torch.zeros_like(base), expected, weights, backend="torch", **options)
    assert relative_error(got, base + truth) < 1e-14


@every_backend(elect_and_sum, reference=False)
@given(
    data=st.data(),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    layouts=st.lists(layout_names, min_size=5, max_size=5),
    elect=st.sampled_from(["none", "sum", "count"]),
    normalize=st.booleans(),
    kind=st.sampled_from(KINDS),
    rescale=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_reference(backend, data, dtypes, layouts, elect, normalize, kind, rescale, seed):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    base, tuned = group(shape, dtypes)
    probabilities = della_probabilities(shape[-1], 0.5, 0.5 if kind == "zero and one" else 0.25)
    keep = ranked(base, tuned, probabilities, rescale, seed=seed)
    base, *tuned = (LAYOUTS[how](t) for how, t in zip(layouts, (base, *tuned), strict=False))
    ranks = LAYOUTS[layouts[-1]](keep[-1].ranked.ranks)
    keep[-1] = replace(keep[-1], ranked=RankedSparsifier(ranks, probabilities, rescale))
    if kind == "selected too":
        selection = magnitude_select(tuned[0], math.prod(shape) // 2, base=base, backend="torch")
        keep[0] = replace(keep[0], largest=selection, outliers=selection if seed % 2 else None, rescale=0.7)
    if kind == "masked too":
        keep[0] = replace(keep[0], mask=LAYOUTS[layouts[-1]](torch.rand(shape) < 0.6))
    if kind == "one task of two":
        keep[::2] = [Sparsifier(keep_probability=0.3, seed=seed, rescale=2.0)] * len(keep[::2])
    weights = [0.75, -0.25, 1.5][: len(tuned)]
    options = {"elect": elect, "normalize": normalize and elect != "none", "alpha": 0.3, "sparsifiers": keep}
    got, expected = (elect_and_sum(base, tuned, weights, backend=name, **options) for name in (backend, "torch"))
    assert same_bits(got, expected)


@some_backends(elect_and_sum, "cpu")
@every_election
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(backend, elect, dtype):
    base, tuned = group((331, 401), [dtype] * 4)
    keep = ranked(base, tuned, della_probabilities(401, 0.5, 0.4), seed=5)
    expected = elect_and_sum(base, tuned, [1.0, 2.0, 0.5], elect=elect, sparsifiers=keep, backend="torch")
    for threads in (1, 2, 3):
        with torch_threads(threads):
            got = elect_and_sum(base, tuned, [1.0, 2.0, 0.5], elect=elect, sparsifiers=keep, backend=backend)
            assert same_bits(got, expected)


@every_backend(elect_and_sum)
@every_dtype
def test_the_same_probability_for_every_rank_is_dare(backend, dtype):
    base, tuned = group((9 if simulated(backend) else 40, 30), [dtype] * 3)
    p = torch.full((30,), 0.25, dtype=torch.float64, device="cpu")
    dare = [Sparsifier(keep_probability=0.25, rescale=4.0, seed=9, substream=task) for task in range(2)]
    got = elect_and_sum(base, tuned, [1.0, 3.0], sparsifiers=ranked(base, tuned, p, seed=9), backend=backend)
    assert same_bits(got, elect_and_sum(base, tuned, [1.0, 3.0], sparsifiers=dare, backend=backend))


@every_backend(elect_and_sum)
def test_probability_one_keeps_and_zero_drops_whatever_is_drawn(backend):
    base, tuned = group((8 if simulated(backend) else 200, 50), [torch.float64] * 2)
    probabilities = (torch.arange(50, device="cpu") >= 30).double()
    keep = ranked(base, tuned, probabilities, seed=1)
    got = elect_and_sum(torch.zeros_like(base), [tuned[0] - base], [1.0], sparsifiers=keep, backend=backend)
    survivors = keep[0].ranked.ranks >= 30
    assert same_bits(got, torch.where(survivors, tuned[0] - base, 0))


@every_backend(elect_and_sum)
def test_the_mean_is_the_task_vector_and_survivors_are_as_many_as_drawn(backend):
    rows = 300 if simulated(backend) else 4000
    base, tuned = torch.zeros(rows, 8), [torch.randn(1, 8).expand(rows, 8)]
    probabilities = della_probabilities(8, 0.5, 0.3)
    keep = ranked(base, tuned, probabilities, seed=2)
    got = elect_and_sum(base, tuned, [1.0], sparsifiers=keep, backend=backend).double().cpu()
    p = probabilities[keep[0].ranked.ranks[0].long().cpu()]
    deviation = (p * (1 - p) / rows).sqrt()
    assert (((got != 0).double().mean(0) - p).abs() < 5 * deviation).all()
    assert ((got.mean(0) / tuned[0][0].cpu() - 1).abs() < 5 * deviation / p).all()


@every_backend(elect_and_sum)
def test_dropped_infinity_and_nan_disappear_and_surviving_ones_do_not(backend):
    base, tuned = torch.zeros(2, 4), [torch.tensor([[1.0, math.nan, math.inf, 2.0]] * 2)]
    ranks = torch.arange(4, dtype=torch.int32).expand(2, 4)
    for survivor in range(4):
        p = (torch.arange(4, device="cpu") == survivor).double()
        keep = [Sparsifier(ranked=RankedSparsifier(ranks, p))]
        got = elect_and_sum(base, tuned, [1.0], sparsifiers=keep, backend=backend)
        expected = torch.where(p.bool().to(base.device), tuned[0], 0.0)
        assert torch.equal(got.nan_to_num(7.0, 8.0), expected.nan_to_num(7.0, 8.0))


@every_backend(elect_and_sum)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (1,), (1, 1)], ids=str)
def test_nothing_and_single_elements(backend, shape):
    base, tuned = group(shape, [torch.float64] * 4)
    keep = ranked(base, tuned, della_probabilities(shape[-1], 1.0, 0.0))
    got = elect_and_sum(base, tuned, [1.0] * 3, sparsifiers=keep, backend=backend)
    assert same_bits(got, elect_and_sum(base, tuned, [1.0] * 3, backend=backend))


def test_della_probabilities_by_hand():
    assert della_probabilities(3, 0.5, 0.25).tolist() == [0.25, 0.5, 0.75]
    assert della_probabilities(1, 0.3, 0.1).tolist() == [0.3]
    assert della_probabilities(2, 0.7, 0.3).tolist() == [pytest.approx(0.4), 1.0]
    assert della_probabilities(0, 0.5, 0.1).shape == (0,)
    assert della_probabilities(3, 0.5, 0.25).dtype == torch.float64
    with torch.device("meta"):  # a GPU as the default
        assert {della_probabilities(cols, 0.5, 0.25).device.type for cols in (0, 1, 3)} == {"cpu"}


@given(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_della_probabilities_rise_from_the_lower_to_the_upper_end(cols, low, high):
    low, high = sorted((low, high))
    density, epsilon = (low + high) / 2, (high - low) / 2
    if density - epsilon < 0 or density + epsilon > 1:  # by rounding
        return
    p = della_probabilities(cols, density, epsilon)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p.diff() >= 0).all()
    assert float(p.mean()) == pytest.approx(density)
    if cols > 1:
        assert (float(p[0]), float(p[-1])) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(
    ("cols", "density", "epsilon"),
    [(4, 0.1, 0.2), (4, 0.9, 0.2), (4, 0.5, -0.1), (4, math.nan, 0.1), (4, 0.5, math.nan), (-1, 0.5, 0.1)],
)
def test_della_probabilities_that_are_refused(cols, density, epsilon):
    with pytest.raises(ConfigError, match="della_probabilities"):
        della_probabilities(cols, density, epsilon)


def test_what_is_refused():
    ranks, p = torch.zeros(2, 3, dtype=torch.int32), torch.full((3,), 0.5, dtype=torch.float64)
    with pytest.raises(DTypeError, match="int32"):
        RankedSparsifier(ranks.long(), p)
    with pytest.raises(DTypeError, match="float64"):
        RankedSparsifier(ranks, p.float())
    for wrong in (p[:2], p.view(1, 3)):
        with pytest.raises(ShapeError, match="one probability per column"):
            RankedSparsifier(ranks, wrong)
    with pytest.raises(ShapeError):
        RankedSparsifier(ranks[0, 0], p)
    with pytest.raises(ConfigError, match="move them"):
        RankedSparsifier(ranks, p.to("meta"))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"in \[0, 1\]"):
            RankedSparsifier(ranks, torch.tensor([0.5, wrong, 0.5], dtype=torch.float64))
    for wrong in (-1, 3):
        with pytest.raises(ConfigError, match="ranks must be in"):
            RankedSparsifier(torch.full_like(ranks, wrong), p)
    with pytest.raises(ConfigError, match="probability must be 1"):
        Sparsifier(ranked=RankedSparsifier(ranks, p), keep_probability=0.5)
    base = torch.zeros(3, 2)
    with pytest.raises(ShapeError, match="ranks of task 0"):
        elect_and_sum(base, [base], [1.0], sparsifiers=[Sparsifier(ranked=RankedSparsifier(ranks, p))])
    base = torch.zeros(2, 3, device="meta")
    with pytest.raises(DeviceError, match="ranks of task 0"):
        elect_and_sum(base, [base], [1.0], sparsifiers=[Sparsifier(ranked=RankedSparsifier(ranks, p))])


def test_differences_are_ranked_as_they_are_merged():
    base, tuned = group((6, 50), [torch.bfloat16] * 2)
    dtype = accumulation_dtype(base, *tuned)
    difference = tuned[0].to(dtype) - base.to(dtype)
    assert torch.equal(magnitude_ranks(tuned[0], base=base), magnitude_ranks(difference))
