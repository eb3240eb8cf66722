"""Gram matrices of task vectors in Triton: one pass over up to 8 tensors, or over each pair of groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LAUNCH, block_offsets, device_of, flat, load_delta

BLOCK = 256  # an element per thread, whose registers hold the sums of up to GROUP^2 pairs
STEPS = 16  # blocks of a program: few sums across its threads
GROUP = 8


@triton.jit
def gram_kernel(
    tuned_ptrs, base_ptr, mask_ptr, parts_ptr, numel, PAIRS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    """``parts[p, program] = sum((tuned[s] - base) * (tuned[t] - base))`` for each pair ``PAIRS[p] = (s, t)``.

    Over STEPS blocks, in float64, where `mask_ptr` (uint8) is not 0; without base or mask where the pointer is None.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    sums = ()
    for _ in tl.static_range(len(PAIRS)):
        sums += (tl.zeros((BLOCK,), tl.float64),)  # type: ignore[assignment]
    for step in range(STEPS):
        offsets, inside = block_offsets(program * STEPS + step, numel, BLOCK)
        if mask_ptr is not None:
            inside = tl.load(mask_ptr + offsets, mask=inside, other=0) != 0
        vectors = ()
        for t in tl.static_range(len(tuned_ptrs)):
            vector = load_delta(base_ptr, tuned_ptrs[t], None, offsets, inside, tl.float64)  # (BLOCK,)
            vectors += (vector,)  # type: ignore[assignment]
        longer = ()
        for p in tl.static_range(len(PAIRS)):
            longer += (sums[p] + vectors[PAIRS[p][0]] * vectors[PAIRS[p][1]],)  # type: ignore[assignment]
        sums = longer
    for p in tl.static_range(len(PAIRS)):
        tl.store(parts_ptr + p * programs + program, tl.sum(sums[p], axis=0))


def run(tuned: Sequence[Tensor], base: Tensor | None, mask: Tensor | None) -> Tensor:
    """See `task_gram`. Deterministic; never waits for the device."""
    tasks, numel, device = len(tuned), tuned[0].numel(), tuned[0].device
    gram = torch.zeros(tasks, tasks, dtype=torch.float64, device=device)
    if numel == 0:
        return gram
    tensors, programs = [flat(tensor) for tensor in tuned], triton.cdiv(numel, BLOCK * STEPS)
    origin = None if base is None else flat(base)
    chosen = None if mask is None else flat(mask).view(torch.uint8)
    for members, pairs in launches(tasks):
        parts = torch.empty(len(pairs), programs, dtype=torch.float64, device=device)
        with device_of(gram):
            gram_kernel[(programs,)](
                tuple(tensors[t] for t in members), origin, chosen, parts, numel, pairs, STEPS, BLOCK, **LAUNCH
            )  # fmt: skip
        rows, columns = torch.tensor([[members[t] for t in pair] for pair in pairs], device=device).unbind(1)
        gram[rows, columns] = gram[columns, rows] = parts.sum(-1)
    return gram


def launches(tasks: int) -> Iterator[tuple[list[int], tuple[tuple[int, int], ...]]]:
    """Yield tasks, at most two groups, and pairs of places among them; all together each pair of tasks once."""
    groups = [list(range(first, min(first + GROUP, tasks))) for first in range(0, tasks, GROUP)]
    for index, group in enumerate(groups):
        own = range(len(group))
        yield group, tuple((s, t) for s in own for t in own if s >= t)
        for other in groups[:index]:
            yield [*group, *other], tuple((s, len(group) + t) for s in own for t in range(len(other)))
