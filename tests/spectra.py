"""Task matrices with known kinds of spectra."""

import torch
from torch import Tensor

KINDS = ("flat", "power 0.3", "power 0.7", "power 1.2", "low rank + noise", "low rank")


def spectrum(kind: str, m: int, n: int, seed: int) -> Tensor:
    """Return an (m, n) float32 matrix: Gaussian noise, singular values ``i^-p``, or rank ``min(m, n) // 10``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r = min(m, n)
    if kind == "flat":
        return normal(m, n).float()
    if kind.startswith("power"):
        U, V = torch.linalg.qr(normal(m, r)).Q, torch.linalg.qr(normal(n, r)).Q
        return ((U * torch.arange(1, r + 1, dtype=torch.float64) ** -float(kind.split()[1])) @ V.mT).float()
    low = normal(m, r // 10) @ normal(r // 10, n)
    return (low + 0.3 * normal(m, n) if kind == "low rank + noise" else low).float()


def rank_of(kind: str, r: int, tasks: int) -> int:
    """Return the rank of TSV-Merge, clipped to the numerical rank as callers do."""
    return min(r // tasks, r // 10) if kind == "low rank" else r // tasks
