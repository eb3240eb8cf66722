"""Cases of `random_mask`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ConfigError
from .._cases import SHAPES, Case

# See `_cases`.
WIDTHS = {"random_mask_kernel": (0, 8)}

WORDS = 2**32
DRAWS = [(0, 0), (1, 7), (WORDS, 2**31), (2**63 + 5, 1), (2**64 - 1, WORDS - 1)]  # seed, substream


def cases(device: torch.device | str) -> Iterator[Case]:
    """Yield sizes around a block and shapes; the ends of the ranges of probability, seed and substream."""
    for seed, substream in DRAWS:
        options = {"seed": seed, "substream": substream, "device": device}
        for numel in (0, 1, 3, 4, 127, 128, 300):
            for probability in (0.0, 0.3, 1 - 1 / WORDS, 1.0):
                yield Case(f"{numel} elements, {probability}, {seed}, {substream}", ((numel,), probability), options)
    options = {"seed": 11, "substream": 2, "device": device}
    for shape in SHAPES:
        yield Case(f"shape {shape}", (shape, 0.4), options)
    for probability in (0.4 / WORDS, 0.6 / WORDS, 1.5 / WORDS, 1 - 0.4 / WORDS):
        yield Case(f"rounding of {probability}", ((300,), probability), options)
    for wrong in (-0.1, 1.1, float("nan"), None):
        yield Case(f"probability {wrong}", ((4,), wrong), options, raises=ConfigError)
    for name, values in {"seed": (-1, 2**64, 0.5, None), "substream": (-1, WORDS, 0.5, None)}.items():
        for value in values:
            yield Case(f"{name} {value}", ((4,), 0.5), {**options, name: value}, raises=ConfigError)
    for shape in ((16, 40), (13, 31), (1,)):  # Triton compiles sizes divisible by 16, and 1, on their own
        yield Case(f"{shape} of a model", (shape, 0.3), options, compiled=True)
