"""Solver ``products`` for `tsv_merge` and `tsv_merge_layers`: the layers it accepts, and its certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import ConvergenceError, RtsvmError
from ..arguments import finite, given_matrices, nonzero_support
from ..certificate import Certificate, Mode, tolerance_of
from ..factored import Factored
from ..interference import interference_of_bases
from ..merge_result import TsvMerge, TsvParts
from ..ranks import Rank
from .merge import ProductsMerge, products_tsv_merges
from .purification import STEPS


def merge_by_products(
    matrices: Sequence[Tensor],
    rows: Tensor,
    columns: Tensor,
    ranks: Sequence[Rank],
    weights: Sequence[float],
    mode: Mode,
) -> TsvMerge:
    """Merge one layer.

    Args:
        matrices: T matrices (m, n).
        rows: indices of the rows in which some matrix is not zero; the others stay zero.
        columns: the same for the columns.
        ranks: T ranks.
        weights: T factors of the cores.
        mode: ``exact`` or ``fast``.

    Raises:
        ConvergenceError: the solver does not accept a rank, or its result is not accurate enough.
    """
    numbers = require_numbers(ranks, min(len(rows), len(columns)))
    support = torch.stack([matrix[rows[:, None], columns] for matrix in matrices])
    (merged,) = products_tsv_merges(support[None], [numbers], [weights], "fp16x3", _tolerance(mode))
    found = certify(merged, support, mode)
    result = torch.zeros_like(matrices[0])
    result[rows[:, None], columns] = found.matrix.to(result.dtype)
    return replace(found, matrix=finite(result, "tsv_merge"))


def parts_by_products(
    matrices: Sequence[Tensor], rows: Tensor, columns: Tensor, ranks: Sequence[Rank], mode: Mode
) -> TsvParts:
    """Return the summands of the merge of one layer; the arguments and errors are those of `merge_by_products`."""
    numbers = require_numbers(ranks, min(len(rows), len(columns)))
    support = torch.stack([matrix[rows[:, None], columns] for matrix in matrices])
    (merged,) = products_tsv_merges(support[None], [numbers], None, "fp16x3", _tolerance(mode), keep_factors=True)
    found = certify(merged, support, mode)
    assert merged.factors is not None
    left, right = merged.factors
    blocks = zip(torch.split(left, [*found.ranks], dim=1), torch.split(right, [*found.ranks]), strict=True)
    return TsvParts(
        tuple(Factored(*block) for block in blocks),
        found.ranks,
        found.captured_energy,
        found.certificate,
        found.interference,
    )


def merge_layers_by_products(
    layers: Sequence[Sequence[Tensor | Factored]],
    ranks: Sequence[Sequence[Rank]],
    weights: Sequence[Sequence[float]],
    mode: Mode,
) -> dict[int, TsvMerge]:
    """Merge layers of one shape and number of tasks in one batch; return the results by the index of the layer.

    Leave out layers that cannot join a batch, and those whose result is not accurate enough.
    """
    op, short = "tsv_merge_layers", [min(layer[0].shape) if layer else 0 for layer in layers]
    results: dict[int, TsvMerge] = {}
    for group, batch in batches_of_layers(layers, op, lambda i: accepts(ranks[i], short[i])):
        own = [require_numbers(ranks[i], min(batch.shape[-2:])) for i in group]
        merges = products_tsv_merges(batch, own, [weights[i] for i in group], tolerance=_tolerance(mode))
        for i, merged, matrices in zip(group, merges, batch, strict=True):
            with suppress(ConvergenceError):  # the caller merges it alone, and reports the failure
                found = certify(merged, matrices, mode)
                results[i] = replace(found, matrix=finite(found.matrix.to(matrices.dtype), op))
    return results


def batches_of_layers(
    layers: Sequence[Sequence[Tensor | Factored]], op: str, accepted: Callable[[int], bool] = lambda _: True
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the indices of two or more layers of one shape, dtype, device and number of tasks, and their stack.

    Args:
        layers: L lists of task matrices.
        op: named in errors.
        accepted: whether the layer of an index may join.

    Yields:
        The indices, and a tensor (layers, T, m, n).
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    stacks: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        stack = stack_tasks(layer, op)
        if stack is not None and accepted(index):
            stacks[index] = stack
            groups.setdefault((stack.shape, stack.dtype, stack.device), []).append(index)
    for group in (group for group in groups.values() if len(group) > 1):
        yield group, torch.stack([stacks.pop(i) for i in group])


def stack_tasks(layer: Sequence[Tensor | Factored], op: str) -> Tensor | None:
    """Return the tasks of a layer as one tensor (T, m, n); None if they cannot join a batch.

    They can if they are finite matrices of one shape, dtype and device without common rows or columns of zeros.
    """
    dense = [matrix for matrix in layer if isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.numel()]
    kinds = {(matrix.shape, matrix.dtype, matrix.device) for matrix in dense}
    if len(kinds) != 1 or len(layer) != len(dense):
        return None
    try:
        dense = given_matrices(dense, op, one_device=True)
    except RtsvmError:  # the caller merges it alone, and reports what is wrong
        return None
    rows, columns = nonzero_support(dense)
    stack = torch.stack(dense)
    whole = (len(rows), len(columns)) == dense[0].shape and bool(torch.isfinite(stack).all())
    return stack if whole else None


def accepts(ranks: Sequence[Rank], short: int) -> bool:
    """Whether `require_numbers` accepts the ranks."""
    with suppress(ConvergenceError):
        return bool(require_numbers(ranks, short))
    return False


def require_numbers(ranks: Sequence[Rank], short: int) -> list[int]:
    """Return the ranks if the solver can take them.

    Raises:
        ConvergenceError: a rank is a rule or 0, or they sum to more than `short`.
    """
    numbers = [rank for rank in ranks if isinstance(rank, int)]
    if len(numbers) != len(ranks) or not all(0 < rank <= short for rank in numbers) or sum(numbers) > short:
        raise ConvergenceError("products: needs positive ranks of sum at most min(m, n)")
    return numbers


def certify(merged: ProductsMerge, matrices: Tensor, mode: Mode) -> TsvMerge:
    """Return the result with its certificate.

    Args:
        merged: of the task matrices.
        matrices: (T, m, n).
        mode: ``exact`` or ``fast``.

    Raises:
        ConvergenceError: the result is not accurate enough.
    """
    if any(max(part.outer_steps, part.inner_steps) >= STEPS["fp16x3"] for part in merged.parts):
        raise ConvergenceError("products: singular values on both sides of a rank are too close to be separated")
    ranks = tuple(part.core.shape[0] for part in merged.parts)
    certificate = Certificate(
        error=merged.error,
        orthogonality=merged.orthogonality,
        subspace_error=max(part.subspace_error for part in merged.parts),
        tolerance=tolerance_of(mode),
        route="products-fp16x3",
        basis_rank=(sum(ranks), sum(ranks)),
        basis_condition=merged.condition,
        gap=min(part.gap for part in merged.parts),
    )
    certificate.require()
    energies = tuple(
        min(1.0, float(part.core.square().sum() / matrix.double().square().sum()))
        for part, matrix in zip(merged.parts, matrices, strict=True)
    )
    bases = [part.U for part in merged.parts], [part.Vh.mT for part in merged.parts]
    overlaps = (interference_of_bases(bases[0]), interference_of_bases(bases[1]))
    return TsvMerge(merged.matrix, ranks, energies, certificate, overlaps)


def _tolerance(mode: Mode) -> float | None:
    # fp16 alone has errors up to 2e-2, more than fast mode allows. It saves the second solve with a compressed
    # spectrum.
    return None if mode == "exact" else tolerance_of(mode) / 2
