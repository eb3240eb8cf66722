"""Choose from the cases of an op few that have, together, everything that is hard about all of them.

All cases would compile up to 300 variants of a kernel, which takes minutes.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from itertools import combinations_with_replacement

from torch import Tensor

from ..ops._cases import Case, parts_of


def hard_cases(cases: Iterable[Case]) -> list[Case]:
    """Return the cases of a small cover: each feature of any case is a feature of one of these; in their order.

    The case with the most features that are not covered yet is taken next.
    """
    left = {index: (case, features(case)) for index, case in enumerate(cases)}
    missing = {feature for _, found in left.values() for feature in found}
    chosen: dict[int, Case] = {}
    while missing:
        best = max(left, key=lambda index: (len(left[index][1] & missing), -index))
        chosen[best], found = left.pop(best)
        missing -= found
    return [chosen[index] for index in sorted(chosen)]


def features(case: Case) -> set[Hashable]:
    """Return what may be hard about a case: words of its label; dtypes, sizes and layouts of its tensors; its numbers.

    Of a call that must be refused, each pair of these counts: a kernel may see NaN on one path and not on another.
    """
    found: set[Hashable] = {*re.findall(r"[^\W\d_]{2,}", case.label)}
    parts = list(parts_of([case.args, case.options]))
    inputs = [part for part in parts if isinstance(part, Tensor)]
    found.add(frozenset(x.dtype for x in inputs if x.is_floating_point()))
    found |= {(type(part).__name__, bool(part)) for part in parts if not isinstance(part, Tensor)}
    for x in inputs:
        layout = "contiguous" if x.is_contiguous() else "strided"
        found |= {x.dtype, layout, ("offset", x.storage_offset() > 0), ("size", _size(x))}
        found.add(("odd sides", any(side % 2 for side in x.shape)))
    if case.raises is None:
        return found
    return {(case.raises.__name__, frozenset(pair)) for pair in combinations_with_replacement(found, 2)}


def _size(x: Tensor) -> str:
    if x.numel() < 2:
        return f"{x.numel()} of {x.ndim} dimensions"
    return "odd" if x.numel() % 2 else "a multiple of 16" if x.numel() % 16 == 0 else "even"
