"""The spread of task vectors in Triton: each element separately, with two loops over the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load
from . import reference

BLOCK = 1024
GROUP = 8
MOST = 20  # tasks; the addresses of many more do not fit into the registers


@triton.jit
def spread_kernel(base_ptr, tuned_ptrs, out_ptr, numel, GROUP: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """``out = sum over t of (D_t - mean)^2``, in float64, of the ``D_t = tuned[t] - base`` formed in REAL.

    Up to GROUP tasks are read once, because the compiler keeps the loaded values. More would not fit into the
    registers; a barrier, which loads may not cross, makes it read them again.
    """
    offsets, inside = block_offsets(tl.program_id(0), numel, BLOCK)
    start = load(base_ptr, offsets, inside, REAL)  # (BLOCK,)
    total = tl.zeros((BLOCK,), tl.float64)
    for t in tl.static_range(len(tuned_ptrs)):
        if t > 0 and t % GROUP == 0:
            tl.debug_barrier()
        total += (load(tuned_ptrs[t], offsets, inside, REAL) - start).to(tl.float64)
    mean = total / len(tuned_ptrs)
    spread = tl.zeros((BLOCK,), tl.float64)
    for t in tl.static_range(len(tuned_ptrs)):
        if t > 0 and t % GROUP == 0:
            tl.debug_barrier()
        distance = (load(tuned_ptrs[t], offsets, inside, REAL) - start).to(tl.float64) - mean
        spread += distance * distance
    tl.store(out_ptr + offsets, spread, mask=inside)


def run(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """See `task_spread`; the same bits as the reference. Never waits for the device."""
    if len(tuned) > MOST:
        return reference.run(base, tuned)
    spread = torch.empty(base.shape, dtype=torch.float64, device=base.device)
    numel, real = spread.numel(), REAL[accumulation_dtype(base, *tuned)]
    if numel == 0:
        return spread
    origin, tensors = flat(base), tuple(flat(tensor) for tensor in tuned)
    with device_of(base):
        spread_kernel[(triton.cdiv(numel, BLOCK),)](origin, tensors, spread, numel, GROUP, real, BLOCK, **LAUNCH)
    return spread
