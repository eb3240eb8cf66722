"""Cases of `symm_gram`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ConfigError, DTypeError
from .._cases import Case, normal, seeded
from .._planes import Planes
from ..split_planes import split_planes

# See `_cases`.
WIDTHS = {"symmetric_kernel": (16, 16)}


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield both sides, with and without the low plane, around the size of a tile; NaN and infinity."""
    random = seeded(device)
    shapes = [(1, 1), (2, 1, 35), (2, 31, 18), (32, 17), (33, 20), (2, 2, 5, 6)]
    for low in (True, False):
        for shape in shapes:
            for out_dtype in (torch.float32, "planes"):
                x = normal(shape, random).float()
                x[0] *= 1e-3
                planes = split_planes(x, low=low, backend="torch")
                for side, given in (("left", planes), ("right", planes.mT), ("right", planes)):
                    label = f"{side} {tuple(given.shape)}, low {low}, {out_dtype}"
                    yield Case(label, (given, side), {"out_dtype": out_dtype}, compiled=shape == (33, 20))
    ones = split_planes(torch.ones(32 * 7 - 3, 1, device=device), backend="torch")
    yield Case("every tile below the diagonal", (ones, "left"))
    alike = split_planes(normal((20, 30), random).float(), backend="torch")
    assert alike.lo is not None
    yield Case("planes with different strides", (Planes(alike.hi, alike.lo.mT.contiguous().mT, alike.scale),))
    for bad in (float("nan"), float("inf")):
        x = torch.eye(20, device=device)
        x[3, 3] = bad
        yield Case(f"{bad}", (split_planes(x, backend="torch"),))
    yield Case("an unknown side", (alike, "middle"), raises=ConfigError)
    yield Case("an unknown format", (alike,), {"out_dtype": torch.float16}, raises=DTypeError)
    plain = Planes(torch.zeros(2, 2, device=device), None, torch.ones((), device=device))
    yield Case("planes of float32", (plain,), raises=DTypeError)
    for low in (True, False):
        planes = split_planes(normal((2, 96, 64), random).float(), low=low, backend="torch")
        for side in ("left", "right"):
            yield Case(f"a model, {side}, low {low}", (planes, side), compiled=True)
    yield Case("a model, to planes", (planes,), {"out_dtype": "planes"}, compiled=True)
