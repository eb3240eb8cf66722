"""Cases of `reweight_prune`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, NonFiniteError
from .._cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Case, group, groups, hard_values, normal, seeded, unaligned
from .._checks import FLOAT_DTYPES
from ..task_statistics import task_statistics

# See `_cases`.
WIDTHS = {"digit_kernel": (16, 0), "prune_kernel": (16, 16), "tie_kernel": (16, 8)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups, clipped or not, pruned to nothing, in part, or not pruned; ties; NaN and infinity."""
    for label, base, tuned in groups(device, tasks=2):
        yield _case(f"{label}, clipped", base, tuned, density=[0.3, 1.0])
        yield _case(f"{label}, not clipped", base, tuned, outlier_weighting="none", density=[0.0, 0.5])
    random = seeded(device)
    for dtype in FLOAT_DTYPES:
        for label, x in hard_values(dtype, random):
            if label != "largest":  # its differences overflow
                yield _case(f"{label} as base, {dtype}", x, [x.flip(0)], density=0.4)
            yield _case(f"{label}, {dtype}, from -0.0", -torch.zeros_like(x), [x], density=0.4)
    for label, base, tuned in unaligned(device, tasks=1):
        yield _case(label, base, tuned, density=0.3)
    zero, x = torch.zeros(400, device=device), normal((400,), random).float()
    clipped = torch.where(torch.arange(400, device=device) % 2 == 0, x, 5 * x.sign())
    for density in (0.05, 0.3, 0.7):
        yield _case(f"many clipped elements tie, density {density}", zero, [clipped], density=density)
    ties = torch.full((601,), 0.5, device=device)
    ties[::2], ties[-1] = -0.5, 3.0
    for count in (0, 1, 127, 128, 129, 400, 599, 600):
        label, density = f"the first {count} of those that tie", (count + 0.5) / 601
        yield _case(label, torch.zeros_like(ties), [ties], outlier_weighting="none", density=density)
    for last in (BFLOAT16, FLOAT64):  # more tasks than one launch takes; one of float64 is enough for all
        base, tuned = group((13, 17), [*[BFLOAT16] * 19, last], random, scale=0.5)
        yield _case(f"19 tasks, the last {last}", base, tuned, density=[min(1.0, 0.06 * t) for t in range(19)])
    for weighting in ("clip", "none"):
        models = group((17, 31), [BFLOAT16] * 3, random)
        yield Case(f"{weighting}, measured here", models, {"outlier_weighting": weighting, "density": 0.5})
    yield from _not_finite(device)
    base, tuned = group((4, 5), [FLOAT32] * 3, random)
    yield Case("an unknown mode", (base, tuned), {"outlier_weighting": "squash"}, raises=ConfigError)
    for wrong in (1.1, -0.1, [0.1, 0.2, 0.3], "1"):
        yield Case(f"density {wrong}", (base, tuned), {"density": wrong}, raises=ConfigError)
    yield Case("statistics of one task", (base, tuned, task_statistics(base, tuned[:1])), raises=ConfigError)
    for dtypes in ([BFLOAT16] * 2, [FLOAT16] * 2, [FLOAT32] * 2, [FLOAT32, BFLOAT16], [FLOAT64] * 2):
        base, tuned = group((16, 40), dtypes, random)
        yield _case(f"clipped and pruned models, {dtypes}", base, tuned, density=0.3, compiled=True)
        yield _case(f"models, {dtypes}", base, tuned, outlier_weighting="none", compiled=True)
    base, tuned = group((13, 31), [BFLOAT16] * 2, random)
    yield _case("odd sizes", base, tuned, density=0.3, compiled=True)


def _case(
    label: str, base: Tensor, tuned: Sequence[Tensor], *, sigma: float = 1.0, compiled: bool = False, **options: Any
) -> Case:
    """Return a case with the statistics of the reference, and a low limit, so that many elements are clipped."""
    statistics = task_statistics(base, tuned, sigma=sigma, backend="torch")
    return Case(label, (base, tuned, statistics), options, compiled=compiled)


def _not_finite(device: torch.device | str) -> Iterator[Case]:
    """NaN and infinity pass through a task that is not pruned; one that is pruned is refused."""
    for dtype in FLOAT_DTYPES:
        for bad in (float("nan"), float("inf"), float("-inf")):
            base, tuned = group((200,), [dtype] * 3, seeded(device))
            tuned[1][150] = bad
            for sigma in (3.0, float("inf")):
                statistics = task_statistics(base, tuned, sigma=sigma, backend="torch")
                for weighting in ("clip", "none"):
                    passes = {"outlier_weighting": weighting, "density": [0.5, 1.0]}
                    yield Case(f"{dtype}, {bad}, not pruned", (base, tuned, statistics), passes)
                    options = {"outlier_weighting": weighting, "density": [1.0, 0.5 if weighting == "clip" else 0.0]}
                    yield Case(f"{dtype}, {bad}", (base, tuned, statistics), options, raises=NonFiniteError)
