"""Bounds of the memory of a TSV-Merge, and estimates of its operations, from shapes and ranks alone."""

from __future__ import annotations

from collections.abc import Sequence

from .merging import Solver
from .tall_matrix import WORKSPACE


def tsv_merge_bytes(
    shape: tuple[int, int],
    ranks: Sequence[int],
    *,
    itemsize: int = 4,
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
    simulated: bool = True,
) -> int:
    """Return an upper bound of the memory in bytes that `tsv_merge` needs beside its task matrices, with one thread.

    The bound covers the last route, the SVD, and merges that leave out rows and columns. Most merges need less.

    Args:
        shape: (m, n) of the task matrices.
        ranks: of every task, or their upper bounds.
        itemsize: bytes of one element of a task matrix, 4 or 8.
        solver: as for `tsv_merge`.
        workspace: as for `tsv_merge`.
        simulated: whether solver ``products`` runs the reference implementations, as on a CPU, instead of kernels for
            tensor cores.

    Examples:
        >>> tsv_merge_bytes((4096, 4096), [1365] * 3) / 2**30
        4.99...
    """
    long, short = max(shape), min(shape)
    tasks, columns = len(ranks), min(sum(ranks), 2 * short)
    matrix, square, wide, inner = (8 * size for size in (long * short, short**2, short * columns, columns**2))
    height = min(long, max(256, workspace // (4 * 8 * max(short, 1))))
    tile, image = 8 * height * short, 8 * height * columns
    # If one tile holds all rows, every task keeps its float64 copy.
    copies = tasks * tile if height == long else 2 * tile
    images = max(min(8 * long * columns, workspace // 2), image) + 2 * image
    # If rows or columns are left out: the rest of every task and of the result, and a copy when the result is written.
    dense = (tasks + 3) * matrix * itemsize // 8
    # Measured: a task by LAPACK's SVD; the polar factors by SVD, and what remains of a route that failed.
    solving, merging = 11 * square + 3 * wide, 11 * wide + 20 * inner
    eigen = dense + copies + images + max(solving, merging)
    if solver == "eigen":
        return eigen
    if simulated:
        # The task matrices in float64 twice and as planes; most square matrices are those of the simulation.
        products = dense + tasks * (8 + 8 + 16) * long * short + (2 * tasks + 64) * square
    else:
        # Counted and rounded up: a stack of the tasks; in float64 once, with squares or bases and images, or twice.
        least, tall = 8 * tasks * long * short, 8 * long * columns
        products = itemsize * tasks * long * short + max(2 * least, least + max(6 * tasks * square, 4 * tall))
        products += (itemsize * long * short + square) // 2
    return max(eigen, products)


def tsv_merge_flops(shape: tuple[int, int], ranks: Sequence[int]) -> float:
    """Estimate the floating-point operations of `tsv_merge`; an eigenvalue decomposition counts as ``9 n^3``.

    Args:
        shape: (m, n) of the task matrices.
        ranks: of every task.

    Examples:
        >>> f"{tsv_merge_flops((4096, 4096), [1365] * 3):.0e}"
        '6e+12'
    """
    long, short, columns = float(max(shape)), float(min(shape)), float(sum(ranks))
    grams = len(ranks) * (2 * long * short**2 + 9 * short**3)
    corrections = 12 * (long + short) * short * columns
    merging = 4 * long * columns * (short + columns) + 2 * 9 * columns**3
    return grams + corrections + merging
