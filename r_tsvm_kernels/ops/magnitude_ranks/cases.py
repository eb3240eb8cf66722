"""Cases of `magnitude_ranks`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch

from ...errors import DTypeError, NonFiniteError, ShapeError
from .._cases import BFLOAT16, FLOAT16, FLOAT32, MIXES, Case, group, groups, normal, seeded, spoiled, unaligned
from .._checks import FLOAT_DTYPES

# See `_cases`.
WIDTHS = {"rank_kernel": (8, 8)}

# dtypes of x and of the base
MODELS = [(BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16), (FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (FLOAT16, FLOAT32)]


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups, half of them with a base; rows of many lengths; NaN and infinity, which are refused."""
    bases = cycle((True, False))
    for label, base, (x,) in groups(device, tasks=1):
        raises = ShapeError if x.ndim == 0 else None
        yield Case(label, (x,), {"base": base if next(bases) else None}, raises=raises)
    random = seeded(device)
    for first, second in MIXES:
        for shape in ((2, 1), (3, 17), (1, 2, 33)):
            base, (x,) = group(shape, [first, second], random)
            yield Case(f"{shape}, {second} less {first}", (x,), {"base": base})
            yield Case(f"{shape} turned, {second}", (x.mT,), {"base": base.mT})
    for dtype in FLOAT_DTYPES:
        for cols in (256, 257, 4097):  # longer rows than Triton sorts in registers
            x = torch.randint(-300, 300, (2, cols), generator=random, device=device).to(dtype)
            yield Case(f"ties in rows of {cols}, {dtype}", (x,))
        yield Case(f"{dtype} rows in the workspace", (normal((2, 4300), random).to(dtype),))
        for cols in (4, 300, 5000):
            x = normal((3, cols), random).to(dtype)
            x[1, 2], x[2, 0] = float("nan"), float("-inf")
            yield Case(f"NaN in rows of {cols}, {dtype}", (x,), raises=NonFiniteError)
            yield Case(f"NaN in a base of {cols}, {dtype}", (x.nan_to_num(),), {"base": x}, raises=NonFiniteError)
    for label, base, (x,) in unaligned(device, tasks=1):
        yield Case(label, (x,), {"base": base})
    base, (x,) = spoiled(device, tasks=1)
    yield Case("NaN in the difference", (x,), {"base": base}, raises=NonFiniteError)
    yield Case("whole numbers", (torch.ones(4, dtype=torch.int32, device=device),), raises=DTypeError)
    for dtypes in MODELS:
        for cols in (1024, 1000):
            base, (x,) = group((2, cols), dtypes[::-1], random)
            yield Case(f"{cols} columns, {dtypes} of a model", (x,), {"base": base}, compiled=True)
    yield Case("the longest rows of a model", (normal((1, 4096), random).bfloat16(),), compiled=True)
