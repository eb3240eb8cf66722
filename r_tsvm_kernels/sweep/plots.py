"""Plots of scores, as SVG that is part of a page: no script, no style of its own."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..text import printable
from .trial import written

# The plot, and the space around it for labels.
WIDTH, HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 24, 40
_MOST_LABELS = 9
_MOST_CHARACTERS = 14


@dataclass(frozen=True)
class Point:
    """A candidate in a plot.

    Attributes:
        x: a number, or any value that is a place of its own.
        y: its score.
        kind: class of its dot: ``best``, ``front`` or nothing.
        title: shown by a browser when the pointer rests on it.
    """

    x: Any
    y: float
    kind: str
    title: str


def plot(points: Sequence[Point], x_label: str, y_label: str, *, envelope: str = "", log: bool = False) -> str:
    """Return a plot of points.

    Args:
        points: at least one.
        x_label: what is on the horizontal axis.
        y_label: what is on the vertical axis.
        envelope: ``max`` or ``min``: draw a line through the best point of each x, and label these.
        log: whether x has a logarithmic axis.
    """
    across = _Axis.of([point.x for point in points], log, own_labels=bool(envelope))
    up = _Axis.of([point.y for point in points])
    parts = [_frame(across, up, x_label, y_label)]
    places = [(_x(across.share(point.x)), _y(up.share(point.y)), point) for point in points]
    if envelope:
        best: dict[float, float] = {}
        for x, y, _ in places:
            best[x] = y if x not in best else (min if envelope == "max" else max)(best[x], y)
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{best[x]:.1f}" for x in sorted(best))}"/>')
    for x, y, point in sorted(places, key=lambda place: ("", "front", "best").index(place[2].kind)):
        parts.append(
            f'<circle class="{point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if point.kind == "best" else 4}">'
            f"<title>{_text(point.title)}</title></circle>"
        )
    label = _text(f"{y_label} against {x_label}")
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Axis:
    """Places of values on an axis, from 0 to 1, and the values that have labels."""

    low: float
    high: float
    log: bool
    labels: tuple[tuple[float, str], ...]
    places: Mapping[str, float] | None = None

    @classmethod
    def of(cls, values: Sequence[Any], log: bool = False, own_labels: bool = False) -> _Axis:
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            names = list(dict.fromkeys(map(str, values)))
            shares = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
            step = math.ceil(len(names) / _MOST_LABELS)
            return cls(0, 1, False, tuple((shares[name], name) for name in names[::step]), shares)
        low, high = min(values), max(values)
        margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        log = log and low > 0
        if log:
            low, high = low / 1.1, high * 1.1
        else:
            low, high = low - margin, high + margin
        own, axis = sorted(set(values)), cls(low, high, log, ())
        gaps = [axis.share(b) - axis.share(a) for a, b in pairwise(own)]
        if not own_labels or min(gaps, default=1.0) < 1 / _MOST_LABELS:
            own = _ticks(low, high, log)
        return cls(low, high, log, tuple((axis.share(tick), written(float(tick))) for tick in own))

    def share(self, value: Any) -> float:
        if self.places is not None:
            return self.places[str(value)]
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return float((value - self.low) / (self.high - self.low))


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Return a few round numbers between two."""
    if log:
        return [low * (high / low) ** (i / 4) for i in range(5)]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _frame(across: _Axis, up: _Axis, x_label: str, y_label: str) -> str:
    parts = [f'<rect x="{_LEFT}" y="{_TOP}" width="{_x(1) - _LEFT}" height="{_y(0) - _TOP}"/>']
    for share, name in up.labels:
        y = _y(share)
        parts.append(f'<line x1="{_LEFT}" x2="{_x(1)}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="up" x="{_LEFT - 6}" y="{y + 4:.1f}">{_label(name)}</text>')
    for share, name in across.labels:
        parts.append(f'<text class="across" x="{_x(share):.1f}" y="{_y(0) + 16}">{_label(name)}</text>')
    parts.append(f'<text class="across name" x="{_x(0.5):.1f}" y="{HEIGHT - 6}">{_text(x_label)}</text>')
    parts.append(f'<text class="name" x="{_LEFT}" y="{_TOP - 9}">{_text(y_label)}</text>')
    return "".join(parts)


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)


def _label(text: str) -> str:
    return _text(text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…")


def _text(text: str) -> str:
    return html.escape(printable(text))
