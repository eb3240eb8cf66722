"""Time the CPU kernels one by one, after checking them against the reference: `pytest benchmarks/test_cpu_speed.py`.

For comparing runs of ours with each other. Ratios to other implementations come from `elementwise.py`, which runs
both sides in turn.
"""

import pytest
import torch

from r_tsvm_kernels import backends
from r_tsvm_kernels.linalg import Factored, tsv_merge
from r_tsvm_kernels.ops import (
    Keep,
    RankedKeep,
    della_probabilities,
    elect_and_sum,
    magnitude_ranks,
    magnitude_select,
    random_mask,
    ranked_mask,
    reweight_prune,
    task_gram,
    task_spread,
    task_statistics,
)

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(backends.state("cpu") != backends.READY, reason=f"cpu: {backends.state('cpu')}")

SHAPE, TASKS = (2048, 2048), 3


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def inputs(request):
    torch.manual_seed(0)
    base = (0.02 * torch.randn(SHAPE)).to(request.param)
    return base, [(base.float() + 1e-3 * torch.randn(SHAPE)).to(request.param) for _ in range(TASKS)]


def same(first, second):
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def test_task_statistics(benchmark, inputs):
    got, expected = (task_statistics(*inputs, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(got.outlier_mass, expected.outlier_mass, rtol=1e-10, atol=0)
    assert torch.equal(got.small, expected.small)
    benchmark(task_statistics, *inputs, backend="cpu")


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_reweight_prune(benchmark, inputs, density):
    statistics = task_statistics(*inputs)
    arguments = (*inputs, statistics, "clip", density)
    got, expected = (reweight_prune(*arguments, backend=name) for name in ("cpu", "torch"))
    assert all(same(mine, truth) for mine, truth in zip(got, expected, strict=True))
    benchmark(reweight_prune, *arguments, backend="cpu")


@pytest.mark.parametrize("of", ["tensor", "difference"])
def test_magnitude_select(benchmark, inputs, of):
    base, (tuned, *_) = inputs
    origin, keep = base if of == "difference" else None, tuned.numel() // 3
    got, expected = (magnitude_select(tuned, keep, base=origin, backend=name) for name in ("cpu", "torch"))
    assert got.threshold == expected.threshold and got.ties == expected.ties
    benchmark(magnitude_select, tuned, keep, base=origin, backend="cpu")


def test_magnitude_ranks(benchmark, inputs):
    _, (tuned, *_) = inputs
    assert torch.equal(*(magnitude_ranks(tuned, backend=name) for name in ("cpu", "torch")))
    benchmark(magnitude_ranks, tuned, backend="cpu")


def test_ranked_mask(benchmark, inputs):
    base, (tuned, *_) = inputs
    arguments = (tuned, della_probabilities(SHAPE[1], 0.3, 0.1), 1)
    assert torch.equal(*(ranked_mask(*arguments, base=base, backend=name) for name in ("cpu", "torch")))
    benchmark(ranked_mask, *arguments, base=base, backend="cpu")


def test_task_gram(benchmark, inputs):
    base, tuned = inputs
    got, expected = (task_gram(tuned, base, backend=name) for name in ("cpu", "torch"))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    benchmark(task_gram, tuned, base, backend="cpu")


def test_task_spread(benchmark, inputs):
    assert same(*(task_spread(*inputs, backend=name) for name in ("cpu", "torch")))
    benchmark(task_spread, *inputs, backend="cpu")


def test_random_mask(benchmark):
    assert torch.equal(*(random_mask(SHAPE, 0.3, 1, backend=name) for name in ("cpu", "torch")))
    benchmark(random_mask, SHAPE, 0.3, 1, backend="cpu")


@pytest.mark.parametrize("kind", ["sum", "ties", "dare", "della", "sce"])
def test_elect_and_sum(benchmark, inputs, kind):
    base, tuned = inputs
    keep = {
        "sum": lambda t: Keep(),
        "ties": lambda t: Keep(largest=magnitude_select(tuned[t], tuned[t].numel() // 3, base=base)),
        "dare": lambda t: Keep(probability=0.3, rescale=1 / 0.3, stream=t),
        "della": lambda t: Keep(
            stream=t, ranked=RankedKeep(magnitude_ranks(tuned[t], base=base), della_probabilities(SHAPE[1], 0.3, 0.1))
        ),
        "sce": lambda t: Keep(mask=tuned[0] > base),
    }[kind]
    elect = {"sum": "none", "sce": "unweighted"}.get(kind, "sum")
    options = {"elect": elect, "keep": [keep(t) for t in range(TASKS)]}
    assert same(*(elect_and_sum(base, tuned, [1.0] * TASKS, backend=name, **options) for name in ("cpu", "torch")))
    benchmark(elect_and_sum, base, tuned, [1.0] * TASKS, backend="cpu", **options)


@pytest.mark.parametrize("share", [1, 2, 8])
def test_tsv_merge(benchmark, share):
    matrices = [torch.randn(768, 768) for _ in range(TASKS)]
    merged = benchmark(tsv_merge, matrices, [768 // TASKS // share] * TASKS)
    assert merged.certificate.met


def test_tsv_merge_of_factors(benchmark):
    tasks = [Factored(torch.randn(4096, 16), torch.randn(16, 4096)) for _ in range(TASKS)]
    assert benchmark(tsv_merge, tasks, [16] * TASKS).certificate.met
