"""FusionBench's own TSVM, Iso-C, Iso-CTS and TIES against float64 formulas; it has no tests of them.

Nothing here knows of our backend: `make test-integrations` runs these tests without it and with it.
"""

import numpy as np
import pytest
import torch
from compare import relative_error
from oracle import polar, tsvm
from torch import nn

fusion_bench = pytest.importorskip("fusion_bench", reason="FusionBench is not installed: run make test-integrations")
from fusion_bench import BaseModelPool  # noqa: E402  # only where it is installed
from fusion_bench.method import (  # noqa: E402
    DareTiesMerging,
    ISO_C_Merge,
    ISO_CTS_Merge,
    TaskSingularVectorMerging,
    TiesMergingAlgorithm,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of FusionBench and lightning
TASKS = ("a", "b", "c")


def network(seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 36), nn.LayerNorm(36), nn.Linear(36, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.05 if seed else 1))
    return model


@pytest.fixture
def pool():
    """A base and three fine-tunes whose task vectors have full rank."""
    models = {"_pretrained_": network(0)} | {name: network(task + 1) for task, name in enumerate(TASKS)}
    with torch.no_grad():
        for name in TASKS:
            for parameter, start in zip(models[name].parameters(), models["_pretrained_"].parameters(), strict=True):
                parameter += start
    return BaseModelPool(models)


def arrays(pool):
    """The base and the task vectors, name by name, in float64."""
    base, *tuned = (pool.load_model(name).state_dict() for name in ("_pretrained_", *TASKS))
    return {
        name: (start.double().numpy().copy(), [(t[name] - start).double().numpy() for t in tuned])
        for name, start in base.items()
    }


def check(merged, expected, limit=1e-4):
    for name, tensor in merged.state_dict().items():
        base, updated = expected[name]
        assert relative_error(tensor.double() - torch.as_tensor(base), updated - base) < limit, name


def iso_c(deltas):
    if deltas[0].ndim != 2:
        return sum(deltas) / len(deltas)
    total = sum(deltas)
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def iso_cts(deltas, fraction):
    if deltas[0].ndim != 2:
        return sum(deltas) / len(deltas)
    short, tasks = min(deltas[0].shape), len(deltas)
    own = round((short - int(short * fraction)) / tasks)
    common = short - own * tasks
    left, values, right = (part[..., :common] for part in _svd(sum(deltas)))
    lefts, cores, rights = [left], [values], [right]
    for delta in deltas:
        u, s, v = _svd(delta - left @ (left.T @ delta))
        lefts.append(u[:, :own])
        cores.append(s[:own])
        rights.append(v[:, :own])
    return np.concatenate(cores).sum() / short * polar(np.hstack(lefts)) @ polar(np.hstack(rights)).T


def _svd(matrix):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.T


def ties(rows, share, how):
    """FusionBench's TIES of (T, D): one element more than the share, and all that are equal to the smallest."""
    size = rows.shape[1]
    smallest = np.sort(np.abs(rows), axis=1)[:, size - int(size * share) - 1, None]
    kept = np.where(np.abs(rows) >= smallest, rows, 0)
    signs = np.sign(kept.sum(0))
    signs = np.where(signs == 0, np.sign(signs.sum()), signs)
    chosen = np.where(np.where(signs > 0, kept > 0, kept < 0), kept, 0)
    return chosen.sum(0) / (np.maximum((chosen != 0).sum(0), 1) if how == "mean" else 1)


@pytest.mark.parametrize("alpha", [1, 0.7, [0.5, 1.0, 2.0]])
def test_tsvm(pool, alpha):
    weights = alpha if isinstance(alpha, list) else None
    scale = 1.0 if weights else alpha
    expected = {}
    for name, (base, deltas) in arrays(pool).items():
        excluded = name == "3.weight"
        if base.ndim == 2 and not excluded:
            expected[name] = base, tsvm(base, [base + delta for delta in deltas], scale, weights)
        else:
            mean = sum(w * delta for w, delta in zip(weights or [1.0] * 3, deltas, strict=True)) / 3
            expected[name] = base, base + scale * mean
    check(TaskSingularVectorMerging(alpha=alpha, exclude_keys=["3.weight"]).run(pool), expected)


def test_tsvm_with_single_task_models(pool):
    whole = TaskSingularVectorMerging(return_single_task_models=True).run(pool)
    assert whole.keys() == {*TASKS, "merged"}


def test_iso_c(pool):
    expected = {name: (base, base + 0.6 * iso_c(deltas)) for name, (base, deltas) in arrays(pool).items()}
    check(ISO_C_Merge(scaling_factor=0.6).run(pool), expected)


@pytest.mark.parametrize("fraction", [0.8, 0.3])
def test_iso_cts(pool, fraction):
    expected = {name: (base, base + iso_cts(deltas, fraction)) for name, (base, deltas) in arrays(pool).items()}
    check(ISO_CTS_Merge(scaling_factor=1.0, common_space_fraction=fraction).run(pool), expected)


@pytest.mark.parametrize("how", ["sum", "mean"])
@pytest.mark.parametrize("threshold", [20, 0.5])
def test_ties(pool, threshold, how):
    given = arrays(pool)
    names = sorted(given)  # FusionBench merges one long vector, sorted by name
    rows = np.stack([np.concatenate([given[name][1][task].ravel() for name in names]) for task in range(len(TASKS))])
    merged = ties(rows, threshold / 100 if threshold > 1 else threshold, how)
    expected, start = {}, 0
    for name in names:
        base = given[name][0]
        expected[name] = base, base + 0.3 * merged[start : start + base.size].reshape(base.shape)
        start += base.size
    algorithm = TiesMergingAlgorithm(scaling_factor=0.3, threshold=threshold, remove_keys=[], merge_func=how)
    check(algorithm.run(pool), expected)


def test_ties_after_dare(pool):
    """Without dropping, DARE-TIES is TIES."""
    arguments = {"scaling_factor": 0.5, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    given = arrays(pool)
    expected = TiesMergingAlgorithm(**arguments).run(pool).state_dict()
    expected = {name: (given[name][0], tensor.double().numpy().copy()) for name, tensor in expected.items()}
    pool.load_model("_pretrained_").load_state_dict({name: torch.as_tensor(base) for name, (base, _) in given.items()})
    algorithm = DareTiesMerging(sparsity_ratio=0.0, only_on_linear_weights=False, rescale=False, **arguments)
    check(algorithm.run(pool), expected)
