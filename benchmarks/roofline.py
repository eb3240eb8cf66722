"""Floors of the ops and of the merge of a layer on an H200, computed from counts: a prediction, no GPU ran it.

    python -m benchmarks.roofline [--json FILE]

Of each op on three bfloat16 fine-tunes of a 4096 x 4096 weight: the bytes that must move and the operations that are
needed, as `rtsvm bench` counts them (there a product of two pairs of planes is one; here it takes three on tensor
cores), and the time below which no kernel can be. Of the seven matrices of a layer of Mistral-7B: the operations that
`gpu_work` counted. Rates are those of NVIDIA's data sheet for dense matrices; real ones are lower.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from benchmarks import RESULTS
from benchmarks.program import Program, finish
from r_tsvm_kernels.bench import REGISTRY, Results, Row, read_rows, row
from r_tsvm_kernels.bench.case import Inputs

# https://www.nvidia.com/en-us/data-center/h200/, SXM: bytes and operations a second.
MEMORY, FP16, FLOAT64 = 4.8e12, 989e12, 67e12
PLANES = 3  # products of planes in a product of two pairs
TASKS, SIZE, SCALE = 3, 4096, 16  # cases are made at 1/16 of the size
# How many matrices of a layer have which shape; a wide one counts as a tall one.
LAYER = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}


def floor(moved: float, fp16: float, float64: float = 0.0) -> float:
    """Return the least seconds for bytes, which move beside operations, and for operations in two formats."""
    return max(moved / MEMORY, fp16 / FP16 + float64 / FLOAT64)


def of_ops() -> Iterator[Row]:
    """Yield the rows of every op."""
    inputs = Inputs("square", (SIZE // SCALE, SIZE // SCALE), "bfloat16", TASKS, torch.device("cpu"))
    for name, entry in REGISTRY.items():
        if entry.group == "ops":
            case = entry.make(inputs)
            moved, fp16 = case.bytes * SCALE**2, PLANES * case.flops * SCALE**3
            yield from rows(name, {"bytes": moved, "fp16": fp16}, floor(moved, fp16), (SIZE, SIZE))


def of_layers() -> Iterator[Row]:
    """Yield the rows of the merges of a layer, from the counts of `gpu_work`."""
    counts = read_rows(RESULTS / "gpu_work.json")
    counts = [found for found in counts if found["metric"] in ("fp16", "float64")]
    for name, spectrum in sorted({(found["name"], found["options"]["spectrum"]) for found in counts}):
        total = dict.fromkeys(("fp16", "float64"), 0.0)
        for found in counts:
            if (found["name"], found["options"]["spectrum"]) == (name, spectrum):
                total[found["metric"]] += LAYER[tuple(found["shape"])] * found["median"]
        label = f"{name} of a layer, spectrum {spectrum}"
        yield from rows(label, total, floor(0.0, total["fp16"], total["float64"]), None)


def rows(name: str, counts: dict[str, float], seconds: float, shape: tuple[int, int] | None) -> list[Row]:
    """Return the rows of a case."""
    case = {"shape": shape, "options": {"tasks": TASKS}}
    found = [
        row(name, "H200, predicted", metric, value, unit="B" if metric == "bytes" else "operations", **case)
        for metric, value in counts.items()
        if value
    ]
    return [*found, row(name, "H200, predicted", "floor", seconds, unit="s", **case)]


def main() -> int:
    args = Program(__doc__, "roofline.json").arguments()
    results = Results(args.json, replace=True)
    results.add([*of_ops(), *of_layers()])
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
