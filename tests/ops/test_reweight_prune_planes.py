import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from variants import SHAPES, VALUES

from r_tsvm_kernels.errors import ConfigError, DTypeError, ShapeError
from r_tsvm_kernels.ops import reweight_prune, reweight_prune_planes, split_planes, task_statistics

NARROW = [torch.float32, torch.float16, torch.bfloat16]


def check(base, tuned, weighting, density, **how):
    statistics = task_statistics(base, tuned)
    dense = reweight_prune(base, tuned, statistics, weighting, density, backend="torch")
    expected = split_planes(torch.stack(dense), backend="torch")
    got = reweight_prune_planes(base, tuned, statistics, weighting, density, **how)
    assert got.shape == (len(tuned), *base.shape)
    for mine, truth in ((got.hi, expected.hi), (got.lo, expected.lo), (got.scale, expected.scale)):
        assert same_bits(mine, truth)


@given(
    kind=st.sampled_from(sorted(VALUES)),
    shape=SHAPES.filter(lambda shape: len(shape) == 2),
    dtypes=st.tuples(st.sampled_from(NARROW), st.sampled_from(NARROW)),
    weighting=st.sampled_from(["clip", "damp", "none"]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_equals_pruning_then_splitting(kind, shape, dtypes, weighting, density, seed):
    torch.manual_seed(seed)
    base, *tuned = (VALUES[kind](shape).to(dtype) for dtype in (dtypes[0], *dtypes))
    check(base, tuned, weighting, density)


def test_scales_are_of_each_task():
    base = torch.zeros(8, 8)
    tuned = [scale * torch.randn(8, 8) for scale in (1e-6, 1.0, 1e6)]
    planes = reweight_prune_planes(base, tuned, task_statistics(base, tuned), "none")
    assert torch.allclose(planes.dense(), torch.stack(tuned), rtol=2**-21)
    assert len(set(planes.scale.tolist())) == 3


def test_what_it_refuses():
    base = torch.zeros(3, 3)
    statistics = task_statistics(base, [base])
    with pytest.raises(ShapeError, match="matrices"):
        flat = torch.zeros(3)
        reweight_prune_planes(flat, [flat], task_statistics(flat, [flat]))
    with pytest.raises(DTypeError, match="float64"):
        reweight_prune_planes(base.double(), [base], statistics)
    with pytest.raises(ConfigError, match="densit"):
        reweight_prune_planes(base, [base], statistics, "clip", [0.5, 0.5])
    with pytest.raises(ConfigError, match="outlier_weighting"):
        reweight_prune_planes(base, [base], statistics, "soften")
