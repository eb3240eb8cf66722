"""Cases of `symm_square`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import DTypeError, ShapeError
from .._cases import Case, normal, seeded
from .._planes import Planes
from ..split_planes import split_planes

# See `_cases`.
WIDTHS = {"symmetric_kernel": (16, 16)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield sizes around a tile, factors per matrix, matrices that are done; NaN and infinity."""
    random = seeded(device)

    def positive(*shape: int, low: bool = True) -> Planes:
        x = normal((*shape, shape[-1]), random)
        return split_planes((x @ x.mT / (2 * shape[-1])).float(), low=low, backend="torch")

    alpha, beta = torch.tensor([1.0, -1.0, 0.5], device=device), torch.tensor([0.0, 4.0, 3.0], device=device)
    done = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    for low in (True, False):
        for n in (1, 20, 31, 32, 33):
            yield Case(f"{n} rows, low {low}", (positive(3, n, low=low), alpha, beta))
            yield Case(f"{n} rows, low {low}, numbers", (positive(n, low=low), -1.0, 4.0))
            label = f"{n} rows, low {low}, done"
            yield Case(label, (positive(3, n, low=low), -1.0, 4.0), {"done": done}, compiled=n == 33)
    for bad in (float("nan"), float("inf")):
        x = torch.eye(20, device=device)
        x[3, 3] = bad
        yield Case(f"{bad}", (split_planes(x, backend="torch"), -1.0, 4.0))
    square, oblong = positive(4), split_planes(normal((4, 6), random).float(), backend="torch")
    yield Case("not square", (oblong, 1.0, 1.0), raises=ShapeError)
    yield Case("too many factors", (square, 1.0, torch.ones(3, device=device)), raises=ShapeError)
    yield Case("done as floats", (square, 1.0, 1.0), {"done": torch.zeros((), device=device)}, raises=DTypeError)
    for low in (True, False):
        planes = positive(3, 64, low=low)
        yield Case(f"a model, low {low}", (planes, -1.0, 2.0), {"done": done}, compiled=True)
        yield Case(f"a model, low {low}, without done", (planes, -1.0, 2.0), compiled=True)
