"""Constants on a device, without waiting for its pending work."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for launched work, as an ordinary copy to a GPU does."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def gaussian(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return a Gaussian matrix, float64, the same at each call; a GPU gives other numbers than a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device=device)
