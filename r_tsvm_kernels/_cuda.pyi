"""CUDA kernels (csrc/bindings/cuda_module.cpp)."""

from collections.abc import Sequence

# address, rows, cols, row stride in elements, element type code
_Matrix = tuple[int, int, int, int, int]
# tuned, address of theta or 0, keep, address of the output, index of the selection or -1, addresses of the low plane
# and of its inverse scale or 0
_PruneTask = tuple[_Matrix, int, int, int, int, tuple[int, int]]
# threshold, seed, stream
_RandomMask = tuple[int, int, int]
# weight, factor; indices of the selections of what is kept and of what is dropped again, or -1; random mask; addresses
# of ranks, thresholds and factors, or 0
_ElectTask = tuple[float, float, int, int, _RandomMask, tuple[int, int, int]]

def add_update(base: _Matrix, update: _Matrix, alpha: float, output: int, device: int, stream: int) -> None:
    """Queue ``output = base + alpha * update``; the output is float64 if any input is, else float32, contiguous."""

def elect_and_sum_workspace(elements: int, tasks: int, selections: int) -> int:
    """Return the bytes of device memory that `elect_and_sum` needs."""

def elect_and_sum(
    base: _Matrix,
    tuned: Sequence[_Matrix],
    tasks: Sequence[_ElectTask],
    election: int,
    normalize: bool,
    least: float,
    alpha: float,
    selections: tuple[int, int, int],
    output: int,
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue the merge; output as in ``_cpu``. `selections`: addresses of thresholds and ties, how many there are."""

def magnitude_histogram(
    x: _Matrix, base: _Matrix | None, bits: int, prefix: int, shift: int, counts: int, device: int, stream: int
) -> None:
    """Queue the counting of digits; writes 2**bits numbers (int64) to the address `counts`."""

def magnitude_ranks_workspace(rows: int, cols: int, in_float64: bool, device: int) -> int:
    """Return the bytes of device memory that `magnitude_ranks` needs."""

def magnitude_ranks(
    x: _Matrix,
    base: _Matrix | None,
    cols: int,
    ranks: int,
    nonfinite: int,
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue the ranking of rows; writes ranks (int32) and the number of NaN and infinite values (int64)."""

def magnitude_select_workspace() -> int:
    """Return the bytes of device memory that `magnitude_select` needs."""

def magnitude_select(
    x: _Matrix,
    base: _Matrix | None,
    keep: Sequence[int],
    output: tuple[int, int, int],
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue the selections; output as in ``_cpu``, with one threshold and one number of ties for each of `keep`."""

def random_mask(output: int, elements: int, mask: _RandomMask, device: int, stream: int) -> None:
    """Queue the drawing of a mask of one byte per element."""

def reweight_prune_workspace(elements: int, selections: int) -> int:
    """Return the bytes of device memory that each step of pruning needs."""

def reweight_prune_select(
    base: _Matrix | None,
    tasks: Sequence[_PruneTask],
    in_float64: bool,
    selections: tuple[int, int, int, int],
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue the selection of what each task keeps.

    `selections` holds the addresses of threshold (float64), ties, tied and nonfinite (int64), one entry per task.
    """

def reweight_prune_apply(
    base: _Matrix | None,
    tasks: Sequence[_PruneTask],
    in_float64: bool,
    selections: tuple[int, int, int, int],
    selection_count: int,
    workspace: int,
    device: int,
    stream: int,
) -> None:
    """Queue the writing of the task vectors, clipped and pruned."""

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
