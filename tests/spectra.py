"""Matrices with known spectra."""

import torch


def orthonormal(m, n, generator):
    return torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q


def singular_values(kind, r):
    """Falling; ``flat`` is that of a random matrix, a noise floor without a gap anywhere."""
    place = torch.arange(1, r + 1, dtype=torch.float64)
    if isinstance(kind, float):
        return place**-kind
    if kind == "low rank":
        return torch.where(place <= max(1, r // 10), 1 / place, 0.0)
    if kind == "low rank + noise":
        return torch.where(place <= max(1, r // 16), 2.0 / place.sqrt(), 0.0) + 0.05 * (1 - 0.99 * place / r)
    raise ValueError(kind)


def spectrum(m, n, kind, seed):
    """Random float32 matrix whose singular values follow `kind`: a power i^-p, or a name."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "flat":
        return torch.randn(m, n, generator=generator)
    r = min(m, n)
    left, right = orthonormal(m, r, generator), orthonormal(n, r, generator)
    return ((left * singular_values(kind, r)) @ right.mT).float()


KINDS = ["flat", 0.3, 0.7, 1.2, "low rank + noise", "low rank"]
