"""Cases of `task_statistics`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ...errors import ConfigError
from .._cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Case, group, groups, seeded, spoiled, unaligned
from .._checks import FLOAT_DTYPES

# See `_cases`.
WIDTHS = {"moments_kernel": (8, 8), "tail_kernel": (8, 8)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups; limits that are 0, small and infinite; subnormals, overflow, NaN and infinity.

    No magnitude equals a limit up to rounding. Equal magnitudes would, and the last bit of the mean would decide on
    which side of the limit they are; other tests check these without a reference.
    """
    for label, base, tuned in groups(device, tasks=2):
        if not label.startswith("all equal") and label != "largest, float64":  # the square overflows in the last task
            # The last task has a large deviation. Relative to it, the deviations of others may be mere rounding errors.
            half = torch.where((torch.arange(base.numel(), device=device) % 2 == 0).view(base.shape), tuned[0], base)
            yield Case(label, (base, [*tuned, half]))
    random = seeded(device)
    for sigma in (0.0, 0.5, 1.0, 3.0, math.inf):
        for eps in (0.0, 0.1, 1.0, 5.0):
            yield Case(
                f"sigma {sigma}, eps {eps}", group((17, 31), [FLOAT32] * 3, random), {"sigma": sigma, "eps": eps}
            )
    for shape in ((0,), (3, 0, 5), (), (1, 1, 1)):
        for dtype in FLOAT_DTYPES:
            options = {"sigma": math.inf, "eps": 0.0}
            yield Case(f"shape {shape}, {dtype}", group(shape, [dtype] * 3, random), options)
    for tasks in (1, 8, 9, 17):
        yield Case(f"{tasks} tasks", group((7, 43), [BFLOAT16] * (tasks + 1), random))
    for label, base, tuned in unaligned(device):
        yield Case(label, (base, tuned))
    steps = torch.arange(-250, 250, dtype=FLOAT64, device=device) % 120
    for dtype, tiny in ((FLOAT16, 2.0**-24), (FLOAT32, 2.0**-149), (BFLOAT16, 2.0**-133)):
        base = torch.zeros(500, dtype=dtype, device=device)
        yield Case(f"subnormal {dtype}", (base, [(steps * tiny).to(dtype)]), {"sigma": 1.0})
    for dtype in FLOAT_DTYPES:
        for sigma in (3.0, 0.0, math.inf):
            for eps in (0.1, 0.0):
                yield Case(f"NaN and infinity, {dtype}", spoiled(device, dtype), {"sigma": sigma, "eps": eps})
    base, tuned = group((300,), [FLOAT32] * 4, random)
    tuned[0][17], tuned[1][17], tuned[1][299] = -math.inf, math.inf, math.nan
    tuned[2][:] = math.nan
    yield Case("infinity alone, with NaN, nothing but NaN", (base, tuned))
    base = torch.zeros(200, dtype=FLOAT64, device=device)
    yield Case("sums that overflow", (base, [base + 1e307]))
    many = torch.linspace(-1e200, 1e200, 3000, dtype=FLOAT64, device=device)
    yield Case("squares that overflow", (torch.zeros_like(many), [many]))
    for name in ("sigma", "eps"):
        for wrong in (-1.0, math.nan, "3"):
            yield Case(f"{name} {wrong}", group((4, 5), [FLOAT32] * 2, random), {name: wrong}, raises=ConfigError)
    for dtypes in ([BFLOAT16] * 9, [FLOAT16] * 9, [FLOAT32] * 9, [FLOAT32, *[BFLOAT16, FLOAT32] * 4], [FLOAT64] * 9):
        yield Case(f"8 models, {dtypes[:2]}", group((16, 40), dtypes, random), compiled=True)
    yield Case("odd sizes", group((13, 31), [BFLOAT16] * 4, random), compiled=True)
