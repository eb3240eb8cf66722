"""Cases of `spread_mask`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .._cases import BFLOAT16, Case, group, seeded, spoiled
from ..magnitude_select import MagnitudeSelection
from ..spread_select.cases import cases as selections
from ..spread_select.reference import run as select

# See `_cases`.
WIDTHS: dict[str, tuple[int, int]] = {}  # the kernel is that of another op


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield the masks of what can be selected; thresholds that no spread has; other numbers of ties; NaN."""
    for case in selections(device):
        if case.raises is None:
            base, tuned, keep = case.args
            yield Case(case.label, (base, tuned, select(base, tuned, keep)))
    base, tuned = group((300, 301), [BFLOAT16] * 3, seeded(device))  # several chunks of the native kernel
    found = select(base, tuned, lambda differing: differing // 3)
    for ties in (0, 1, int(found.ties) + 1, base.numel()):
        number = torch.tensor(ties, device=device)
        yield Case(f"{ties} ties", (base, tuned, MagnitudeSelection(found.threshold, number)))
    for threshold in (0.0, 1e300, float("inf")):
        value = torch.tensor(threshold, dtype=torch.float64, device=device)
        yield Case(f"threshold {threshold}", (base, tuned, MagnitudeSelection(value, found.ties)))
    yield Case("NaN and infinity", (*spoiled(device), found))
