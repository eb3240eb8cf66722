"""Cases of `gemm3`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import DTypeError, ShapeError
from .._cases import BFLOAT16, FLOAT16, FLOAT32, Case, normal, seeded
from .._planes import Planes
from ..split_planes import split_planes

# See `_cases`.
WIDTHS = {"gemm3_kernel": (16, 16)}

FORMATS = (FLOAT32, FLOAT16, BFLOAT16, "planes")


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield formats of what is added and stored, sizes around a tile, transposed factors; NaN and infinity."""
    random = seeded(device)

    def planes(*shape: int, low: bool = True) -> Planes:
        return split_planes(normal(shape, random).float(), low=low, backend="torch")

    def stored(x: Tensor, form: Any, low: bool) -> Tensor | Planes:
        return split_planes(x.float(), low=low, backend="torch") if form == "planes" else x.to(form)

    alpha = torch.tensor([0.5, -2.0], device=device)
    for low in (True, False):
        for out_dtype in FORMATS:
            for added in (None, *FORMATS):
                for m, k, n in ((1, 1, 1), (35, 33, 17), (17, 65, 15)):
                    A, B = planes(2, m, k, low=low), planes(2, n, k, low=low).mT
                    C = None if added is None else stored(normal((2, n, m), random).mT, added, low)
                    label = f"{(m, k, n)}, low {low}, {added} to {out_dtype}"
                    yield Case(label, (A, B, alpha, 3.0, C), {"out_dtype": out_dtype})
    weight = normal((40, 30), random).bfloat16()
    yield Case("a weight and its update", (planes(40, 20), planes(20, 30), 0.1, 1.0, weight), {"out_dtype": BFLOAT16})
    zero = split_planes(torch.zeros(4, 4, device=device), backend="torch")
    yield Case("nothing added", (zero, zero, 1.0, 1.0, weight[:4, :4]), {"out_dtype": BFLOAT16})
    yield Case("many rows share columns", (planes(17 * 32, 20), planes(20, 40)))
    yield Case("leading dimensions", (planes(2, 3, 5, 6), planes(2, 3, 6, 4)))
    yield Case("no rows", (planes(2, 0, 6), planes(2, 6, 4)))
    for bad in (float("nan"), float("inf")):
        x = torch.eye(20, device=device)
        x[3, 3] = bad
        yield Case(f"{bad}", (split_planes(x, backend="torch"), planes(20, 20)))
    small = planes(4, 6)
    yield Case("factors that do not fit", (small, small), raises=ShapeError)
    yield Case(
        "a sum that does not fit", (small, small.mT, 1.0, 1.0, torch.zeros(6, 6, device=device)), raises=ShapeError
    )
    yield Case("one low plane", (small, planes(6, 4, low=False)), raises=DTypeError)
    yield Case("to float64", (small, small.mT), {"out_dtype": torch.float64}, raises=DTypeError)
    odd = planes(2, 33, 65), planes(2, 31, 65).mT, 0.5, 1.0, normal((2, 33, 31), random).bfloat16()
    yield Case("odd sizes", odd, compiled=True)
    for low in (True, False):
        left, right = planes(2, 64, 96, low=low), planes(2, 96, 64, low=low)
        third = planes(2, 64, 64, low=low)
        weights = normal((2, 64, 64), random).bfloat16()
        label = f"a model, low {low}"
        yield Case(f"{label}, to planes", (left, right, 0.5, 1.0, third), {"out_dtype": "planes"}, compiled=True)
        yield Case(
            f"{label}, to bfloat16", (right.mT, left.mT, 0.5, 1.0, weights), {"out_dtype": BFLOAT16}, compiled=True
        )
        yield Case(f"{label}, transposed left", (left.mT, third, 0.5), compiled=low)
