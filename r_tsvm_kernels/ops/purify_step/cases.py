"""Cases of `purify_step`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import ConfigError, DTypeError, ShapeError
from .._cases import Case, normal, seeded
from .._planes import Planes
from .._steering import Steering, first_steering
from ..split_planes import split_planes

# See `_cases`.
WIDTHS = {"symmetric_kernel": (16, 16), "steering_kernel": (4, 4)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield sizes around a tile, matrices at different stages, tolerances met at once; NaN and infinity."""
    random = seeded(device)

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    def given(n: int, low: bool, rank: float = 0.4, pairs: int = 2) -> tuple[Planes, Steering]:
        """Return four matrices with spectra in [0, 1]: two running, one that met a tolerance, one that is done."""
        x = normal((4, n, n), random)
        x = (x @ x.mT / (4 * n)).float()
        planes = split_planes(x, low=low, backend="torch")
        planes = Planes(planes.hi, planes.lo, torch.ones_like(planes.scale))
        plain = planes.unscaled()
        trace, square = plain.diagonal(dim1=-2, dim2=-1).sum(-1), plain.square().sum((-2, -1))
        wide, narrow = numbers(0.0, 1e4, 1e4, 0.0), numbers(0.0, 0.0, 0.0, 0.0)
        tolerances = [(wide, wide), (narrow, narrow)][:pairs]
        start = first_steering(trace, square, rank * n * torch.ones_like(trace), tolerances, 2)
        counts = start.counts.clone()
        counts[:, 2] += torch.tensor([3, 2], dtype=torch.int32, device=device)
        values = start.values.clone()
        values[2:, 2] = numbers(-1.0, float(round(rank * n)), 1.0, 0.0)
        return planes, replace(start, values=values, counts=counts)

    for low in (True, False):
        for n in (1, 20, 31, 32, 33):
            yield Case(f"{n} rows, low {low}", given(n, low))
            yield Case(f"{n} rows, low {low}, small rank", given(n, low, 0.01, 1), compiled=n == 33)
        planes, steering = given(40, low)
        copy = Planes(planes.hi.clone(), None if planes.lo is None else planes.lo.clone(), planes.scale)
        yield Case(f"memory used again, low {low}", (planes, steering), {"out": copy})
    for bad in (float("nan"), float("inf")):
        planes, steering = given(20, True)
        planes.hi[0, 3, 3] = bad
        yield Case(f"{bad}", (planes, steering))
    planes, steering = given(4, True)
    oblong = split_planes(normal((3, 4, 6), random).float(), backend="torch")
    fewer = replace(steering, values=steering.values[:, :2])
    yield Case("not square", (oblong, steering), raises=ShapeError)
    yield Case("a steering of fewer", (planes, fewer), raises=ShapeError)
    yield Case("float64", (planes, replace(steering, values=steering.values.double())), raises=DTypeError)
    yield Case("over its own factor", (planes, steering), {"out": planes}, raises=ConfigError)
    for low in (True, False):
        yield Case(f"a model, low {low}", given(64, low), compiled=True)
