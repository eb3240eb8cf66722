"""Bounds of the spectrum near the cut of a purification, from its traces; no eigenvalue is computed.

A purification squares a matrix X with spectrum in [0, 1] by known polynomials until its eigenvalues are 0 or 1. At each
step ``tr(X - X X)``, the sum of ``x (1 - x)``, bounds the number of eigenvalues still between; the inverse polynomials
give their start. This bounds the eigenvalues next to the cut from its side (Rubensson and Niklasson, SIAM J. Sci.
Comput. 36, 2014), and the number of others within any distance of it from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# An eigenvalue between LOW and 1 - LOW adds LOW (1 - LOW) or more to the trace of X - X X, and COUNTED on average if
# these are spread evenly.
LOW, COUNTED = 0.1, 0.15

# A trace of X - X X below ROUNDED may be rounding errors, which do not follow the polynomials. Below RESOLVED no
# eigenvalue is between 0.4 and 0.6, the roots of ``x (1 - x) = 0.24``: the trace gives the number of those above.
ROUNDED, RESOLVED = 1e-3, 0.24


@dataclass(frozen=True)
class NearCut:
    """Eigenvalues on both sides of a cut.

    Attributes:
        kept: lower bound of the smallest eigenvalue above the cut.
        dropped: upper bound of the largest eigenvalue below the cut.
        pairs: estimate of the sum of ``(a / (a - b))^2`` over eigenvalues a above and b below the cut; infinite if
            the two sides were not separated.
    """

    kept: float
    dropped: float
    pairs: float

    @property
    def gap(self) -> float:
        """Lower bound of the relative gap of the singular values, whose squares the eigenvalues are."""
        if not self.pairs < math.inf:
            return 0.0
        return 1 - math.sqrt(max(self.dropped, 0.0) / self.kept)


@dataclass(frozen=True)
class Step:
    """One step of a purification: the trace and squared norm of X before it, and whether X is squared to shrink."""

    trace: float
    square_norm: float
    shrink: bool


def near_cut(steps: Sequence[Step], above: int, below: int, eps: float, unit: Callable[[float], float]) -> NearCut:
    """Bound the eigenvalues next to the cut of a purification.

    Args:
        steps: of the purification; the last one is of its final matrix.
        above: number of eigenvalues above the cut.
        below: number of eigenvalues below.
        eps: of the number format, in which traces are exact to a few units.
        unit: rising function from eigenvalues of the purified matrix to those of the original one.
    """
    kept, dropped = 0.0, 1.0
    windows: list[tuple[float, float, float]] = []  # its two ends, and how many eigenvalues are in it at most
    for index, step in enumerate(steps):
        moving = step.trace - step.square_norm + 4 * eps * step.trace
        if moving < ROUNDED:
            break
        before = steps[:index]
        windows.append((_origin(LOW, before), _origin(1 - LOW, before), moving / COUNTED))
        if moving < RESOLVED and round(step.trace) == above:
            near_zero = (1 - math.sqrt(1 - 4 * moving)) / 2
            kept = max(kept, _origin(1 - near_zero, before))
            dropped = min(dropped, _origin(near_zero, before))
    top, bottom = unit(kept), unit(dropped)
    if not top > bottom:
        return NearCut(top, bottom, math.inf)
    pairs, possible = 0.0, float(above * below)
    # From the widest window inwards: pairs that are not both in the next one are at least that far apart.
    for low, high, count in windows:
        far = min(unit(high) - bottom, top - unit(low))
        inside = min(possible, count * count / 4)
        if far > top - bottom and inside < possible:
            pairs += (possible - inside) * (unit(high) / far) ** 2
            possible = inside
    pairs += possible * (top / (top - bottom)) ** 2
    return NearCut(top, bottom, pairs)


def below_filter(steps: Sequence[Step], rank: int) -> float:
    """Bound from above the eigenvalue after the first `rank` ones of a matrix that was purified to about that rank."""
    trace = steps[-1].trace
    return _origin(min(trace / (rank + 1), 1.0), steps[:-1])


def _origin(x: float, steps: Sequence[Step]) -> float:
    """Return the number that `steps` map to x."""
    for step in reversed(steps):
        x = math.sqrt(x) if step.shrink else 1 - math.sqrt(1 - x)
    return x
