"""Durations, as text such as 1h30m."""

from __future__ import annotations

import math
import re

from ..errors import ConfigError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_FORM = re.compile("".join(rf"(?:(\d+(?:\.\d+)?)\s*{unit}\s*)?" for unit in _UNITS))


def parse_duration(value: str | float) -> float:
    """Return the seconds of ``2h``, ``1h30m``, ``90s`` or ``90``.

    Raises:
        ConfigError: not a positive duration.

    Examples:
        >>> parse_duration("1h30m"), parse_duration(90)
        (5400.0, 90.0)
    """
    if isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    text = str(value).strip().lower()
    match = _FORM.fullmatch(text if text[-1:] in _UNITS else f"{text}s")
    if match and not isinstance(value, bool):
        parts = zip(match.groups(), _UNITS.values(), strict=True)
        seconds = math.fsum(float(number) * unit for number, unit in parts if number)
        if 0 < seconds < math.inf:
            return seconds
    raise ConfigError(f"expected a duration such as 2h, 1h30m or 90s, got {value!r}")


def format_duration(seconds: float) -> str:
    """Return a duration in a few characters.

    Examples:
        >>> format_duration(0.25), format_duration(5400)
        ('0.25 s', '90.0 min')
    """
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
