"""Cases of `spread_select`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...errors import ConfigError, NonFiniteError
from .._cases import BFLOAT16, FLOAT32, FLOAT64, Case, group, groups, normal, seeded, spoiled
from ..task_spread.reference import run as task_spread

# See `_cases`.
WIDTHS: dict[str, tuple[int, int]] = {}  # the kernels are those of other ops


def share(number: float) -> Callable[[int], int]:
    """Return the rule that keeps this share."""
    return lambda differing: int(differing * number)


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups; few and many tasks; tasks that agree; close and equal spreads; NaN and infinity."""
    for label, base, tuned in groups(device):
        ordered = bool(task_spread(base, tuned).isfinite().all())
        for number in (0.3, 1.0):
            arguments = (base, tuned, share(number))
            yield Case(f"{label}, {number}", arguments, raises=None if ordered else NonFiniteError)
    random = seeded(device)
    for tasks in (1, 2, 3, 4, 5, 9):
        for dtypes in ([BFLOAT16] * (tasks + 1), [FLOAT64, *[FLOAT32] * tasks]):
            base, tuned = group((7, 143), dtypes, random)
            yield Case(f"{tasks} tasks, {dtypes[0]}".replace("torch.", ""), (base, tuned, share(0.5)))
    base, tuned = group((13, 31), [BFLOAT16] * 3, random)
    yield Case("a model", (base, tuned, share(0.3)))
    base, tuned = group((70, 71), [FLOAT32] * 3, random)
    yield Case("one is kept", (base, tuned, lambda differing: 1))
    yield Case("none is kept", (base, tuned, lambda differing: 0))
    close = [1 + 1e-3 * normal((70, 71), random) for _ in range(2)]
    yield Case("spreads of one exponent", (torch.zeros_like(close[0]), [close[0], close[0] + 1], share(0.5)))
    yield Case("many share their upper bits", (base, [base, base + 1 + close[0] * 1e-2], share(0.5)))
    one = tuned[0]
    yield Case("tasks that agree", (base, [one] * 3, share(0.5)))
    for wrong in (-1, 1e9, 0.5, "1"):
        yield Case(f"keep returns {wrong}", (base, tuned, lambda differing, wrong=wrong: wrong), raises=ConfigError)
    yield Case("NaN and infinity", (*spoiled(device), share(0.5)), raises=NonFiniteError)
