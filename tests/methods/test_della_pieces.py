"""DELLA ranks some rows at a time: the bits do not depend on how many."""

import math

import pytest
import torch
from compare import same_bits
from merging import group

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.methods import della
from r_tsvm_kernels.methods.della import rows_of_piece


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("shape", [(40, 24), (37, 6), (33, 7), (12, 5, 3), (60,), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pieces_change_no_bit(method, shape, dtype, monkeypatch):
    base, tuned = group(shape, 3, dtype)
    config = MergeConfig(method, density=[0.5, 0.3, 1.0], epsilon=0.2, seed=3)
    whole = merge_tensors(base, tuned, config, name="w").weight
    assert whole.dtype == dtype
    for elements in (1, 50, 200):
        monkeypatch.setitem(della._PIECE, "cpu", elements)
        assert same_bits(merge_tensors(base, tuned, config, name="w").weight, whole)
        per_row = math.prod(shape[1:])
        assert rows_of_piece(per_row, "cpu") * per_row % 4 == 0
