"""CUDA kernels (csrc/bindings/cuda_module.cpp)."""

from collections.abc import Sequence

# address, rows, cols, row stride in elements, element type code
_Matrix = tuple[int, int, int, int, int]

def task_statistics_workspace(elements: int, tasks: int) -> int:
    """Return the bytes of device memory that `task_statistics` needs."""

def task_statistics(
    base: _Matrix,
    tuned: Sequence[_Matrix],
    sigma: float,
    eps: float,
    output: tuple[int, int, int, int, int, int, int],
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue on `stream` the computation of the statistics of ``|tuned[t] - base|``; outputs as in ``_cpu``."""
