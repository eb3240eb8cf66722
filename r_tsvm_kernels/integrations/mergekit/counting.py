"""How often mergekit came to us."""

from __future__ import annotations

from collections import Counter
from threading import Lock

counts: Counter[str] = Counter()
_lock = Lock()  # mergekit's --multi-gpu merges in several threads


def count(name: str) -> None:
    """Count one call of a kernel or method."""
    with _lock:
        counts[name] += 1
