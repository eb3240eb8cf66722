"""Pruning into fp16 planes in Triton, in the interpreter."""

import pytest
import torch
from interpreted import interpreted, small_blocks
from test_reweight_prune_planes import check

pytestmark = [*interpreted, pytest.mark.usefixtures(small_blocks.__name__)]


@pytest.mark.parametrize("weighting", ["clip", "none"])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16)], ids=str)
def test_planes_equal_the_reference(weighting, density, dtypes):
    base = torch.randn(17, 23).to(dtypes[0])
    tuned = [torch.randn(17, 23).to(dtypes[1]), base.to(dtypes[1]), 1e-3 * torch.randn(17, 23).to(dtypes[1])]
    check(base, tuned, weighting, density, backend="triton")
