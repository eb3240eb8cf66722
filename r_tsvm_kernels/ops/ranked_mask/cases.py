"""Cases of `ranked_mask`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from ...errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from .._cases import BFLOAT16, MIXES, Case, group, groups, normal, seeded, spoiled, unaligned
from ..elect_and_sum.ranked import della_probabilities

# See `_cases`.
WIDTHS = {"rank_kernel": (4, 8), "ranked_mask_kernel": (16, 4)}

TABLES = ["della", "zero to one", "steps", "rising", "near one", "falling", "any"]
DRAWS = [{"seed": 0}, {"seed": 2**63 + 5, "substream": 3}, {"seed": 2**64 - 1, "substream": 2**32 - 1}]


def table(cols: int, kind: str, seed: int = 0) -> Tensor:
    """Return probabilities by rank: DELLA's, some at the ends of [0, 1], and some that fall with the rank."""
    random = torch.Generator().manual_seed(seed)
    anything = torch.rand(cols, generator=random, dtype=torch.float64, device="cpu")
    if kind in ("della", "zero to one"):
        return della_probabilities(cols, *{"della": (0.4, 0.25), "zero to one": (0.5, 0.5)}[kind])
    if kind == "steps":
        return (torch.arange(cols, device="cpu") >= cols // 3).double()
    if kind == "near one":
        return torch.full_like(anything, 1 - 2.0**-33)
    if kind == "any":
        return anything
    rising = anything.sort().values
    return rising if kind == "rising" else rising.flip(0)


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the shared groups with every kind of probabilities; NaN and infinity, which are refused."""
    kinds, draws, bases = cycle(TABLES), cycle(DRAWS), cycle((True, False))
    for label, base, (x,) in groups(device, tasks=1):
        kind = next(kinds)
        if x.ndim == 0:
            yield Case(label, (x, table(1, kind)), next(draws), raises=ShapeError)
            continue
        options = {**next(draws), "base": base if next(bases) else None}
        yield Case(f"{label}, {kind}", (x, table(x.shape[-1], kind)), options)
    random = seeded(device)
    for first, second in MIXES:
        base, (x,) = group((3, 43), [first, second], random)
        yield Case(f"rows of {second}", (x, table(43, "della")), {"seed": 5})
        yield Case(f"{second} less {first}, turned", (x.mT, table(3, "zero to one")), {"seed": 5, "base": base.mT})
    ties = torch.randint(-9, 9, (7, 61), generator=random, device=device).half()
    for kind in TABLES:
        yield Case(f"ties, {kind}", (ties, table(61, kind)), {"seed": 3})
        yield Case(f"every second probability, {kind}", (normal((7, 61), random), table(122, kind)[::2]), DRAWS[2])
    long = torch.randint(-300, 300, (2, 4097), generator=random, device=device).bfloat16()
    yield Case("rows longer than Triton sorts in registers", (long, table(4097, "della")), {"seed": 3})
    for label, base, (x,) in unaligned(device, tasks=1):
        yield Case(label, (x, table(len(x), "rising")), {"seed": 9, "base": base})
    base, (x,) = spoiled(device, tasks=1)
    for tensor, origin in ((x, None), (x.nan_to_num(), base)):
        yield Case("NaN", (tensor, table(300, "della")), {"seed": 0, "base": origin}, raises=NonFiniteError)
    yield Case("float32 probabilities", (ties, table(61, "any").float()), {"seed": 0}, raises=DTypeError)
    yield Case("a probability above 1", (ties, table(61, "any") + 1), {"seed": 0}, raises=ConfigError)
    yield Case("a seed below 0", (ties, table(61, "any")), {"seed": -1}, raises=ConfigError)
    for shape in ((16, 48), (13, 31)):
        base, (x,) = group(shape, [BFLOAT16, BFLOAT16], random)
        yield Case(f"{shape} of a model", (x, table(shape[1], "della")), {"seed": 7, "base": base}, compiled=True)
