"""Upper limits of the machine's speed, measured in the same run as the rates that are compared with them."""

from __future__ import annotations

from functools import partial

import torch

from .measure import Call, Stopwatch, interleaved
from .results import Row, row

# Both copies fit into a GPU's memory, and not into a CPU's caches.
COPIED_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 1536, "cuda": 4096}
ROUNDS = 5
FP16_PRODUCTS = 3  # that make one of float32 accuracy


def measure_ceilings(device: torch.device, dry_run: bool = False) -> list[Row]:
    """Return rows of the ceilings: ``copy``, bytes read and written per second, and ``matmul``, flops per second.

    ``matmul`` is the rate of float32 products on a CPU. On a GPU it is a third of the float16 rate, because three
    float16 products make one of float32 accuracy; ``matmul float32`` is torch's own there.
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
    done = {"copy": 2 * size} | dict.fromkeys(matrices, 2.0 * n**3)
    rates = {name: [done[name] / value for value in values] for name, values in times.items()}
    found = {"copy": rates["copy"], "matmul": rates["float32"]}
    if "float16" in rates:
        found |= {"matmul": [rate / FP16_PRODUCTS for rate in rates["float16"]], "matmul float32": rates["float32"]}
    return [
        row(name, "torch", "rate" if name == "copy" else "arithmetic", values, role="ceiling",
            options={"dry_run": True} if dry_run else None)
        for name, values in found.items()
    ]  # fmt: skip
