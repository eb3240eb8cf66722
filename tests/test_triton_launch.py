"""The Triton kernels as they are launched: what Triton makes of the arguments compiles, on a machine without a GPU.

The cross-compile tests state the types of arguments themselves, for many variants; here Triton finds them out.
"""

import os

import pytest
import torch

from r_tsvm_kernels import backends
from r_tsvm_kernels.ops import (
    RankedSparsifier,
    Sparsifier,
    add_update,
    della_probabilities,
    elect_and_sum,
    gemm3,
    magnitude_ranks,
    magnitude_select,
    random_mask,
    ranked_mask,
    reweight_prune,
    split_planes,
    symm_gram,
    symm_square,
    task_gram,
    task_spread,
    task_statistics,
)

STATE = "its interpreter is on" if os.environ.get("TRITON_INTERPRET") == "1" else backends.triton_state()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STATE != backends.READY, reason=f"compiles with Triton: {STATE}"),
]

SHAPE = (129, 1031)
ARCHITECTURE = 90


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Names and compiled kernels of all launches."""
    from triton_without_gpu import launches

    from r_tsvm_kernels.ops import _triton_products
    from r_tsvm_kernels.ops.gemm3 import triton_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backends, "triton_interpreter_state", lambda: backends.READY)  # CPU tensors are taken
    for module in (_triton_products, triton_kernel):
        monkeypatch.setattr(module, "tile_of", lambda tensor: _triton_products.TILES[ARCHITECTURE])
    with launches(ARCHITECTURE) as found:
        yield found
    assert all("cubin" in kernel.asm for _, kernel in found)


def names(launched):
    return {name for name, _ in launched}


def group(tasks=3):
    base = torch.randn(SHAPE)
    return base.bfloat16(), [(base + 1e-3 * torch.randn(SHAPE)).bfloat16() for _ in range(tasks)]


def test_statistics_and_pruning(launched):
    base, tuned = group()
    statistics = task_statistics(base, tuned, backend="torch")
    task_statistics(base, tuned, backend="triton")
    add_update(base, tuned[0].float(), 0.3, backend="triton")
    random_mask(SHAPE, 0.3, seed=2**63 + 5, substream=3, backend="triton")
    magnitude_select(tuned[0], [1, 2, 3], backend="triton")
    reweight_prune(base, tuned, statistics, backend="triton")
    assert names(launched) == {
        "moments_kernel", "tail_kernel", "add_update_kernel", "random_mask_kernel", "digit_kernel", "prune_kernel"
    }  # fmt: skip


def test_merging_of_tasks_that_are_sparsified_differently(launched):
    base, tuned = group()
    top = magnitude_select(tuned[0], 500, base=base, backend="torch")
    ranked = RankedSparsifier(magnitude_ranks(tuned[1], backend="torch"), della_probabilities(SHAPE[1], 0.4, 0.2))
    masked = Sparsifier(mask=base > 0)
    keep = [Sparsifier(largest=top, outliers=top), Sparsifier(seed=7, ranked=ranked), masked]
    for elect, some in (("sum", [Sparsifier()] * 3), ("sum", keep), ("unweighted", [masked, Sparsifier(), masked])):
        elect_and_sum(base, tuned, [1.0, 0.5, -2.0], elect=elect, normalize=True, sparsifiers=some, backend="triton")
    assert names(launched) == {"tie_kernel", "elect_and_sum_kernel"}


def test_masks_and_coefficients(launched, monkeypatch):
    from r_tsvm_kernels.ops.ranked_mask import triton_kernel

    # A launch does nothing here: what it should have written would be refused as not finite.
    monkeypatch.setattr(triton_kernel, "magnitude_ranks", lambda x, base: torch.zeros(x.shape, dtype=torch.int32))
    base, tuned = group(tasks=9)
    for number in (1, 2, 9):
        task_gram(tuned[:number], base=base, mask=base > 0, backend="triton")
        task_gram(tuned[:number], backend="triton")
        task_spread(base, tuned[:number], backend="triton")
    ranked_mask(tuned[0], della_probabilities(SHAPE[1], 0.4, 0.2), seed=2**63 + 5, base=base, backend="triton")
    assert names(launched) == {"gram_kernel", "spread_kernel", "ranked_mask_kernel"}


def test_products(launched):
    x, symmetric = torch.randn(2, 96, 64), torch.randn(2, 64, 64)
    planes, square = (split_planes(y, backend="triton") for y in (x, symmetric))
    symm_gram(planes, backend="triton")
    symm_square(square, -1.0, 2.0, done=torch.zeros(2, dtype=torch.int32), backend="triton")
    gemm3(planes.mT, planes, 0.5, 1.0, symmetric.bfloat16(), out_dtype=torch.bfloat16, backend="triton")
    assert names(launched) == {"split_kernel", "symmetric_kernel", "gemm3_kernel"}
