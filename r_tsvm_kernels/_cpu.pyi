"""CPU kernels (csrc/bindings/cpu_module.cpp)."""

from collections.abc import Sequence

# address, rows, cols, row stride in elements, element type code
_Matrix = tuple[int, int, int, int, int]
# threshold, seed, stream
_RandomMask = tuple[int, int, int]
# addresses of ranks (int32, contiguous; 0 for none), and by rank thresholds (int64) and factors (float64)
_Ranked = tuple[int, int, int]
# weight, factor; threshold and ties of what is kept and of what is dropped again; random mask; selection by rank
_ElectTask = tuple[float, float, tuple[float, int], tuple[float, int], _RandomMask, _Ranked]

def elect_and_sum(
    base: _Matrix,
    tuned: Sequence[_Matrix],
    tasks: Sequence[_ElectTask],
    election: int,
    normalize: bool,
    least: float,
    alpha: float,
    output: int,
    threads: int,
) -> None:
    """Write the merged tensor to the address `output`: float64 if any input is float64, else float32, contiguous."""

def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Return the four random words of a counter; for tests."""

def random_mask(output: int, elements: int, mask: _RandomMask, threads: int) -> None:
    """Write a mask of one byte per element to the address `output`."""

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

def magnitude_histogram(
    x: _Matrix, base: _Matrix | None, digit: tuple[int, int, int], counts: int, threads: int
) -> None:
    """Write the counts of a digit of the magnitudes of `x`, or of ``x - base``, to the address `counts` (int64).

    The digit is given by its number of bits, the bits before it as a number, and the number of bits after it.
    """

def magnitude_ranks(x: _Matrix, base: _Matrix | None, cols: int, output: tuple[int, int], threads: int) -> None:
    """Write the ranks of the magnitudes within rows of `cols` elements.

    `output` holds the addresses of the ranks (int32, contiguous) and the number of NaN and infinite values (int64).
    """

def magnitude_select(
    x: _Matrix, base: _Matrix | None, keep: Sequence[int], output: tuple[int, int, int], threads: int
) -> None:
    """Write the keep-th largest magnitude of `x`, or of ``x - base``, to `output`, for each number of `keep`.

    `output` holds the addresses of the thresholds (float64), ties (int64) and the one number of NaN and infinite values
    (int64).
    """

def reweight_prune(base: _Matrix, tasks: Sequence[tuple[_Matrix, float, int, int, int]], threads: int) -> None:
    """Write the task vectors, clipped and pruned.

    A task is tuned, theta, keep, the address of the output (contiguous, float32, float64 if any input is float64) and
    that of the number of NaN and infinite values met while pruning (int64).
    """

def reweight_prune_inplace(
    tasks: Sequence[tuple[int, float, int, int]], elements: int, type: int, threads: int
) -> None:
    """Clip and prune task vectors in place.

    A task is the address of a contiguous matrix of `elements` float32 or float64 (`type`, an element type code), theta,
    keep, and the address of the number of NaN and infinite values met while pruning (int64). If there are any, no
    matrix is changed.
    """
