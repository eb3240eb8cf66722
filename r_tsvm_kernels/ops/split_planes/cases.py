"""Cases of `split_planes`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import DTypeError, ShapeError
from .._cases import FLOAT32, LAYOUTS, Case, hard_values, normal, seeded

# See `_cases`.
WIDTHS = {"split_kernel": (16, 16)}

SHAPES = [(1, 1), (7, 5), (3, 4, 9), (2, 3, 5, 6), (0, 3), (0, 4), (2, 0, 3), (3, 40, 70), (2, 2, 7, 5), (3000, 2)]


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield shapes, sizes from 1e-30 to the largest number, layouts, hard values; NaN and infinity."""
    random = seeded(device)
    for low in (True, False):
        for shape in SHAPES:
            x = normal(shape, random)
            yield Case(f"shape {shape}, low {low}", (x.float(),), {"low": low})
            wide = x * torch.logspace(-30, 30, shape[-1], dtype=x.dtype, device=device)
            yield Case(f"shape {shape}, wide, low {low}", (wide.float(),), {"low": low})
            for size in (1e-30, 3e38):
                yield Case(f"shape {shape}, size {size}, low {low}", ((size * x.tanh()).float(),), {"low": low})
        for name, values in hard_values(FLOAT32, random):
            yield Case(f"{name}, low {low}", (values[None],), {"low": low})
        for name, change in LAYOUTS.items():
            yield Case(f"{name}, low {low}", (change(normal((2, 13, 17), random).float()),), {"low": low})
        for bad in (float("nan"), float("inf")):
            x = torch.ones(2, 3, 3, device=device)
            x[1, 0, 0] = bad
            yield Case(f"{bad}, low {low}", (x,), {"low": low})
        for shape in ((2, 32, 48), (2, 13, 31)):
            yield Case(f"a model, low {low}", (normal(shape, random).float(),), {"low": low}, compiled=True)
    yield Case("a vector", (torch.ones(4, device=device),), raises=ShapeError)
    yield Case("float64", (torch.ones(4, 4, dtype=torch.float64, device=device),), raises=DTypeError)
