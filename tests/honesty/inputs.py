"""Random task matrices that make spectral methods err: near ties, graded spectra, storage rounding, extreme scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r_tsvm_kernels.linalg import Rank, choose_rank

SPECTRA = ("noise", "power", "exponential", "step", "ties", "cluster", "low rank", "identity")
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Elements of one matrix, and mostly of all: what would have more is made smaller, so that many inputs can be judged.
ELEMENTS, TOGETHER = 120_000, 150_000


@dataclass(frozen=True)
class Problem:
    """Task matrices of one layer, with ranks and weights.

    Attributes:
        matrices: T matrices (m, n), all float32 or all float64.
        ranks: T ranks, or rules that choose them.
        weights: T factors.
        label: how they were made, for reports.
    """

    matrices: list[Tensor]
    ranks: list[Rank]
    weights: list[float]
    label: str


def problem(rng: np.random.Generator) -> Problem:
    """Draw task matrices, ranks and weights."""
    m, n = _shape(rng)
    short = min(m, n)
    tasks = int(rng.integers(1, 9))
    if rng.random() < 0.9:
        tasks = min(tasks, max(1, TOGETHER // (m * n)))
    rank = _rank(rng, short, tasks)
    kind = str(rng.choice(["spectrum", "stored"]))
    scale = 10.0 ** rng.uniform(-30, 30) if rng.random() < 0.3 else 1.0
    if kind == "spectrum":
        spectrum = str(rng.choice(SPECTRA))
        dtype = torch.float64 if rng.random() < 0.4 else torch.float32
        arrays = [_with_spectrum(rng, spectrum, m, n, rank) for _ in range(tasks)]
        label = f"{spectrum} {dtype}"
    else:
        stored = STORED[rng.integers(len(STORED))]
        arrays = _fine_tunes(rng, stored, m, n, tasks)
        dtype = torch.float64 if stored == torch.float64 or rng.random() < 0.2 else torch.float32
        label = f"stored in {stored}, as {dtype}"
    relation = str(rng.choice(["unrelated", "unrelated", "unrelated", "shared", "equal", "opposite", "zero"]))
    arrays = _related(rng, arrays, relation)
    if rng.random() < 0.25:
        rows, columns = rng.random(m) < rng.uniform(0, 0.7), rng.random(n) < rng.uniform(0, 0.7)
        for array in arrays:
            array[rows] = 0
            array[:, columns] = 0
        label += ", untouched rows and columns"
    matrices = [torch.from_numpy(array * scale).to(dtype) for array in arrays]
    ranks: list[Rank] = [rank if rng.random() < 0.8 else int(rng.integers(0, short + 1)) for _ in range(tasks)]
    if rng.random() < 0.1:
        rule = str(rng.choice(["energy", "noise"]))
        ranks = [choose_rank(rule, (m, n), tasks, energy=float(rng.uniform(0.3, 0.999)))] * tasks
        label += f", rank by {rule}"
    shown = [rank for rank in ranks if isinstance(rank, int)]
    weights = [1.0] * tasks if rng.random() < 0.5 else [float(w) for w in rng.uniform(-1, 2, tasks).round(2)]
    return Problem(
        matrices, ranks, weights, f"{label}, {m}x{n}, T={tasks}, {relation}, scale {scale:.0e}, ranks {shown}"
    )


def _shape(rng: np.random.Generator) -> tuple[int, int]:
    short = round(300.0 ** rng.random())
    long = max(short, min(round(short * 100.0 ** rng.random()), ELEMENTS // short))
    return (short, long) if rng.random() < 0.5 else (long, short)


def _rank(rng: np.random.Generator, short: int, tasks: int) -> int:
    """Draw TSV-Merge's own rank, any, or one near the short side."""
    kind = rng.random()
    if kind < 0.4:
        return short // tasks
    return int(rng.integers(0, short + 1)) if kind < 0.7 else max(0, short - int(rng.integers(0, 40)))


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def _with_spectrum(rng: np.random.Generator, kind: str, m: int, n: int, rank: int) -> np.ndarray:
    """Return a float64 matrix of a kind of spectrum; ties and clusters are at the cut below `rank`."""
    r = min(m, n)
    index = np.arange(1, r + 1)
    if kind == "noise":
        return rng.standard_normal((m, n))
    if kind == "identity":
        return np.eye(m, n) * rng.choice([1.0, 2.0, -1.0])
    if kind == "power":
        values = index ** -rng.uniform(0.1, 2)
    elif kind == "exponential":
        values = np.logspace(0, -rng.uniform(0.5, 12), r)
    elif kind == "step":
        values = np.sort(1 + 0.1 * rng.random(r))[::-1] / np.where(index <= rank, 1, 10 ** rng.uniform(0, 9))
    elif kind == "low rank":
        values = np.sort(rng.random(r))[::-1] * (index <= max(1, r // int(rng.integers(2, 20))))
    else:
        values = index ** -rng.uniform(0.1, 1)
        width = int(rng.integers(1, 6))
        near = slice(max(0, rank - width), min(r, rank + width))
        spread = 0.0 if kind == "ties" else 10 ** rng.uniform(-15, -2)
        values[near] = values[near].mean() * (1 + spread * rng.random(len(values[near])))
        values = np.sort(values)[::-1]
    return (_orthonormal(rng, m, r) * values) @ _orthonormal(rng, n, r).T


def _fine_tunes(rng: np.random.Generator, stored: torch.dtype, m: int, n: int, tasks: int) -> list[np.ndarray]:
    """Return differences of weights as they are stored, float64: low-rank or dense updates plus rounding."""
    base = torch.from_numpy(rng.standard_normal((m, n)) * 0.02).to(stored)
    arrays = []
    for _ in range(tasks):
        size = 10 ** rng.uniform(-5, -2)
        if rng.random() < 0.6:
            inner = int(rng.integers(1, 9))
            update = rng.standard_normal((m, inner)) @ rng.standard_normal((inner, n)) * size
        else:
            update = _with_spectrum(rng, str(rng.choice(["noise", "power", "exponential"])), m, n, 0) * size
        tuned = (base.double() + torch.from_numpy(update)).to(stored)
        arrays.append((tuned.double() - base.double()).numpy())
    return arrays


def _related(rng: np.random.Generator, arrays: list[np.ndarray], relation: str) -> list[np.ndarray]:
    if relation == "shared":
        common = arrays[0] / max(np.abs(arrays[0]).max(), 1e-300)
        return [array + common * np.abs(array).max() * rng.uniform(0.1, 10) for array in arrays]
    if relation == "equal":
        return [arrays[0].copy() for _ in arrays]
    if relation == "opposite":
        return [arrays[0] * (-1) ** index for index in range(len(arrays))]
    if relation == "zero":
        return [array * (rng.random() < 0.6) for array in arrays]
    return arrays
