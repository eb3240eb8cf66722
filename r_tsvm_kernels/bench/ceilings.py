"""What the machine can do at most, measured in the run whose rates are compared with it."""

from __future__ import annotations

from functools import partial

import torch

from .measure import Call, Stopwatch, interleaved
from .record import quartiles

# A GPU holds both copies; a CPU's caches do not.
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 1536, "cuda": 4096}
ROUNDS = 5
FP16_PRODUCTS = 3  # that make one of float32 accuracy


def measure_ceilings(device: torch.device, dry_run: bool = False) -> dict[str, float]:
    """Return ``copy``, bytes per second of a copy (read and written), and ``matmul``, flops per second.

    The latter is that of float32 products on a CPU; on a GPU a third of that of float16, from which products of
    float32 accuracy are made; there ``matmul float32``, torch's own, is told, too.
    """
    size = (1 << 16) if dry_run else COPIED_BYTES[device.type]
    n = 32 if dry_run else PRODUCT_SIZE[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    matrices = {
        name: torch.randn(n, n, device=device).to(dtype)
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16))
        if name == "float32" or device.type == "cuda"
    }
    calls: dict[str, Call] = {name: partial(torch.matmul, matrix, matrix) for name, matrix in matrices.items()}
    calls["copy"] = lambda: target.copy_(source)
    for call in calls.values():
        call()
    times = interleaved(calls, ROUNDS, Stopwatch(device))
    medians = {name: quartiles(values)["median"] for name, values in times.items()}
    rate = 2.0 * n**3 / medians["float32"]
    found = {"copy": 2 * size / medians["copy"], "matmul": rate}
    if "float16" in medians:
        found |= {"matmul": 2.0 * n**3 / medians["float16"] / FP16_PRODUCTS, "matmul float32": rate}
    return found
