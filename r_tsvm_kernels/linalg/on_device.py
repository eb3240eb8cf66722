"""Constants for the device without waiting for what it has still to do."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host; an ordinary copy to a GPU would wait until all that was launched before is done."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def gaussian(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return the same random matrix each time, float64, made where it is needed: other numbers on a GPU."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device=device)
