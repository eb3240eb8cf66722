"""Every implementation against the formula by numpy in float64; the native ones to the bit against the reference."""

import math

import numpy as np
import oracle
import pytest
import torch
from cases import check
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import LAYOUTS, available
from variants import every_backend as every_way

from r_tsvm_kernels import backends
from r_tsvm_kernels.errors import BackendUnavailableError, ConfigError, DeviceError, DTypeError, ShapeError
from r_tsvm_kernels.ops import (
    MagnitudeSelection,
    RankedSparsifier,
    Sparsifier,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
    random_mask,
)
from r_tsvm_kernels.ops._checks import accumulation_dtype
from r_tsvm_kernels.ops._native import matrix

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ELECTIONS = ["none", "sum", "count", "unweighted"]
WEIGHTS = [1.0, 0.5, 2.0, -0.25, 0.75, 1.5, 0.125, 3.0]

every_backend = pytest.mark.parametrize("backend", available("torch", "cpu"))
native_backend = pytest.mark.parametrize("backend", available("cpu"))
every_election = pytest.mark.parametrize("elect", ELECTIONS)
normalized_or_not = pytest.mark.parametrize("normalize", [False, True])


def group(*shape, tasks=3, dtype=torch.float32, scale=0.05):
    base = torch.randn(shape).to(dtype)
    return base, [(base.double() + scale * torch.randn(shape)).to(dtype) for _ in range(tasks)]


def whole_numbers(*shape, tasks=3):
    """Small whole numbers: sums are exact, and ties, zeros and drawn elections are many."""
    base = torch.randint(-4, 5, shape).float()
    return base, [base + torch.randint(-2, 3, shape) for _ in range(tasks)]


def sparsifiers(base, tuned, kind, density=0.4, gamma=0.1):
    """One `Sparsifier` per task; "mixture" has all kinds at once."""
    dtype = accumulation_dtype(base, *tuned)
    rules = []
    for task, t in enumerate(tuned):
        delta = t.to(dtype) - base.to(dtype)

        def top(fraction, delta=delta):
            return magnitude_select(delta, kept_count(fraction, delta.numel()), backend="torch")

        choices = {
            "all": Sparsifier(),
            "ties": Sparsifier(largest=top(density)),
            "breadcrumbs": Sparsifier(largest=top(density + gamma), outliers=top(gamma)),
            "dare": Sparsifier(keep_probability=density, seed=7, substream=task, rescale=1 / density),
            "mask": Sparsifier(
                mask=random_mask(delta.shape, density, seed=5, substream=task, device=delta.device), rescale=-1.5
            ),
            "everything": Sparsifier(
                largest=top(0.9), outliers=top(0.05), keep_probability=0.7, seed=2**63, rescale=0.3,
                mask=random_mask(delta.shape, 0.8, seed=6, substream=task, device=delta.device),
            ),
        }  # fmt: skip
        rules.append(choices[list(choices)[(task + 1) % 6] if kind == "mixture" else kind])
    return rules


KINDS = ["all", "ties", "breadcrumbs", "dare", "mask", "everything", "mixture"]


def formula(base, tuned, weights, elect, normalize, alpha, sparsifiers):
    """Straight from the papers, all tasks in one array."""
    origin = base.double().numpy()
    weights = np.array(weights).reshape(-1, *[1] * origin.ndim)
    v = np.stack([t.double().numpy() - origin for t in tuned])
    for task, rule in enumerate(sparsifiers):
        order = np.argsort(-np.abs(v[task]), axis=None, kind="stable")
        rank = np.empty(order.size, dtype=np.int64)
        rank[order] = np.arange(order.size)
        rank = rank.reshape(origin.shape)
        survives = np.ones(origin.shape, dtype=bool)
        if rule.largest is not None:
            survives &= rank < int(rule.largest.mask(torch.from_numpy(v[task])).sum())
        if rule.outliers is not None:
            survives &= rank >= int(rule.outliers.mask(torch.from_numpy(v[task])).sum())
        survives &= random_mask(origin.shape, rule.keep_probability, seed=rule.seed, substream=rule.substream).numpy()
        if rule.mask is not None:
            survives &= rule.mask.numpy()
        v[task] *= survives
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
    return torch.as_tensor(origin + alpha * (combined / divisor if normalize else combined))


@every_backend
@every_election
@normalized_or_not
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(backend, elect, normalize, kind):
    base, tuned = (
        x.double() if torch.is_tensor(x) else [t.double() for t in x] for x in whole_numbers(31, 17, tasks=5)
    )
    keep = sparsifiers(base, tuned, kind)
    options = {"elect": elect, "normalize": normalize, "alpha": 0.5, "sparsifiers": keep}
    got = elect_and_sum(base, tuned, WEIGHTS[:5], backend=backend, **options)
    assert got.dtype == torch.float64
    assert relative_error(got, formula(base, tuned, WEIGHTS[:5], **options)) < 1e-14


@every_backend
@every_election
@normalized_or_not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_are_exact_in_every_dtype(backend, elect, normalize, dtype):
    base, tuned = whole_numbers(1, 613, tasks=4)
    options = {"elect": elect, "normalize": normalize, "alpha": 2.0, "sparsifiers": sparsifiers(base, tuned, "ties")}
    weights = [1.0, 2.0, 1.0, 4.0]
    got = elect_and_sum(base.to(dtype), [t.to(dtype) for t in tuned], weights, backend=backend, **options)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = formula(base, tuned, weights, **options)
    assert relative_error(got, exact) < (1e-7 if normalize else 1e-15)


@native_backend
@given(
    shape=st.one_of(
        st.one_of(st.integers(0, 70), st.sampled_from([511, 513, 2049, 32769])).map(lambda n: (n,)),
        st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple),
    ),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=2, max_size=4),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=4, max_size=4),
    elect=st.sampled_from(ELECTIONS),
    normalize=st.booleans(),
    kind=st.sampled_from(KINDS),
    alpha=st.sampled_from([1.0, 0.3, -2.0]),
    seed=st.integers(0, 1000),
)
def test_same_bits_as_the_reference(backend, shape, dtypes, layouts, elect, normalize, kind, alpha, seed):
    torch.manual_seed(seed)
    origin = torch.randn(shape)
    values = [origin, *(origin + 0.1 * torch.randn(shape) for _ in dtypes[1:])]
    tensors = [LAYOUTS[how](v.to(dtype)) for v, dtype, how in zip(values, dtypes, layouts, strict=False)]
    base, tuned = tensors[0], tensors[1:]
    options = {"elect": elect, "normalize": normalize, "alpha": alpha, "sparsifiers": sparsifiers(base, tuned, kind)}
    got, expected = (
        elect_and_sum(base, tuned, WEIGHTS[: len(tuned)], backend=b, **options) for b in (backend, "torch")
    )
    assert got.is_contiguous()
    assert same_bits(got, expected)


@native_backend
@every_election
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_same_bits_for_any_number_of_threads(backend, elect, kind, tasks):
    base, tuned = whole_numbers(331, 401, tasks=tasks)  # tied magnitudes in every chunk
    options = {"elect": elect, "normalize": True, "sparsifiers": sparsifiers(base, tuned, kind)}
    expected = elect_and_sum(base, tuned, WEIGHTS[:tasks], backend="torch", **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert same_bits(elect_and_sum(base, tuned, WEIGHTS[:tasks], backend=backend, **options), expected)
    finally:
        torch.set_num_threads(before)


@native_backend
@pytest.mark.parametrize("ties", [0, 1, 512, 513, 32768, 32769, 69999, 70000])
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


@every_backend
def test_elections_by_hand(backend):
    base = torch.zeros(6)
    tuned = [torch.tensor([3.0, 1.0, -1.0, 0.0, 2.0, 1.0]), torch.tensor([-1.0, 1.0, -3.0, 0.0, -2.0, -9.0]),
             torch.tensor([-1.0, 1.0, 1.0, 5.0, 0.0, 1.0])]  # fmt: skip

    def merge(elect, weights=(1.0, 1.0, 1.0), normalize=True):
        return elect_and_sum(base, tuned, weights, elect=elect, normalize=normalize, backend=backend).tolist()

    assert merge("sum") == [3.0, 1.0, -2.0, 5.0, 2.0, -9.0]
    assert merge("count") == [-1.0, 1.0, -2.0, 5.0, 2.0, 1.0]
    assert merge("sum", normalize=False) == [3.0, 3.0, -4.0, 5.0, 2.0, -9.0]
    assert merge("sum", (1.0, 3.0, 1.0)) == [-4 / 4, 5 / 5, -10 / 4, 5.0, -2.0, -9.0]
    assert merge("unweighted", (1.0, 3.0, 1.0)) == [3.0, 5 / 5, -10 / 4, 5.0, 2.0, -9.0]
    assert merge("none", (1.0, 2.0, 1.0), normalize=False) == [0.0, 4.0, -6.0, 5.0, -2.0, -16.0]
    # A negative weight turns the task vector round before it votes; agreeing weights of sum 0 divide by 1.
    assert merge("sum", (1.0, -1.0, 0.0)) == [4.0, 1.0, -3.0, 0.0, 4.0, 10.0]
    # In an unweighted election it does not: the task is on the side of its difference, and is subtracted there.
    assert merge("unweighted", (2.0, -1.0, 1.0), normalize=False) == [6.0, 2.0, 1.0, 5.0, 4.0, 9.0]


# Decimal weights, so that many sums of quantised differences are 0 by the user's arithmetic, but not by float64's.
CANCELLING = [(0.3, 0.3, 0.6), (0.1, 0.2, 0.3), (0.7, 0.2, 0.9), (0.1, 0.7, -0.8)]


def exact_mean(whole, weights, elect):
    """Return the mean of the elected sign by arithmetic without rounding, and where the votes cancel."""
    tenths = [round(10 * w) for w in weights]
    v = np.stack([w * n for w, n in zip(tenths, whole, strict=True)])
    voters = np.stack(whole) if elect == "unweighted" else np.sign(v) if elect == "count" else v
    agree = np.sign(voters) == np.where(voters.sum(0) >= 0, 1, -1)
    divisor = (agree * np.array(tenths)[:, None]).sum(0)
    update = (agree * v).sum(0)
    return np.where(divisor == 0, update / 10, update / np.where(divisor == 0, 1, divisor)), voters.sum(0) == 0


@every_backend
@pytest.mark.parametrize("elect", ["sum", "count", "unweighted"])
@pytest.mark.parametrize("weights", CANCELLING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plus_wins_where_votes_cancel(backend, elect, weights, dtype):
    """Else their signs come from rounding, and the update of a 16-bit checkpoint is more than a tenth off."""
    base = (8 + torch.rand(20_000)).to(dtype)
    # A few quanta of the dtype each, as of a short fine-tuning.
    quantum = torch.finfo(dtype).eps * 8
    whole = [torch.randint(-9, 10, base.shape) for _ in weights]
    tuned = [(base.double() + quantum * n).to(dtype) for n in whole]
    exact, cancelled = exact_mean([n.numpy() for n in whole], weights, elect)
    assert cancelled.sum() > 100
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0]):
        got = elect_and_sum(
            base, [tuned[i] for i in order], [weights[i] for i in order], elect=elect, normalize=True, backend=backend
        )
        error = np.abs((got.double() - base.double()).numpy() - quantum * exact)
        # A rounding of the merged weights, and of divisors such as 0.8 - 0.7.
        assert (error <= 8 * torch.finfo(torch.float32).eps + 2e-6 * np.abs(quantum * exact)).all(), order


@every_backend
@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_a_majority_by_little_wins(backend, scale):
    """What is not rounding decides: votes that differ in the last bit of float32."""
    base = torch.zeros(2)
    small = 1 + torch.finfo(torch.float32).eps
    tuned = [scale * torch.tensor([1.0, -1.0]), scale * torch.tensor([-small, small])]
    got = elect_and_sum(base, tuned, [1.0, 1.0], elect="sum", backend=backend)
    assert torch.equal(got, tuned[1])
    got = elect_and_sum(base.double(), [t.double() for t in tuned], [small, 1.0], elect="sum", backend=backend)
    assert (got > 0).all()  # these cancel


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agreeing_weights_that_cancel_divide_by_one(backend, dtype):
    base = torch.zeros(3, dtype=dtype)
    tuned = [torch.full_like(base, v) for v in (1.0, 2.0, -1.0)]
    got = elect_and_sum(base, tuned, [0.1, 0.2, -0.3], elect="sum", normalize=True, backend=backend)
    assert torch.allclose(got, torch.full_like(base, 0.1 + 0.4 + 0.3), rtol=1e-6, atol=0)
    # A weight that is small beside the others is none that cancels.
    got = elect_and_sum(base, [-tuned[0], tuned[1]], [1.0, 1e-12], elect="count", normalize=True, backend=backend)
    assert torch.allclose(got, tuned[1], rtol=1e-6, atol=0)


@every_backend
@every_election
@normalized_or_not
def test_base_comes_back_bit_for_bit(backend, elect, normalize):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0, 5e-8], dtype=torch.float16).repeat(200)
    for tuned in ([base.clone()] * 3, [-base.clone().zero_() + base] * 2):
        got = elect_and_sum(base, tuned, WEIGHTS[: len(tuned)], elect=elect, normalize=normalize, backend=backend)
        assert same_bits(got.half(), base)
    changed = [base + 1, base - 1]
    nothing = [
        Sparsifier(keep_probability=0.0),
        Sparsifier(largest=magnitude_select(changed[1].float() - base.float(), 0)),
    ]
    got = elect_and_sum(
        base, changed, [1.0, 1.0], elect=elect, normalize=normalize, sparsifiers=nothing, backend=backend
    )
    assert same_bits(got.half(), base)
    got = elect_and_sum(base, changed, [1.0, 1.0], elect=elect, normalize=normalize, alpha=0.0, backend=backend)
    assert same_bits(got.half(), base)


@every_backend
@every_election
def test_equal_experts_average_to_themselves(backend, elect):
    base, tuned = whole_numbers(40, 50, tasks=1)
    got = elect_and_sum(base, tuned * 3, [1.0, 1.0, 2.0], elect=elect, normalize=True, backend=backend)
    assert same_bits(got + 0.0, tuned[0] + 0.0)


@every_backend
@every_election
def test_nothing_and_single_elements(backend, elect):
    for shape in [(0,), (3, 0, 5), (), (1,), (1, 1, 1)]:
        base, tuned = group(*shape)
        got = elect_and_sum(
            base, tuned, [1.0] * 3, elect=elect, sparsifiers=sparsifiers(base, tuned, "ties"), backend=backend
        )
        assert got.shape == shape


@every_backend
@every_election
@normalized_or_not
def test_nan_and_infinity_reach_the_result(backend, elect, normalize):
    base, tuned = group(1000)
    tuned[1][5], tuned[2][700], tuned[0][9] = math.nan, math.inf, -math.inf
    got = elect_and_sum(base, tuned, [1.0] * 3, elect=elect, normalize=normalize, backend=backend)
    expected = elect_and_sum(base, tuned, [1.0] * 3, elect=elect, normalize=normalize, backend="torch")
    assert torch.equal(got.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    assert torch.isnan(got[5])
    if elect != "count":
        assert torch.isinf(got[[700, 9]]).all()
    assert torch.isfinite(got[[i for i in range(1000) if i not in (5, 9, 700)]]).all()


@every_backend
def test_dare_keeps_the_mean(backend):
    base, tuned = torch.zeros(500, 400), [torch.ones(500, 400), -torch.ones(500, 400)]
    keep = [Sparsifier(keep_probability=0.1, seed=3, substream=task, rescale=10.0) for task in range(2)]
    got = elect_and_sum(base, tuned, [1.0, 1.0], sparsifiers=keep, backend=backend)
    assert set(got.unique().tolist()) == {-10.0, 0.0, 10.0}
    for value, share in [(10.0, 0.09), (-10.0, 0.09), (0.0, 0.82)]:
        assert float((got == value).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(0.25 / 200_000))


def test_inputs_are_left_alone():
    base, tuned = group(40, 30)
    copies = [t.clone() for t in (base, *tuned)]
    elect_and_sum(base, tuned, [1.0] * 3, elect="sum", normalize=True, sparsifiers=sparsifiers(base, tuned, "mixture"))
    assert all(same_bits(t, copy) for t, copy in zip((base, *tuned), copies, strict=True))


@every_backend
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
    ranked = RankedSparsifier(magnitude_ranks(base), torch.ones(5, dtype=torch.float64))
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
    base, task = matrix(torch.zeros(4)), (1.0, 1.0, (0.0, -1), (0.0, -1), (2**32, 0, 0), (0, 0, 0), 0)
    for arguments, message in [
        (([matrix(torch.zeros(5))], [task], 0), "the tensors differ in size"),
        (([base], [], 0), "not one task per tensor"),
        (([base], [task], 4), "unknown election code"),
    ]:
        with pytest.raises(RuntimeError, match=f"elect_and_sum: {message}"):
            native.elect_and_sum(base, *arguments, False, 0.0, 1.0, 0, 1)


@every_way(elect_and_sum, reference=False)
def test_cases(backend):
    check(elect_and_sum, backend)
