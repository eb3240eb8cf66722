"""Step 6 of rtsvm: weighted orthogonalisation, damping and retention, against their formulas in float64."""

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error
from spectra import spectrum

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg import Factored, long_side_is_whole
from r_tsvm_kernels.methods import METHODS

SHAPES = [(40, 40), (60, 25), (25, 60)]


def models(shape, tasks=3, size=0.3):
    base = spectrum("flat", *shape, 99)
    return base, [base + size * spectrum("power 0.5", *shape, seed) for seed in range(tasks)]


def expected(base, tuned, power, damping, retention, weights):
    """The update in float64."""
    deltas = [(t.double() - base.double()).numpy() for t in tuned]
    live = [delta for delta in deltas if delta.any()]
    squares = [np.sum(delta**2) for delta in deltas]
    disagreement = 1 - np.sum(np.mean(live, axis=0) ** 2) / np.mean([np.sum(delta**2) for delta in live])
    norms = [np.linalg.norm(delta, 2) for delta in deltas]
    largest = max(np.linalg.norm(base.double().numpy(), 2), *norms)
    factors = [1 / (1 + damping * disagreement * (norm / largest) ** 2) for norm in norms]
    if retention == "auto":
        pairs = [np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)) for i, a in enumerate(live) for b in live[:i]]
        retention = (1 - max(0, np.mean(pairs))) ** 4 / 2
    lead = None if long_side_is_whole(base.shape, len(live)) else -(-min(base.shape) // len(live))
    plain = oracle.weighted_merge(deltas, [1.0] * len(deltas), power, None, lead)
    kept = [np.sum(plain * delta) / square for delta, square in zip(deltas, squares, strict=True) if square]
    gain = min(max(np.mean(kept), 0.25), 1) ** -retention
    weights = [w * g for w, g in zip(weights, factors, strict=True)]
    return gain * oracle.weighted_merge(deltas, weights, power, None, lead), factors, kept, gain


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("power", "damping", "retention"), [(1.0, 2.0, "auto"), (1.0, 0.0, 0.5), (0.5, 2.0, 0.0), (0.75, 1.0, 1.0)]
)
def test_the_formula(shape, power, damping, retention):
    base, tuned = models(shape)
    weights = [1.0, 0.5, 2.0]
    options = {"orthogonalization_power": power, "damping": damping, "retention": retention, "alpha": 0.7}
    got = merge_tensors(base, tuned, "rtsvm", outlier_weighting="none", weight=weights, **options)
    update, factors, kept, gain = expected(base, tuned, power, damping, retention, weights)
    assert relative_error(got.weight.double() - base.double(), 0.7 * update) < 1e-5
    report = got.report
    assert report.damping == pytest.approx(factors, rel=1e-5)
    assert report.retained == pytest.approx(kept, rel=1e-5)
    assert report.gain == pytest.approx(gain, rel=1e-5)
    assert report.weights == weights


def test_power_0_keeps_the_ranks_of_tsv_merge():
    base, tuned = models((40, 40))
    plain = merge_tensors(base, tuned, "rtsvm", preset="tsvm")
    damped = merge_tensors(base, tuned, "rtsvm", preset="tsvm", damping=1e-12)
    assert torch.equal(plain.weight, merge_tensors(base, tuned, "tsvm").weight)
    assert relative_error(damped.weight, plain.weight.double()) < 1e-6
    assert plain.report.ranks == damped.report.ranks == [13] * 3


def test_presets():
    base, tuned = models((40, 40))

    def merged(**options):
        return merge_tensors(base, tuned, "rtsvm", **options).weight

    weighted = {"outlier_weighting": "none", "orthogonalization_power": 1.0, "damping": 2.0, "retention": "auto"}
    assert torch.equal(merged(preset="weighted"), merged(**weighted, rank="full"))
    assert torch.equal(merged(preset="weighted", damping=0.0), merged(**weighted | {"damping": 0.0}))
    reconstruction = {"outlier_weighting": "clip", "rank": "sparsity", "orthogonalization_power": 0.0}
    assert torch.equal(merged(preset="reconstruction"), merged(**reconstruction, damping=0.0, retention=0.0))
    assert not torch.equal(merged(preset="weighted", rank=[10, "auto", "auto"]), merged(preset="weighted"))
    with pytest.raises(ConfigError, match="preset"):
        merged(preset="best")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_laws(shape):
    base, tuned = models(shape)

    def update(models, **options):
        return merge_tensors(base, models, "rtsvm", preset="weighted", **options).weight.double() - base.double()

    for same in ([tuned[0]], [tuned[0]] * 3):  # kappa and g_t are 1
        assert relative_error(update(same), (tuned[0] - base).double()) < 1e-5
    assert relative_error(update([tuned[0], base, tuned[1]]), update(tuned[:2])) < 1e-5
    assert relative_error(update(tuned[::-1]), update(tuned)) < 1e-5
    assert update([tuned[0], 2 * base - tuned[0]]).norm() < 1e-5 * base.norm()
    single = [update(tuned, weight=[float(s == t) for s in range(3)]) for t in range(3)]
    assert relative_error(update(tuned, weight=[2.0, 0.0, -1.0]), 2 * single[0] - single[2]) < 1e-5


def test_a_base_of_zeros_and_untouched_rows():
    _, tuned = models((40, 40))
    zero = torch.zeros(40, 40)
    found = merge_tensors(zero, tuned, "rtsvm", preset="weighted")
    assert all(1 / 3 <= factor <= 1 for factor in found.report.damping)
    base, tuned = models((40, 40))
    for model in tuned:
        model[3], model[:, 5] = base[3], base[:, 5]
    weight = merge_tensors(base, tuned, "rtsvm", preset="weighted").weight
    assert torch.equal(weight[3], base[3])
    assert torch.equal(weight[:, 5], base[:, 5])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_merged_without_their_products(shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    base = spectrum("flat", *shape, 99)
    factors = [
        Factored(torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator), 0.1)
        for _ in range(3)
    ]
    config = MergeConfig("rtsvm", preset="weighted", weight=[1.0, 2.0, 0.5])
    dense = merge_tensors(base, [base + factor.dense() for factor in factors], config)
    with monkeypatch.context() as patch:
        patch.setattr(Factored, "dense", None)
        options = config.options(3)
        assert config.method.factored(options)
        got = config.method.run(base, factors, options)
    assert relative_error(got.weight - base, (dense.weight - base).double()) < 1e-5
    assert got.report.damping == pytest.approx(dense.report.damping, rel=1e-5)
    assert got.report.gain == pytest.approx(dense.report.gain, rel=1e-5)


@pytest.mark.parametrize("solver", ["eigen", "products"])
def test_several_matrices_are_merged_as_one_by_one(solver):
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(24, 20, generator=generator) for _ in range(3)]
    tuned = [[base + torch.randn(24, 20, generator=generator) for _ in range(2)] for base in bases]
    method, given = METHODS["rtsvm"], {"weight": [1.0, 2.0], "density": [1.0] * 2, "rank": ["full"] * 2}
    options = method.parameters(preset="weighted", solver=solver, **given)
    together = method.run_batch(bases, tuned, options)
    for base, models, found in zip(bases, tuned, together, strict=True):
        alone = method.run(base, models, options)
        assert torch.allclose(found.weight, alone.weight, atol=1e-5)
        assert found.report.solver == alone.report.solver == solver
        assert found.report.certificate.route.startswith("products") == (solver == "products")
        assert found.report.gain == pytest.approx(alone.report.gain, abs=1e-5)
        assert found.report.damping == alone.report.damping
