"""Every backend against the formula by NumPy in float64, and to the bit against the reference."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import check, check_on_another_stream
from compare import relative_error, same_bits
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
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import (
    MagnitudeSelection,
    RankedSparsifier,
    Sparsifier,
    della_probabilities,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
    random_mask,
)
from r_tsvm_kernels.ops._native import matrix
from r_tsvm_kernels.ops.elect_and_sum.cases import CANCELLING, ELECTIONS, KINDS, WEIGHTS, rules_for, sparsifiers

native_backend = some_backends(elect_and_sum, "cpu")
every_election = pytest.mark.parametrize("elect", ELECTIONS)
normalized_or_not = pytest.mark.parametrize("normalize", [False, True])
every_kind = pytest.mark.parametrize("kind", KINDS)


def group(*shape, tasks=3, dtypes=(torch.float32, torch.float32)):
    base = torch.randn(shape)
    tuned = [(base + 0.05 * torch.randn(shape)).to(dtypes[1]) for _ in range(tasks)]
    return base.to(dtypes[0]), tuned


def whole_numbers(*shape, tasks=3):
    """Small whole numbers: sums are exact, and ties, zeros and drawn elections are many."""
    base = torch.randint(-4, 5, shape).float()
    return base, [base + torch.randint(-2, 3, shape) for _ in range(tasks)]


def both(backend, *arguments, **options):
    return (elect_and_sum(*arguments, backend=which, **options) for which in (backend, "torch"))


def survivors(v, rule):
    """Mark the elements of a task vector that survive, and give what each is divided by."""
    order = np.argsort(-np.abs(v), axis=None, kind="stable")
    place = np.empty(order.size, dtype=np.int64)
    place[order] = np.arange(order.size)
    place = place.reshape(v.shape)

    def count(selection):
        return int(selection.mask(torch.from_numpy(v).to(selection.threshold.device)).sum())

    def drawn(chance):
        draw = {"seed": rule.seed, "substream": rule.substream}
        return random_mask(v.shape, chance, **draw, device="cpu", backend="torch").numpy()

    survives, divisor = drawn(rule.keep_probability), np.ones(v.shape)
    if rule.largest is not None:
        survives &= place < count(rule.largest)
    if rule.outliers is not None:
        survives &= place >= count(rule.outliers)
    if rule.mask is not None:
        survives &= rule.mask.cpu().numpy()
    if rule.ranked is not None:
        for rank, chance in enumerate(rule.ranked.keep_probabilities.tolist()):
            here = rule.ranked.ranks.cpu().numpy() == rank
            survives &= drawn(chance) | ~here
            if rule.ranked.rescale and chance > 0:
                divisor[here] = chance
    return survives, divisor


def formula(base, tuned, weights, elect, normalize, alpha, sparsifiers):
    """Straight from the papers, all tasks in one array."""
    origin = base.double().cpu().numpy()
    weights = np.array(weights).reshape(-1, *[1] * origin.ndim)
    v = np.stack([t.double().cpu().numpy() - origin for t in tuned])
    for task, rule in enumerate(sparsifiers):
        survives, divisor = survivors(v[task], rule)
        v[task] *= survives / divisor
    voters = v
    v = v * np.array([rule.rescale for rule in sparsifiers]).reshape(weights.shape) * weights
    voters = voters if elect == "unweighted" else v
    if elect == "none":
        divisor = weights.sum()
        combined = v.sum(0)
    else:
        agree = np.sign(voters) == oracle.elected_sign(np.sign(voters) if elect == "count" else voters)
        divisor = (agree * weights).sum(0)
        divisor = np.where(divisor == 0, 1, divisor)
        combined = (v * agree).sum(0)
    return torch.from_numpy(np.asarray(origin + alpha * (combined / divisor if normalize else combined)))


@every_backend(elect_and_sum, reference=False)
def test_cases(backend):
    check(elect_and_sum, backend)


@every_backend(elect_and_sum)
@every_election
@normalized_or_not
@every_kind
def test_equals_the_formula(backend, elect, normalize, kind):
    shape, tasks = ((11, 13), 3) if simulated(backend) else ((31, 17), 5)
    base, tuned = whole_numbers(*shape, tasks=tasks)
    base, tuned = base.double(), [t.double() for t in tuned]
    options = {"elect": elect, "normalize": normalize, "alpha": 0.5}
    options["sparsifiers"] = rules_for(base, tuned, elect, kind)
    got = elect_and_sum(base, tuned, WEIGHTS[:tasks], backend=backend, **options)
    assert got.dtype == torch.float64
    assert relative_error(got.cpu(), formula(base, tuned, WEIGHTS[:tasks], **options)) < 1e-14


@every_backend(elect_and_sum, reference=False)
@every_election
@normalized_or_not
@every_kind
def test_sums_are_rounded_as_in_the_reference(backend, elect, normalize, kind):
    for dtype in (torch.float32, torch.bfloat16):
        base, tuned = group(9, 13, dtypes=(dtype, torch.float32))
        options = {"elect": elect, "normalize": normalize, "alpha": 0.3}
        options["sparsifiers"] = rules_for(base, tuned, elect, kind)
        assert same_bits(*both(backend, base, tuned, WEIGHTS[:3], **options))


@every_backend(elect_and_sum)
@every_election
@normalized_or_not
@every_dtype
def test_whole_numbers_are_exact_in_every_dtype(backend, elect, normalize, dtype):
    base, tuned = whole_numbers(1, 131 if simulated(backend) else 613, tasks=4)
    options = {"elect": elect, "normalize": normalize, "alpha": 2.0, "sparsifiers": sparsifiers(base, tuned, "ties")}
    weights = [1.0, 2.0, 1.0, 4.0]
    got = elect_and_sum(base.to(dtype), [t.to(dtype) for t in tuned], weights, backend=backend, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = formula(base, tuned, weights, **options)
    assert relative_error(got.cpu(), exact) < (1e-7 if normalize else 1e-15)


@every_backend(elect_and_sum, reference=False)
@given(
    data=st.data(),
    values=st.sampled_from(sorted(VALUES)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=6),
    layouts=st.lists(layout_names, min_size=6, max_size=6),
    elect=st.sampled_from(ELECTIONS),
    normalize=st.booleans(),
    kinds=st.one_of(st.sampled_from(KINDS), st.lists(st.sampled_from(KINDS[:-1]), min_size=5, max_size=5)),
    alpha=st.sampled_from([1.0, 0.3, -2.0]),
    weights=st.sampled_from([WEIGHTS, CANCELLING]),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_reference(
    backend, data, values, dtypes, layouts, elect, normalize, kinds, alpha, weights, seed
):
    torch.manual_seed(seed)
    shape = data.draw(shapes(backend))
    origin = torch.zeros(shape) if "subnormal" in values else torch.randn(shape)
    tensors = [origin, *(origin + VALUES[values](shape) for _ in dtypes[1:])]
    base, *tuned = (LAYOUTS[how](x.to(dtype)) for x, dtype, how in zip(tensors, dtypes, layouts, strict=False))
    options = {"elect": elect, "normalize": normalize, "alpha": alpha}
    options["sparsifiers"] = rules_for(base, tuned, elect, kinds)
    got, expected = both(backend, base, tuned, weights[: len(tuned)], **options)
    assert got.is_contiguous()
    assert same_bits(got, expected)


@native_backend
@every_kind
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_same_bits_for_any_number_of_threads(backend, kind, tasks):
    base, tuned = whole_numbers(331, 401, tasks=tasks)  # tied magnitudes in every chunk
    rules = sparsifiers(base, tuned, kind)
    for elect in ELECTIONS:
        options = {"elect": elect, "normalize": True, "sparsifiers": rules}
        if elect == "unweighted":  # takes no ranks
            options["sparsifiers"] = [Sparsifier() if rule.ranked is not None else rule for rule in rules]
        expected = elect_and_sum(base, tuned, WEIGHTS[:tasks], backend="torch", **options)
        for threads in (1, 2, 3):
            with torch_threads(threads):
                assert same_bits(elect_and_sum(base, tuned, WEIGHTS[:tasks], backend=backend, **options), expected)


# Small tensors with ties on both sides of a block are among the cases, for the interpreter as well.
@some_backends(elect_and_sum, "cpu", "cuda forward", "cuda reverse", "triton device", "cuda device")
@pytest.mark.parametrize("ties", [0, 1, 512, 513, 1024, 1025, 30_000, 32768, 32769, 69999, 70000])
@pytest.mark.parametrize("field", ["largest", "outliers"])
def test_the_first_ties_go_by_index(backend, ties, field):
    base, tuned = torch.zeros(70_001), torch.full((70_001,), 0.5)
    tuned[::2] = -0.5
    tuned[-1] = 3.0
    rule = Sparsifier(**{field: MagnitudeSelection(torch.tensor(0.5), torch.tensor(ties))})
    got = elect_and_sum(base, [tuned], [1.0], sparsifiers=[rule], backend=backend)
    selected = torch.arange(70_001) < ties
    selected[-1] = True
    assert same_bits(got, torch.where(selected == (field == "largest"), tuned, 0))


@some_backends(elect_and_sum, "cuda forward", "cuda reverse", "triton device", "cuda device")
def test_the_ties_of_more_slices_than_are_summed_at_once(backend):
    size = 2**23 + 5000
    base, tuned = torch.zeros(size, dtype=torch.bfloat16), torch.ones(size, dtype=torch.bfloat16)
    keep = [Sparsifier(largest=MagnitudeSelection(torch.tensor(1.0), torch.tensor(2**23 + 1500)))]
    got = elect_and_sum(base, [tuned], [1.0], sparsifiers=keep, backend=backend)
    assert got[: 2**23 + 1500].all() and not got[2**23 + 1500 :].any()


@every_backend(elect_and_sum, reference=False)
@every_election
def test_many_tasks_with_ties_everywhere(backend, elect):
    shape = (11, 11) if simulated(backend) and backend == "triton" else (131, 97)
    base, tuned = whole_numbers(*shape, tasks=40)
    keep = sparsifiers(base, tuned, [("breadcrumbs", "dare", "ties")[task % 3] for task in range(40)])
    weights = [(1 + task % 7) / 10 for task in range(40)]  # many votes cancel up to rounding
    assert same_bits(*both(backend, base, tuned, weights, elect=elect, normalize=True, sparsifiers=keep))


@some_backends(elect_and_sum, "triton interpreted")
def test_the_default_block(backend, monkeypatch):
    monkeypatch.undo()  # the fixture's small blocks
    base, tuned = whole_numbers(3000)
    options = {"elect": "sum", "normalize": True, "sparsifiers": sparsifiers(base, tuned, "mixture")}
    assert same_bits(*both(backend, base, tuned, WEIGHTS[:3], **options))


@every_backend(elect_and_sum)
@every_election
@normalized_or_not
def test_base_comes_back_bit_for_bit(backend, elect, normalize):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0, 5e-8], dtype=torch.float16).repeat(50 if simulated(backend) else 200)
    for tuned in ([base.clone()] * 3, [-base.clone().zero_() + base] * 2):
        got = elect_and_sum(base, tuned, WEIGHTS[: len(tuned)], elect=elect, normalize=normalize, backend=backend)
        assert same_bits(got.half(), base)
    changed = [base + 1, base - 1]
    none_of_the_largest = magnitude_select(changed[1].float() - base.float(), 0, backend="torch")
    nothing = [Sparsifier(keep_probability=0.0), Sparsifier(largest=none_of_the_largest)]
    for keep, alpha in ((nothing, 1.0), (None, 0.0)):
        options = {"elect": elect, "normalize": normalize, "alpha": alpha, "sparsifiers": keep}
        assert same_bits(elect_and_sum(base, changed, [1.0, 0.5], backend=backend, **options).half(), base)


@every_backend(elect_and_sum)
@every_election
def test_equal_experts_average_to_themselves(backend, elect):
    base, tuned = whole_numbers(*((8, 25) if simulated(backend) else (40, 50)), tasks=1)
    got = elect_and_sum(base, tuned * 3, [1.0, 1.0, 2.0], elect=elect, normalize=True, backend=backend)
    assert same_bits(got + 0.0, tuned[0] + 0.0)


@every_backend(elect_and_sum)
@every_election
@pytest.mark.parametrize("shape", [(0,), (3, 0), (3, 0, 5), (), (1,), (1, 1), (1, 1, 1)], ids=str)
def test_nothing_and_single_elements(backend, elect, shape):
    base, tuned = group(*shape)
    for kind in ("ties", "everything"):
        options = {"elect": elect, "sparsifiers": sparsifiers(base, tuned, kind)}
        got, expected = both(backend, base, tuned, [1.0, 0.5, 2.0], **options)
        assert got.shape == shape and same_bits(got, expected)


@every_backend(elect_and_sum)
@every_election
@normalized_or_not
def test_nan_and_infinity_reach_the_result(backend, elect, normalize):
    size = {"triton": 300, "cuda": 2000}[backend] if simulated(backend) else 1000
    base, tuned = group(size)
    last = size - 100
    tuned[1][5], tuned[2][last], tuned[0][9] = math.nan, math.inf, -math.inf
    got, expected = both(backend, base, tuned, [1.0] * 3, elect=elect, normalize=normalize)
    assert torch.equal(got.isnan(), expected.isnan()) and same_bits(got.nan_to_num(), expected.nan_to_num())
    assert torch.isnan(got[5])
    if elect != "count":
        assert torch.isinf(got[[last, 9]]).all()
    assert torch.isfinite(got[[i for i in range(size) if i not in (5, 9, last)]]).all()


@every_backend(elect_and_sum)
def test_dare_keeps_the_mean(backend):
    shape = (50, 40) if simulated(backend) else (500, 400)
    base, ones = torch.zeros(shape), torch.ones(shape)
    keep = [Sparsifier(keep_probability=0.1, seed=3, substream=task, rescale=10.0) for task in range(2)]
    got = elect_and_sum(base, [ones, -ones], [1.0, 1.0], sparsifiers=keep, backend=backend)
    assert set(got.unique().tolist()) == {-10.0, 0.0, 10.0}
    for value, share in [(10.0, 0.09), (-10.0, 0.09), (0.0, 0.82)]:
        assert float((got == value).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(0.25 / got.numel()))


@every_backend(elect_and_sum)
def test_inputs_are_left_alone(backend):
    base, tuned = group(10, 30)
    copies = [t.clone() for t in (base, *tuned)]
    keep = sparsifiers(base, tuned, "mixture")
    elect_and_sum(base, tuned, [1.0] * 3, elect="sum", normalize=True, sparsifiers=keep, backend=backend)
    assert all(same_bits(t, copy) for t, copy in zip((base, *tuned), copies, strict=True))


@on_devices(elect_and_sum)
@every_model_shape
@every_dtype
@every_election
def test_sizes_of_models(backend, shape, dtype, elect):
    base = 0.02 * torch.randn(shape)
    tuned = [(base + 1e-3 * torch.randn(shape)).to(dtype) for _ in range(3)]
    base, tasks = base.to(dtype), range(3)
    chances = della_probabilities(shape[-1], 0.4, 0.2)
    rules = {
        "all": [Sparsifier()] * 3,
        "mask": [Sparsifier(mask=random_mask(shape, 0.3, seed=5, substream=t, device="cuda")) for t in tasks],
        "ties": [Sparsifier(largest=magnitude_select(t, kept_count(0.3, t.numel()), base=base)) for t in tuned],
        "dare": [Sparsifier(keep_probability=0.3, rescale=1 / 0.3, seed=7, substream=t) for t in tasks],
    }
    if elect != "unweighted":  # takes no ranks
        ranked = [RankedSparsifier(magnitude_ranks(x, base=base), chances) for x in tuned]
        rules["della"] = [Sparsifier(ranked=ranked[t], seed=7, substream=t) for t in tasks]
    for keep in rules.values():
        options = {"elect": elect, "normalize": True, "alpha": 0.7, "sparsifiers": keep}
        assert same_bits(*both(backend, base, tuned, [1.0, 0.5, -2.0], **options))


@on_devices(elect_and_sum)
def test_on_another_stream(backend):
    def run(base, x, which):
        return elect_and_sum(base, [x, x], [1.0, 2.0], elect="sum", backend=which)

    check_on_another_stream(elect_and_sum, backend, run)


@large
@on_devices(elect_and_sum)
def test_more_elements_than_a_32_bit_index_counts(backend):
    base, x = torch.zeros(2, BEYOND_32_BITS, dtype=torch.bfloat16).unbind()
    x[-3:] = torch.tensor([1.0, -2.0, 3.0])
    keep = [Sparsifier(largest=magnitude_select(x, 2, backend=backend))]
    merged = elect_and_sum(base, [x], [1.0], sparsifiers=keep, backend=backend)
    assert merged[-3:].tolist() == [0.0, -2.0, 3.0] and not merged[:-3].any()


@every_backend(elect_and_sum)
def test_what_it_refuses(backend):
    base, tuned = group(4, 5, tasks=2)

    def merge(tuned=tuned, weights=(1.0, 1.0), **options):
        return elect_and_sum(base, tuned, weights, **{"backend": backend, **options})

    with pytest.raises(ShapeError, match="at least one"):
        merge([], [])
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        merge([tuned[0], tuned[1].T])
    with pytest.raises(DTypeError, match="int32"):
        merge([tuned[0], tuned[1].int()])
    with pytest.raises(DeviceError):
        merge([tuned[0], tuned[1].to("meta")])
    with pytest.raises(ConfigError, match="none, sum, count, unweighted"):
        merge(elect="total")
    with pytest.raises(ConfigError, match="weights: 2 tasks but 3 numbers"):
        merge(weights=[1.0] * 3)
    with pytest.raises(ConfigError, match="2 tasks but 1 sparsifiers"):
        merge(sparsifiers=[Sparsifier()])
    for mask, error in ((base.T > 0, ShapeError), ((base > 0).to("meta"), DeviceError), (base, DTypeError)):
        with pytest.raises(error, match="mask of task 1"):
            merge(sparsifiers=[Sparsifier(), Sparsifier(mask=mask)])
    ranked = RankedSparsifier(magnitude_ranks(base), torch.ones(5, dtype=torch.float64, device="cpu"))
    with pytest.raises(ConfigError, match="task 1 is selected by ranks"):
        merge(sparsifiers=[Sparsifier(), Sparsifier(ranked=ranked)], elect="unweighted")
    with pytest.raises(ConfigError, match="sum to 0"):
        merge(weights=[1.0, -1.0], normalize=True)
    for options in ({"weights": [1.0, math.nan]}, {"alpha": math.inf}):
        with pytest.raises(ConfigError, match="finite"):
            merge(**options)
    with pytest.raises(BackendUnavailableError, match="elect_and_sum"):
        merge(backend="abacus")


@pytest.mark.parametrize(
    "fields",
    [
        {"keep_probability": 1.5},
        {"seed": -1},
        {"substream": 2**32},
        {"rescale": math.inf},
        {"keep_probability": math.nan},
    ],
)
def test_sparsifiers_that_are_refused(fields):
    with pytest.raises(ConfigError, match="Sparsifier"):
        Sparsifier(**fields)


@native_backend
def test_the_native_module_names_the_op_in_its_errors(backend):
    native = backends.native(backend)
    base, task = matrix(torch.zeros(4)), (1.0, 1.0, (0.0, -1), (0.0, -1), (2**32, 0, 0, 0), (0, 0, 0), 0)
    for arguments, message in [
        (([matrix(torch.zeros(5))], [task], 0), "the tensors differ in size"),
        (([base], [], 0), "not one task per tensor"),
        (([base], [task], 4), "unknown election code"),
    ]:
        with pytest.raises(RuntimeError, match=f"elect_and_sum: {message}"):
            native.elect_and_sum(base, *arguments, False, 0.0, 1.0, 0, *([1] * (2 if backend == "cpu" else 1)))
