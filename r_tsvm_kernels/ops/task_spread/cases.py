"""Cases of `task_spread`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._cases import BFLOAT16, FLOAT32, FLOAT64, Case, group, groups, seeded, spoiled

# See `_cases`.
WIDTHS = {"spread_kernel": (8, 16)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups; few and many tasks; tasks that agree; NaN and infinity."""
    for label, base, tuned in groups(device):
        yield Case(label, (base, tuned))
    random = seeded(device)
    for tasks in (1, 2, 8, 9, 20, 21):  # the Triton kernel reads up to 8 tasks once, and up to 20 twice
        for dtypes in ([BFLOAT16] * (tasks + 1), [FLOAT64, *[FLOAT32] * tasks]):
            base, tuned = group((7, 43), dtypes, random)
            yield Case(f"{tasks} tasks, {dtypes[0]}".replace("torch.", ""), (base, tuned))
    base, (one,) = group((500,), [BFLOAT16] * 2, random)
    yield Case("tasks that agree", (base, [one] * 3))
    yield Case("NaN and infinity", spoiled(device))
    yield Case("8 models", group((16, 40), [BFLOAT16] * 9, random), compiled=True)
    for tasks in (2, 8, 20):
        yield Case(f"{tasks} tasks of a model", group((13, 31), [BFLOAT16] * (tasks + 1), random), compiled=True)
    yield Case("float64 models", group((13, 31), [FLOAT64] * 9, random), compiled=True)
    yield Case("mixed models", group((9, 48), [FLOAT32, *[BFLOAT16] * 8], random), compiled=True)
