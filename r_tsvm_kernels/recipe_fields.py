"""Types of the fields of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import torch
from pydantic import BeforeValidator, Field

from .errors import ConfigError
from .text import dtype_name, shortened


def _plain_dtype(value: object) -> object:
    """Turn ``torch.bfloat16``, as a dtype or as text, into ``bfloat16``."""
    return dtype_name(value) if isinstance(value, str | torch.dtype) else value


def vocabulary_choice(value: str) -> str:
    """Return the choice of a vocabulary if it is one."""
    if value not in ("base", "union") and not (value.startswith("model:") and value != "model:"):
        raise ValueError(f"expected 'base', 'union' or 'model:PATH', got {shortened(value)}")
    return value


_Name = Literal["float64", "float32", "float16", "bfloat16"]
DTypeName = Annotated[_Name, BeforeValidator(_plain_dtype)]
DTYPES = get_args(_Name)
Missing = Literal["error", "base", "mean_of_present"]
RouterChoice = Literal["merge", "base", "mean"]
ConvChoice = Literal["mean", "flatten"]
Calibration = Literal["svc"]
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype that weights can be stored in, given as such or by name.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(dtype, torch.dtype | str) or dtype_name(dtype) not in DTYPES:
        raise ConfigError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}")
    found: torch.dtype = getattr(torch, dtype_name(dtype))
    return found
