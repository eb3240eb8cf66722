"""Cases of `task_gram`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Case, group, groups, seeded, spoiled, unaligned

# See `_cases`.
WIDTHS = {"gram_kernel": (2, 8)}  # an element per thread


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups with and without base and mask; few and many tasks; NaN and infinity."""
    random = seeded(device)

    def some_of(x: Tensor) -> Tensor:
        return torch.rand(x.shape, generator=random, device=device) < 0.5

    for label, base, tuned in groups(device):
        tuned = [x.masked_fill(x.abs() > 1e150, 1.5) for x in tuned]  # the squares of larger ones overflow
        yield Case(label, (tuned,), {"base": base})
        yield Case(f"{label}, masked", (tuned,), {"base": base, "mask": some_of(base)})
        yield Case(f"{label}, alone", (tuned,))
        yield Case(f"{label}, alone, masked", (tuned,), {"mask": some_of(base)})
    for tasks in (1, 2, 8, 9, 16, 17, 20):  # the Triton kernel takes groups of 8
        for dtypes in ([BFLOAT16] * (tasks + 1), [BFLOAT16, *([FLOAT32, BFLOAT16] * tasks)[:tasks]]):
            base, tuned = group((7, 43), dtypes, random)
            yield Case(f"{tasks} tasks, {dtypes[-1]}", (tuned,), {"base": base, "mask": some_of(base)})
    for label, base, tuned in unaligned(device):
        yield Case(label, (tuned,), {"base": base})
    base, tuned = spoiled(device)
    yield Case("NaN and infinity", (tuned,), {"base": base})
    finite = base.isfinite() & torch.stack(tuned).isfinite().all(0)
    yield Case("NaN and infinity outside of the mask", (tuned,), {"base": base, "mask": finite})
    yield Case("NaN and infinity, some masked", (tuned,), {"base": base, "mask": some_of(base)})
    for tasks in (2, 8, 9):
        base, tuned = group((16, 40), [BFLOAT16] * (tasks + 1), random)
        yield Case(f"{tasks} tasks of a model", (tuned,), {"base": base, "mask": some_of(base)}, compiled=True)
        yield Case(f"{tasks} tasks of a model, alone", (tuned,), compiled=True)
    for dtypes in ([FLOAT16] * 9, [FLOAT32] * 9, [FLOAT64] * 9, [FLOAT32, *[BFLOAT16] * 8]):
        base, tuned = group((16, 40), dtypes, random)
        yield Case(f"{dtypes[0]} with {dtypes[1]}", (tuned,), {"base": base, "mask": some_of(base)}, compiled=True)
    base, tuned = group((13, 31), [BFLOAT16] * 9, random)
    yield Case("odd sizes", (tuned,), {"base": base, "mask": some_of(base)}, compiled=True)
