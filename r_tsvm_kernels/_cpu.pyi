"""CPU kernels (csrc/bindings/cpu_module.cpp)."""

from collections.abc import Sequence

# address, rows, cols, row stride in elements, element type code
_Matrix = tuple[int, int, int, int, int]

def task_statistics(
    base: _Matrix,
    tuned: Sequence[_Matrix],
    sigma: float,
    eps: float,
    output: tuple[int, int, int, int, int, int, int],
    threads: int,
) -> None:
    """Write the statistics of ``|tuned[t] - base|`` to `output`.

    `output` holds the addresses of mean, sd, max, zeros, theta, outlier_mass and small: T entries each, float64, but
    int64 for zeros and small.
    """
