"""Every reading of R-TSVM against its formula in float64, and what all readings have in common."""

import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import assume, given
from hypothesis import strategies as st

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import choose_rank, tsv_merge
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.methods.rtsvm import prepared_by_kernels
from r_tsvm_kernels.methods.rtsvm_readings import needs_torch, outlier_weights, prepared_in_torch
from r_tsvm_kernels.ops import add_update, pruned_sparsity, reweight_prune, task_statistics

WEIGHTS = [0.5, 1.0, 2.0]
# By the steps of methods/rtsvm.py; a low sigma, so that there are many outliers.
READINGS = [
    *({"outlier_statistic": s, "outlier_weighting": w} for s in ("magnitude", "signed") for w in ("remove", "keep")),
    {"outlier_statistic": "signed"},
    {"outlier_statistic": "signed", "outlier_weighting": "boost"},
    *(
        {"outlier_measure": m, "outlier_weighting": w, "outlier_exponent": e}
        for m in ("share", "mass", "count")
        for w, e in (("damp", 0.5), ("damp", 2.0), ("boost", 1.0))
    ),
    {"outlier_measure": "count", "outlier_weighting": "complement"},
    {"outlier_weighting": "complement", "weight_normalization": "sum"},
    {"outlier_weighting": "damp", "weight_normalization": "sum"},
    {"outlier_weighting": "clip", "weight_normalization": "sum"},  # which has no weights
    {"outlier_sigma": math.inf, "outlier_statistic": "signed", "outlier_weighting": "boost"},
    {"pruning": "threshold", "sparsity_eps": 0.4},
    {"pruning": "threshold", "sparsity_eps": 0.02, "sparsity_relative": "max", "prune_first": True},
    {"prune_first": True, "density": 0.4},
    {"prune_first": True, "density": 0.4, "outlier_weighting": "boost", "outlier_measure": "count"},
    {"sparsity_relative": "max", "sparsity_eps": 0.02},
    {"sparsity_relative": "absolute", "sparsity_eps": 0.004},
    {"sparsity_scope": "consensus", "sparsity_eps": 0.8},
    {"sparsity_scope": "consensus", "density": 0.3, "rank": "shared"},
    {"rank": "sparsity_power", "rank_rho": 2.0},
    {"rank": "sparsity_power", "rank_rho": 0.5, "density": 0.3},
    {"rank_rho": -1.0, "sparsity_eps": 0.5},
    {"rank": "shared", "sparsity_eps": 0.5},
    {"rank": "shared", "rank_rho": -3.0, "sparsity_eps": 1.0},
    {"rank": 0.29},
    {"rank": 0.01},
    {"rank": 0.9},
    {"rank": [3, 8, 99]},
    {"rank": ["sparsity", 0.1, "fixed"]},
]


def group(shape=(50, 37), seed=0, tasks=3):
    """Heavy-tailed task vectors of unequal scales and tails, with means that are not 0."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + 0.01 * (t + 1) * (rng.standard_normal(shape) ** (2 * t + 1) + 0.1) for t in range(tasks)]


def formula(
    base, tuned, *, weights, outlier_sigma=1.5, outlier_statistic="magnitude", outlier_measure="share",
    outlier_weighting="clip", outlier_exponent=1.0, weight_normalization="mean", density=1.0, pruning="count",
    prune_first=False, sparsity_eps=0.1, sparsity_relative="mean", sparsity_scope="task", rank="sparsity", rank_rho=1.0,
):  # fmt: skip
    """The steps at the top of methods/rtsvm.py, one after the other; returns update, weights, sparsities, ranks."""
    T, (m, n), r = len(tuned), base.shape, min(base.shape)
    units = {"mean": np.mean, "max": np.max, "absolute": lambda a: 1.0}

    def limit_of(D):
        return sparsity_eps * units[sparsity_relative](np.abs(D))

    def prune(D, limit):
        if pruning == "threshold":
            return np.where(np.abs(D) > limit, D, 0.0)
        return oracle.keep_largest(D, density)

    prepared, smalls, q = [], [], []
    for W in tuned:
        D = W - base
        D = prune(D, limit_of(D)) if prune_first else D
        limit, values = limit_of(D), np.abs(D) if outlier_statistic == "magnitude" else D
        width = math.inf if outlier_sigma == math.inf else outlier_sigma * values.std()
        outlier = (values - values.mean() if outlier_statistic == "magnitude" else abs(values - values.mean())) > width
        mass = np.abs(D)[outlier].sum()
        q.append({"share": mass / np.abs(D).sum(), "mass": mass, "count": outlier.sum() / (m * n)}[outlier_measure])
        if outlier_weighting == "clip" and outlier_statistic == "magnitude":
            D = np.sign(D) * np.minimum(np.abs(D), values.mean() + width)
        elif outlier_weighting == "clip":
            D = np.minimum(np.maximum(D, values.mean() - width), values.mean() + width)
        elif outlier_weighting == "remove":
            D = D * ~outlier
        elif outlier_weighting == "keep":
            D = D * outlier
        D = D if prune_first else prune(D, limit)
        smalls.append(np.abs(D) <= limit)
        prepared.append(D)

    q = np.maximum(q, 0.1 * np.mean(q)) if outlier_weighting != "complement" else np.array(q)
    q = q if q.any() else np.ones(T)
    w = {"damp": q**-outlier_exponent, "boost": q**outlier_exponent, "complement": 1 - q}.get(outlier_weighting)
    w = np.ones(T) if w is None else w / (w.mean() if weight_normalization == "mean" else w.sum())

    z = [small.mean() for small in smalls]
    if sparsity_scope == "consensus":
        z = [np.logical_and.reduce(smalls).mean()] * T
    if rank == "shared":
        powers = np.array([(1 - share) ** rank_rho for share in z])
        exact = r * powers / powers.sum()
        ranks = np.floor(exact).astype(int)
        assert ranks.min() >= 1
        ranks[np.argsort(ranks - exact)[: r - ranks.sum()]] += 1
        asked = kept = ranks.tolist()
    else:
        rules = rank if isinstance(rank, list) else [rank] * T
        asked = []
        for rule, share in zip(rules, z, strict=True):
            found = {
                "sparsity": min(r, r / T * (1 - share) ** rank_rho),
                "sparsity_power": r / T * (1 - share**rank_rho),
                "fixed": r / T,
            }.get(rule, rule)
            found = Fraction(str(found)) * r if 0 < found < 1 and found == rule else found
            asked.append(max(1, math.floor(found)))
        kept = [min(k, max(1, r // T)) for k in asked]
    weights = [a * b for a, b in zip(weights, w, strict=True)]
    return oracle.tsv_merge(prepared, kept, weights), weights, z, asked, kept


@pytest.mark.parametrize("options", READINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_reading_equals_its_formula(options, dtype):
    options = {"outlier_sigma": 1.5} | options
    base, tuned = group()
    base, tuned = torch.from_numpy(base).to(dtype), [torch.from_numpy(W).to(dtype) for W in tuned]
    given_base, given_tuned = base.double().numpy(), [W.double().numpy() for W in tuned]
    update, weights, sparsities, asked, ranks = formula(given_base, given_tuned, weights=WEIGHTS, **options)
    got = merge_tensors(base, tuned, MergeConfig("rtsvm", weight=WEIGHTS, **options), out_dtype=torch.float64)
    assert got.report.weights == pytest.approx(weights, rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert got.report.sparsities == sparsities
    assert got.report.ranks_asked == asked
    assert all(k <= limit for k, limit in zip(got.report.ranks, ranks, strict=True))  # the numerical rank may be less
    assert got.report.ranks == ranks or options["outlier_weighting"] == "keep"
    assert relative_error(got.weight - base.double(), update) < 1e-5


@pytest.mark.parametrize("options", [{}, {"density": 0.4}, {"outlier_weighting": "boost"}, {"sparsity_eps": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_and_the_kernels_prepare_alike(options, dtype):
    base, tuned = group()
    base, tuned = torch.from_numpy(base).to(dtype), [torch.from_numpy(W).to(dtype) for W in tuned]
    parameters = MergeConfig("rtsvm", **options).options(3)
    assert not needs_torch(parameters)
    got, expected = prepared_in_torch(base, tuned, parameters), prepared_by_kernels(base, tuned, parameters)
    for mine, truth in zip(got.matrices, expected.matrices, strict=True):
        assert mine.dtype == truth.dtype and relative_error(mine, truth) < 1e-6
    assert got.sparsities == expected.sparsities
    assert got.outlier_masses == pytest.approx(expected.outlier_masses, rel=1e-12)
    assert got.outliers == pytest.approx(expected.outliers, rel=1e-12)


@pytest.mark.parametrize("density", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_defaults_are_these_ops_bit_for_bit(density, dtype):
    base, tuned = group((64, 48))
    base, tuned = torch.from_numpy(base).to(dtype), [torch.from_numpy(W).to(dtype) for W in tuned]
    statistics = task_statistics(base, tuned, sigma=3.0, eps=0.1)
    matrices = reweight_prune(base, tuned, statistics, outlier_weighting="clip", density=density)
    sparsities = pruned_sparsity(statistics, outlier_weighting="clip", density=density, eps=0.1)
    ranks = [choose_rank("sparsity", (64, 48), 3, sparsity=z, rho=1.0) for z in sparsities]
    assert ranks == [max(1, min(16, int(48 * (1 / 3) * (1.0 - z)))) for z in sparsities]
    merged = tsv_merge(matrices, ranks, WEIGHTS, workspace=64 << 20)
    got = merge_tensors(base, tuned, MergeConfig("rtsvm", weight=WEIGHTS, density=density), out_dtype=torch.float32)
    assert same_bits(got.weight, add_update(base, merged.matrix, 1.0))
    assert got.report.ranks == got.report.ranks_asked == ranks


WEIGHTINGS = st.sampled_from(["damp", "boost", "complement"])
EVERY = st.sampled_from(READINGS).map(lambda options: {key: value for key, value in options.items() if key != "rank"})


@given(WEIGHTINGS, st.sampled_from(["mean", "sum"]), st.sampled_from(["share", "count"]), st.integers(0, 9))
def test_one_task_with_weights_is_the_fine_tune(weighting, normalization, measure, seed):
    base, tuned = (torch.from_numpy(np.asarray(x)) for x in group((14, 9), seed, tasks=1))
    config = MergeConfig(
        "rtsvm", outlier_weighting=weighting, weight_normalization=normalization, outlier_measure=measure, rank="fixed"
    )
    assert relative_error(merge_tensors(base, [tuned[0]], config).weight, tuned[0]) < 1e-6


@given(EVERY, st.permutations(range(3)), st.sampled_from(["sparsity", "shared", 0.2]), st.integers(0, 9))
def test_the_order_of_tasks_changes_nothing_in_any_reading(options, order, rank, seed):
    base, *tuned = (torch.from_numpy(x) for x in (lambda b, t: [b, *t])(*group((21, 16), seed)))
    common = {"outlier_sigma": 1.5, "rank": rank} | options
    plain = merge_tensors(base, tuned, MergeConfig("rtsvm", weight=WEIGHTS, **common))
    config = MergeConfig("rtsvm", weight=[WEIGHTS[i] for i in order], **common)
    got = merge_tensors(base, [tuned[i] for i in order], config)
    if rank == "shared":  # what rounding leaves goes to the first of equal remainders
        powers = np.array([(1 - z) ** options.get("rank_rho", 1.0) for z in plain.report.sparsities])
        remainders = np.sort(16 * powers / powers.sum() % 1)
        assume(np.diff(remainders).min() > 1e-9)
    assert got.report.ranks_asked == [plain.report.ranks_asked[i] for i in order]
    assert relative_error(got.weight, plain.weight) < 1e-6


@given(EVERY, st.sampled_from([2.0**-20, 0.25, 8.0, -1.0]), st.sampled_from(["sparsity", "shared"]), st.integers(0, 9))
def test_scaling_all_tasks_scales_the_update_in_any_reading(options, c, rank, seed):
    if options.get("sparsity_relative") == "absolute":
        options = {**options, "sparsity_relative": "max"}  # absolute limits do not scale
    _, tuned = group((21, 16), seed)
    base, tuned = torch.zeros(21, 16, dtype=torch.float64), [torch.from_numpy(W) for W in tuned]
    config = MergeConfig("rtsvm", **{"outlier_sigma": 1.5, "rank": rank} | options)
    plain = merge_tensors(base, tuned, config).weight
    assert relative_error(merge_tensors(base, [c * W for W in tuned], config).weight, c * plain) < 1e-6


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), WEIGHTINGS, st.floats(0.01, 900))
def test_weights_are_normalised_and_finite(outliers, weighting, exponent):
    for normalization, expected in (("mean", len(outliers)), ("sum", 1.0)):
        weights = outlier_weights(outliers, weighting, exponent=exponent, normalization=normalization)
        assert sum(weights) == pytest.approx(expected) and min(weights) >= 0


def test_damp_and_boost_are_equally_strong():
    outliers = [0.1, 0.2, 0.8]
    boost, damp = (np.array(outlier_weights(outliers, mode, exponent=0.7)) for mode in ("boost", "damp"))
    product = boost * damp
    assert product == pytest.approx([product[0]] * 3)
    assert boost[2] / boost[0] == pytest.approx(8**0.7)


def test_weights_by_hand():
    assert outlier_weights([0.1, 0.3], "complement") == pytest.approx([2 * 0.9 / 1.6, 2 * 0.7 / 1.6])
    assert outlier_weights([0.1, 0.3], "boost") == pytest.approx([0.5, 1.5])
    assert outlier_weights([0.1, 0.3], "damp", normalization="sum") == pytest.approx([0.75, 0.25])
    assert outlier_weights([0.0, 2.0], "boost") == pytest.approx([2 / 21 * 1, 40 / 21])  # 0 counts as 0.1
    for mode in ("clip", "remove", "keep", "none"):
        assert outlier_weights([0.1, 0.3], mode, normalization="sum") == [1.0, 1.0]
    assert outlier_weights([0.0] * 3, "boost") == outlier_weights([0.0] * 3, "damp") == [1.0] * 3
    assert outlier_weights([1.0] * 3, "complement") == [1.0] * 3


def test_a_rank_that_was_cut_says_so():
    base, tuned = group()
    base, tuned = torch.from_numpy(base), [torch.from_numpy(W) for W in tuned]
    capped = merge_tensors(base, tuned, MergeConfig("rtsvm", rank=[30, 0.5, 5])).report
    assert (capped.ranks_asked, capped.ranks) == ([30, 18, 5], [12, 12, 5])
    energy = merge_tensors(base, tuned, MergeConfig("rtsvm", rank="energy", outlier_weighting="none")).report
    values = [np.linalg.svd((W - base).numpy(), compute_uv=False) ** 2 for W in tuned]
    assert energy.ranks_asked == [int((np.cumsum(v) < 0.95 * v.sum()).sum()) + 1 for v in values]
    assert energy.ranks == [12, 12, 12]
    low = [base + W[:, :2] @ W[:2, :-13].new_ones(2, 37) for W in tuned]
    numerical = merge_tensors(base, low, MergeConfig("rtsvm", rank=9, outlier_weighting="none")).report
    assert (numerical.ranks_asked, numerical.ranks) == ([9, 9, 9], [1, 1, 1])
    assert merge_tensors(base, tuned, MergeConfig("tsvm")).report.ranks_asked == [12, 12, 12]


def test_models_may_have_ranks_of_their_own():
    recipe = {"merge_method": "resm", "models": [{"parameters": {"rank": 4}}, {"parameters": {"rank": 0.1}}, {}]}
    base, tuned = group()
    base, tuned = torch.from_numpy(base), [torch.from_numpy(W) for W in tuned]
    report = merge_tensors(base, tuned, MergeConfig.from_dict(recipe | {"parameters": {"rank": "fixed"}})).report
    assert (report.method, report.ranks) == ("rtsvm", [4, 3, 12])


@pytest.mark.parametrize("options", [*READINGS, {}, {"outlier_weighting": "none", "density": 0.5}], ids=str)
def test_factors_are_kept_only_where_no_step_needs_elements(options):
    parameters = MergeConfig("rtsvm", **options).options(3)
    assert not METHODS["rtsvm"].factored(parameters)
    plain = parameters.model_copy(update={"outlier_weighting": "none", "pruning": "count", "density": (1.0,) * 3})
    kept = METHODS["rtsvm"].factored(plain)
    assert kept == all(rule not in ("sparsity", "sparsity_power", "shared") for rule in plain.rules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: "other"}, f"{name}.*'other'") for name in (
            "outlier_weighting", "outlier_measure", "outlier_statistic", "weight_normalization", "pruning",
            "prune_first", "sparsity_relative", "sparsity_scope", "rank",
        )),
        ({"outlier_exponent": 0.0}, "outlier_exponent.*greater than 0"),
        ({"outlier_exponent": math.inf}, "outlier_exponent.*finite"),
        ({"rank_rho": math.nan}, "rank_rho.*finite"),
        ({"rank": -0.2}, "rank.*greater than"),
        ({"rank": [2, "shared", 2]}, "rank: shared divides r among all models"),
        ({"rank": "sparsity_power", "rank_rho": -1.0}, "sparsity_power needs an exponent >= 0"),
        ({"outlier_weighting": "complement", "outlier_measure": "mass"}, "complement.*share or count"),
        ({"pruning": "threshold", "density": 0.5}, "density: pruning by threshold"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig("rtsvm", **options).options(3)
