"""Small full fine-tunes: few steps at a low rate, from a base that has seen all domains of `language`.

The norm of an update is 2 to 10% of that of the weight.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.quality import suite_language
from benchmarks.quality.training import Suite

KNOWN = ("prose", "code", "records")


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    suite = suite_language.build(seed, quick, KNOWN)
    return replace(suite, base_steps=6 if quick else 600, expert_steps=4 if quick else 100, expert_rate=6e-4)
