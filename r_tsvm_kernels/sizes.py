"""Sizes in bytes as people write them."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from .errors import ConfigError


def parse_size(text: str | int) -> int:
    """Parse ``5GB``, ``500MB``, ``2GiB`` or a number of bytes.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match:
        exponent = " KMGT".index(match[2].upper() or " ")
        size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** exponent)
        if size > 0:
            return size
    raise ConfigError(f"expected a size such as 5GB or 500MB, got {text!r}")


def format_size(size: int) -> str:
    """Write a size with four digits, rounded up: `parse_size` gives at least `size`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{math.ceil(1000 * size / factor) / 1000:.3f}{unit}"
    return f"{size}B"
