"""Bounds of the memory of TSV-Merge, and estimates of its operations, from shapes and ranks alone."""

from __future__ import annotations

from collections.abc import Sequence

from .merging import Solver
from .tall_matrix import WORKSPACE
from .weighted_merging import long_side_is_whole


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
        # Counted and rounded up: a stack of the tasks; in float64 once, with squares or bases and images, or twice with
        # bases, a stack of them and its planes, and with the float32 Gram matrices.
        least, tall = 8 * tasks * long * short, 8 * long * columns
        products = itemsize * tasks * long * short + max(
            2 * least + 3 * wide + tasks * square // 2, least + max(7 * tasks * square, 4 * tall)
        )
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


def weighted_merge_bytes(
    shape: tuple[int, int],
    tasks: int,
    *,
    power: float = 1.0,
    limited: bool = False,
    itemsize: int = 4,
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> int:
    """Return an upper bound of the memory in bytes that `weighted_merge` needs beside its task matrices.

    The bound covers the last route, the SVD, and merges that leave out rows and columns. Most merges need less.

    Args:
        shape: (m, n) of the task matrices.
        tasks: T.
        power: as for `weighted_merge`.
        limited: whether ranks are given.
        itemsize: bytes of one element of a task matrix, 4 or 8.
        solver: as for `weighted_merge`.
        workspace: as for `weighted_merge`.

    Examples:
        >>> weighted_merge_bytes((4096, 4096), 3) / 2**30
        3.75
    """
    long, short = max(shape), min(shape)
    dense = (tasks + 3) * long * short * itemsize
    complete = power == 1 and not limited
    square = 8 * short**2
    # Without rows and columns of zeros, a rectangle may be nearly a square.
    near = min(long, int(tasks ** (1 / 3) * short) + 1)
    bases = 0 if complete else tasks * square
    whole = bases + 8 * (7 * near * short + 10 * near**2) + 10 * square
    if solver == "products" and complete:
        # Measured on a CPU, which simulates the formats of tensor cores: per element of the tasks, and of the squares.
        wide = long if long == near else -(-short // tasks) * tasks
        whole = max(whole, 92 * tasks * long * short + 92 * (wide**2 + short**2))
    if long == near:
        return dense + whole
    height = min(long, max(256, workspace // (4 * 8 * max(short, 1))))
    lead = -(-short // tasks)
    columns = lead * tasks
    tile, image = 8 * height * short, 8 * height * columns
    copies = tasks * tile if height == long else 2 * tile
    images = max(min(8 * long * columns, workspace // 2), image) + 2 * image
    matrices = bases + 3 * tasks * square + 2 * 8 * short * columns
    writing = tasks * tile + 5 * tile
    solving = 11 * square + 24 * short * columns + 11 * 8 * short * columns + 20 * 8 * columns**2
    return dense + max(whole, copies + images + matrices + max(solving, writing))


def weighted_merge_flops(shape: tuple[int, int], tasks: int, *, power: float = 1.0, limited: bool = False) -> float:
    """Estimate the floating-point operations of `weighted_merge`; an eigenvalue decomposition counts as ``9 n^3``.

    Args:
        shape: (m, n) of the task matrices.
        tasks: T.
        power: as for `weighted_merge`.
        limited: whether ranks are given.

    Examples:
        >>> f"{weighted_merge_flops((4096, 4096), 3):.0e}"
        '3e+12'
    """
    long, short = float(max(shape)), float(min(shape))
    solving = 0.0 if power == 1 and not limited else tasks * (long * short**2 + 9 * short**3)
    if long_side_is_whole(shape, tasks):
        products = tasks * (long * short**2 + long**2 * short + 2 * long * short**2)
        return solving + products + 9 * (long**3 + short**3) + 4 * (long**2 * short + long * short**2)
    solving = tasks * (long * short**2 + 9 * short**3)
    products = tasks * (3 * long * short**2 + 4 * short**3) + 6 * long * short**2
    return solving + products + 2 * 9 * short**3 + 4 * long * short**2
