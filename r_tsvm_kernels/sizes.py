"""Sizes in bytes, as text such as 5GB."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from .errors import ConfigError


def parse_size(text: str | int) -> int:
    """Return the number of bytes of ``5GB``, ``500MB``, ``2GiB``, or of a number of bytes.

    Raises:
        ConfigError: not a positive size.

    Examples:
        >>> parse_size("2GiB"), parse_size("1.5KB")
        (2147483648, 1500)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match:
        exponent = " KMGT".index(match[2].upper() or " ")
        size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** exponent)
        if size > 0:
            return size
    raise ConfigError(f"expected a size such as 5GB or 500MB, got {text!r}")


def format_size(size: int) -> str:
    """Return a size with three decimals, rounded up, so that `parse_size` gives at least `size`.

    Examples:
        >>> format_size(1_234_567)
        '1.235MB'
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{math.ceil(1000 * size / factor) / 1000:.3f}{unit}"
    return f"{size}B"
