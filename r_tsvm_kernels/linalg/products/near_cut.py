"""What the traces of a purification tell of the spectrum near its cut, without a single eigenvalue being computed.

A purification squares a matrix X with spectrum in [0, 1] by known polynomials until its eigenvalues are 0 or 1. At each
step ``tr(X - X X)``, the sum of ``x (1 - x)``, bounds how many eigenvalues are still on their way; the polynomials,
inverted, tell where they started. So eigenvalues next to the cut are bounded from its side (Rubensson and Niklasson,
SIAM J. Sci. Comput. 36, 2014), and the number of others at any distance of it from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# An eigenvalue between LOW and 1 - LOW counts with LOW (1 - LOW) or more in the trace of X - X X, and with COUNTED on
# average, if these are spread evenly.
LOW, COUNTED = 0.1, 0.15

# Traces of X - X X that are below the first one may be of rounding errors, which do not follow the polynomials. Below
# the second one no eigenvalue is between the roots of ``x (1 - x) = 0.24``, 0.4 and 0.6: the trace tells how many are
# above.
ROUNDED, RESOLVED = 1e-3, 0.24


@dataclass(frozen=True)
class NearCut:
    """Eigenvalues on both sides of a cut.

    Attributes:
        kept: lower bound of the smallest eigenvalue above the cut.
        dropped: upper bound of the largest eigenvalue below the cut.
        pairs: estimate of the sum of ``(a / (a - b))^2`` over eigenvalues a above and b below the cut; infinite if
            the two sides were not told apart.
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
        steps: of the purification; the last one is of the matrix that it ended with.
        above: number of eigenvalues above the cut.
        below: number of eigenvalues below.
        eps: of the number format, in which traces are exact to a few units.
        unit: maps eigenvalues of the matrix that was purified to those that are meant; rising.
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
    """Bound from above the eigenvalue that comes after the first `rank` of a matrix that was purified to about them."""
    trace = steps[-1].trace
    return _origin(min(trace / (rank + 1), 1.0), steps[:-1])


def _origin(x: float, steps: Sequence[Step]) -> float:
    """Return the number that `steps` turn into x."""
    for step in reversed(steps):
        x = math.sqrt(x) if step.shrink else 1 - math.sqrt(1 - x)
    return x
