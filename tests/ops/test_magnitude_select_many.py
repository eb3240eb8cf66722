import math

import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import DTYPES, LAYOUTS, VALUES, available, layout_names

from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.ops import Sparsifier, accumulation_dtype, elect_and_sum, magnitude_select, magnitude_select_many

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))


def magnitudes(item) -> torch.Tensor:
    if not isinstance(item, tuple):
        return item
    dtype = accumulation_dtype(*item)
    return item[0].to(dtype) - item[1].to(dtype)


def check(items, keep, backend):
    """The masks are the one of all values in one tensor, cut into pieces."""
    values = [magnitudes(item) for item in items]
    dtype = accumulation_dtype(*values)
    whole = torch.cat([value.flatten().to(dtype) for value in values])
    selection = magnitude_select(whole, keep, backend="torch")
    masks = selection.mask(whole).split([value.numel() for value in values])
    got = magnitude_select_many(lambda: iter(items), keep, backend=backend)
    assert len(got) == len(items)
    for mine, mask, value in zip(got, masks, values, strict=True):
        assert same_bits(mine.threshold, selection.threshold)
        assert mine.ties.dtype == torch.int64
        assert torch.equal(mine.mask(value), mask.view(value.shape))


@every_backend
@given(
    kinds=st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4),
    shapes=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=2).map(tuple), min_size=4, max_size=4),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=8, max_size=8),
    layouts=st.lists(layout_names, min_size=4, max_size=4),
    pairs=st.lists(st.booleans(), min_size=4, max_size=4),
    data=st.data(),
)
def test_equals_selecting_from_one_long_tensor(backend, kinds, shapes, dtypes, layouts, pairs, data):
    items = []
    for i, kind in enumerate(kinds):
        x = LAYOUTS[layouts[i]](VALUES[kind](shapes[i]).to(dtypes[i]))
        items.append((x, (0.1 * torch.randn(shapes[i])).to(dtypes[4 + i])) if pairs[i] else x)
    keep = data.draw(st.integers(0, sum(magnitudes(item).numel() for item in items)))
    check(items, keep, backend)


@every_backend
@pytest.mark.parametrize("keep", [1, 40, 41, 99, 100, 149, 200])
def test_ties_go_to_the_first_tensor_and_index(backend, keep):
    items = [torch.full((40,), -0.5), torch.full((10, 10), 0.5, dtype=torch.bfloat16), torch.full((60,), 0.5).double()]
    check(items, keep, backend)
    selections = magnitude_select_many(lambda: iter(items), keep, backend=backend)
    assert [int(selection.ties) for selection in selections] == [
        min(keep, 40), max(0, min(keep - 40, 100)), max(0, keep - 140)
    ]  # fmt: skip


@every_backend
def test_a_threshold_between_the_magnitudes_of_16_bit_tensors(backend):
    """0.1 is no bfloat16: rounded to one it would be 0.10009765625, a magnitude of the second tensor."""
    items = [torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.0996], dtype=torch.bfloat16)]
    assert float(items[1][0]) > 0.1
    check(items, 3, backend)
    check([items[0].double(), items[1]], 3, backend)
    check(items, 2, backend)


@every_backend
@pytest.mark.parametrize("keep", [0, 1, 1000, 1499, 1500])
def test_a_sparsifier_of_elect_and_sum(backend, keep):
    """A float64 threshold selects from float32 differences what its mask says."""
    base = [torch.zeros(1000), torch.zeros(500, dtype=torch.float64)]
    tuned = [torch.randn(1000).bfloat16(), torch.randn(500, dtype=torch.float64)]
    pairs = list(zip(tuned, base, strict=True))
    selections = magnitude_select_many(lambda: iter(pairs), keep, backend=backend)
    assert selections[0].threshold.dtype == torch.float64
    kept = 0
    for selection, (t, b) in zip(selections, pairs, strict=True):
        merged = [
            elect_and_sum(b, [t], [1.0], keep=[Sparsifier(largest=selection)], backend=run) for run in ("torch", None)
        ]
        assert same_bits(*merged)
        assert torch.equal(merged[0] != 0, selection.mask(t))
        kept += int((merged[0] != 0).sum())
    assert kept == keep


@every_backend
def test_number_of_passes(backend):
    def passes(items):
        begun = []

        def stream():
            begun.append(1)
            yield from items

        magnitude_select_many(stream, 3, backend=backend)
        return len(begun)

    single, double = torch.randn(5), torch.randn(5, dtype=torch.float64)
    assert passes([single, single.half()]) == 3
    assert passes([double, double]) == passes([single, double]) == 7


@every_backend
@pytest.mark.parametrize("keep", [0, 2, 12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(backend, keep, dtype, bad):
    x = torch.ones(8, dtype=dtype)
    x[3] = bad
    for items in ([torch.ones(4), x], [torch.ones(4), (torch.ones(8), x)]):
        with pytest.raises(NonFiniteError, match="magnitude_select_many, tensor 1: 1 of 8"):
            magnitude_select_many(lambda items=items: iter(items), keep, backend=backend)


@pytest.mark.parametrize(
    "later",
    [
        [torch.ones(4), torch.ones(2), torch.ones(1)],
        [torch.ones(4)],
        [torch.ones(4), torch.ones(3)],
        [torch.ones(4), torch.ones(2).half()],
        [torch.ones(4), torch.ones(2).double()],
        [torch.ones(4), torch.tensor([1.0, 2.0])],
        [(torch.ones(4), torch.zeros(4)), torch.ones(2)],
    ],
)
def test_a_stream_that_changes_is_refused(later):
    streams = iter([[torch.ones(4), torch.ones(2)], later, later])
    with pytest.raises(ShapeError, match="the passes over the tensors differ"):
        magnitude_select_many(lambda: next(streams), 3)


def test_an_iterator_that_is_used_up_is_refused():
    once = iter([torch.ones(4)])
    with pytest.raises(ShapeError, match="the same ones each time"):
        magnitude_select_many(lambda: once, 2)


def test_nothing_at_all():
    assert magnitude_select_many(list, 0) == []
    (selection,) = magnitude_select_many(lambda: [torch.empty(0, 3)], 0)
    assert selection.mask(torch.empty(0, 3)).shape == (0, 3)


def test_what_it_refuses():
    for keep in (-1, 5):
        with pytest.raises(ConfigError, match="keep must lie in"):
            magnitude_select_many(lambda: [torch.ones(3), torch.ones(1)], keep)
    with pytest.raises(DTypeError):
        magnitude_select_many(lambda: [torch.ones(3, dtype=torch.int32)], 1)
    with pytest.raises(DTypeError):
        magnitude_select_many(lambda: [torch.ones(3).double(), torch.ones(3, dtype=torch.int32)], 1)
    with pytest.raises(ShapeError):
        magnitude_select_many(lambda: [(torch.ones(3), torch.ones(4))], 1)
    with pytest.raises(BackendUnavailableError, match="magnitude_histogram"):
        magnitude_select_many(lambda: [torch.ones(3)], 1, backend="abacus")
