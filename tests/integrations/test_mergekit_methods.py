"""Methods that we have under mergekit's names, against mergekit's own functions on the same tensors, in float64."""

import pytest
import torch

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.integrations import mergekit as integration

mergekit = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed: run make test-integrations")
api = pytest.importorskip("mergekit.merge_methods.api", reason="this mergekit has no register(): 0.1.5 has")

SHAPES = [(24, 17), (61,), (40, 300)]


def tensors(shape, tasks):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(tasks))
    keep = (torch.rand(shape, generator=generator) < 0.5 for _ in range(tasks))
    return base, [base + torch.where(own, 0.05 * x**3, 0) for own, x in zip(keep, noise, strict=True)]


def theirs(method, base, tuned, parameters):
    integration.uninstall()
    group = tuned if base is None else [base, *tuned]
    return api.merge_tensors(group, method, parameters=parameters, base_index=None if base is None else 0)


CASES = {
    "nearswap": ("nearswap", 1, {"t": 0.01}),
    "nearswap-tiny": ("nearswap", 1, {"t": 5e-7}),
    "arcee_fusion": ("arcee_fusion", 1, {}),
    "ram": ("ram", 3, {}),
    "ram-epsilon": ("ram", 3, {"epsilon": 0.02}),
    "ramplus_tl": ("ramplus_tl", 3, {}),
    "ramplus_tl-options": ("ramplus_tl", 4, {"r": 0.7, "alpha": 0.9, "epsilon": 0.02}),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_methods(case, shape):
    method, tasks, parameters = CASES[case]
    base, tuned = tensors(shape, tasks)
    want = theirs(method, base, tuned, parameters)
    got = merge_tensors(base, tuned, MergeConfig(method, parameters=parameters)).weight
    # The gains of ramplus_tl are quotients of integers, which torch, and so mergekit, forms in float32.
    assert (got - want).norm() <= (1e-7 if method == "ramplus_tl" else 1e-12) * want.norm()
    assert (want - base).norm() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("weights", [(0.3, 0.9), (1.0, 1.0), (2.0, -0.5), (1.0, -1.0)], ids=str)
@pytest.mark.parametrize("form", ["whole", "rows", "columns"])
def test_nuslerp(shape, with_base, weights, form):
    base, tuned = tensors(shape, 2)
    options = {"nuslerp_flatten": form == "whole", "nuslerp_row_wise": form == "columns"}
    want = theirs("nuslerp", base if with_base else None, tuned, {"weight": list(weights), **options})
    config = MergeConfig("nuslerp", weight=list(weights), **options)
    got = merge_tensors(base if with_base else None, tuned, config).weight
    assert (got - want).norm() <= 1e-9 * want.norm()
