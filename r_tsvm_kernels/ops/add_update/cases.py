"""Cases of `add_update`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ConfigError
from .._cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
    around_ties,
    group,
    groups,
    hard_values,
    seeded,
    spoiled,
    unaligned,
)
from .._checks import FLOAT_DTYPES

# See `_cases`.
WIDTHS = {"add_update_kernel": (16, 16)}

MODELS = [(BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (FLOAT64, FLOAT64)]


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups with updates that are partly 0; hard values on both sides; NaN and infinity."""
    index = torch.arange(2000, device=device)
    for label, base, (update,) in groups(device, tasks=1):
        sparse = torch.where((index[: base.numel()] % 3 == 0).view(base.shape), 0, update)
        for alpha in (0.7, -1e-30, 0.0):
            yield Case(f"{label}, alpha {alpha}", (base, sparse, alpha))
        yield Case(f"{label}, stored as it is", (base, update, 0.3))
        yield Case(f"{label}, from -0.0", (-torch.zeros_like(base), sparse, 0.7))
    random = seeded(device)
    for dtype in FLOAT_DTYPES:
        for label, base in hard_values(dtype, random):
            for update in (torch.zeros_like(base), -base, base.flip(0)):
                for alpha in (1.0, -0.3):
                    yield Case(f"{label} as base, {dtype}, alpha {alpha}", (base, update, alpha))
    for label, base, (update,) in unaligned(device, tasks=1):
        yield Case(label, (base, update, 0.3))
    base, (update,) = spoiled(device, tasks=1)
    for alpha in (0.5, 0.0):
        for narrow in (None, FLOAT16, BFLOAT16):
            yield Case(f"NaN and infinity, alpha {alpha}, {narrow}", (base, update, alpha), {"out_dtype": narrow})
    for wide in (FLOAT32, FLOAT64):
        for narrow in FLOAT_DTYPES:
            steps = around_ties(wide, narrow, device)
            yield Case(f"{wide} rounded to {narrow}", (torch.zeros_like(steps), steps, 1.0), {"out_dtype": narrow})
    for alpha in (float("nan"), float("inf"), 1e39):
        yield Case(f"alpha {alpha}", (base, update, alpha), raises=ConfigError)
    for dtypes in MODELS:
        base, (update,) = group((16, 40), dtypes, random)
        yield Case(f"{dtypes} of a model", (base, update, 0.7), compiled=True)
        options = {"out_dtype": dtypes[0]}
        yield Case(f"{dtypes} of a model, stored", (base, update, 0.7), options, compiled=True)
    base, (update,) = group((13, 31), [BFLOAT16, FLOAT32], random)
    yield Case("odd sizes", (base, update, 0.7), compiled=True)
