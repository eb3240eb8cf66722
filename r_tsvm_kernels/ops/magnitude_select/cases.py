"""Cases of `magnitude_select`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ConfigError, NonFiniteError
from .._cases import BFLOAT16, FLOAT32, FLOAT64, Case, group, groups, hard_values, normal, seeded, unaligned
from .._checks import FLOAT_DTYPES

# See `_cases`.
WIDTHS = {"digit_kernel": (16, 0)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups, alone and as differences; one and many counts; NaN and infinity."""
    for label, base, (x,) in groups(device, tasks=1):
        if base.numel() and not base.any():
            continue  # hard values: below, with more counts
        counts = sorted({min(1, x.numel()), x.numel() // 2, x.numel()})
        yield Case(f"{label}, alone", (x, counts))
        yield Case(f"{label}, difference", (x, counts[-2:][0]), {"base": base})
    random = seeded(device)
    for dtype in FLOAT_DTYPES:
        for label, x in hard_values(dtype, random):
            for some in ((60, 3), (1, 50, 50, 49, 0, 51, 2, 70, 300)):
                counts = [min(count, x.numel()) for count in some]
                yield Case(f"{label}, {dtype}, {len(some)} counts", (x, counts))
        base, (x,) = group((300,), [dtype] * 2, random)
        yield Case(f"{dtype}, counts of a difference", (x, [150, 1, 300, 100, 100]), {"base": base})
        yield Case(f"{dtype}, nothing is kept", (x, 0))
        yield Case(f"{dtype}, nothing of a difference is kept", (x, [0, 0]), {"base": base})
        for bad in (float("nan"), float("inf"), float("-inf")):
            spoiled = torch.where(torch.arange(300, device=device) == 171, bad, x)
            yield Case(f"{dtype}, {bad}", (spoiled, 5), raises=NonFiniteError)
            for keep in (0, [5, 10]):
                yield Case(f"{dtype}, {bad} of a difference", (x, keep), {"base": spoiled}, raises=NonFiniteError)
    for label, base, (x,) in unaligned(device, tasks=1):
        yield Case(label, (x, [1000, 7]), {"base": base})
    x = normal((20, 20), random).float()
    for wrong in (-1, 401, [3, 401], 0.1, "3"):
        yield Case(f"keep {wrong}", (x, wrong), raises=ConfigError)
    for dtype in FLOAT_DTYPES:
        yield Case(f"{dtype} of a model", (normal((16, 40), random).to(dtype), 100), compiled=True)
    for dtypes in ([BFLOAT16] * 2, [FLOAT64] * 2, [FLOAT32, BFLOAT16]):
        base, (x,) = group((16, 40), dtypes, random)
        yield Case(f"{dtypes} of a model", (x, [100, 300]), {"base": base}, compiled=True)
    base, (x,) = group((13, 31), [BFLOAT16] * 2, random)
    yield Case("odd sizes", (x, [100, 300]), {"base": base}, compiled=True)
