"""Sparsifying, electing and summing in Triton: one launch for all tasks, and one before it if ties are selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load, random_words, rounded, selected, ties_in_block
from ..magnitude_select import MagnitudeSelection
from ..random_mask import mask_threshold
from ..random_mask.triton_kernel import draws
from . import Sparsifier, least_divisor
from .ranked import rank_tables

BLOCK = 1024
# Number of tasks between which the compiler may move work. With 4, float64 spills on sm_86.
GROUP = {torch.float32: 4, torch.float64: 2}


@triton.jit
def tie_kernel(
    base_ptr, tuned_ptrs, thresholds_ptr, ties_in_ptr, numel,
    SELECTIONS: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``ties_in[s, b] = #{i in block b: |tuned_t - base|_i = thresholds[s]}`` for each selection s of a task t."""
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    blocks = tl.num_programs(0).to(tl.int64)
    start = load(base_ptr, offsets, inside, REAL)  # (BLOCK,)
    for t in tl.static_range(len(tuned_ptrs)):
        if SELECTIONS[t][0] >= 0 or SELECTIONS[t][1] >= 0:
            magnitude = tl.abs(load(tuned_ptrs[t], offsets, inside, REAL) - start)
            for side in tl.static_range(2):
                if SELECTIONS[t][side] >= 0:
                    ties = ties_in_block(magnitude, inside, thresholds_ptr + SELECTIONS[t][side])
                    tl.store(ties_in_ptr + SELECTIONS[t][side] * blocks + block, ties)


@triton.jit
def elect_and_sum_kernel(
    base_ptr, tuned_ptrs, numbers_ptr, thresholds_ptr, ties_ptr, ties_before_ptr, draws_ptr,
    ranks_ptrs, rank_thresholds_ptrs, rank_factors_ptrs, mask_ptrs, out_ptr, numel, tasks,
    SELECTIONS: tl.constexpr, DRAWN: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr,
    REAL: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out = base + alpha combined``, rounded once to the dtype of `out`, see `elect_and_sum`.

    `tuned_ptrs` has one pointer per task; `numbers_ptr` points to float64: alpha, the least divisor, then
    factor and weight of each task. `tasks` is the number of pointers.
    SELECTIONS names for each task the selections of its largest elements and of its outliers, or -1 (a tuple with None
    in it is more than some versions of Triton take):
    `thresholds_ptr` and `ties_ptr` hold one number for each, `ties_before_ptr` (selections, blocks) how many magnitudes
    tie in earlier blocks. DRAWN: for each task whether its elements survive at random; `draws_ptr` has threshold, seed,
    substream and first counter of each task; ranks replace the threshold by a threshold and a factor per rank where
    there are `ranks_ptrs`.
    `mask_ptrs`: of each task, uint8, or None.
    """
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    blocks = tl.num_programs(0).to(tl.int64)
    start = load(base_ptr, offsets, inside, REAL)  # (BLOCK,)
    # Both outcomes of an election are summed, so that each task vector is formed once.
    votes = tl.zeros((BLOCK,), tl.float64)
    positive = tl.zeros((BLOCK,), REAL)
    negative = tl.zeros((BLOCK,), REAL)
    positive_weight = tl.zeros((BLOCK,), REAL)
    negative_weight = tl.zeros((BLOCK,), REAL)
    for first in tl.static_range(0, len(tuned_ptrs), GROUP):
        # Always true, but known only at run time, so no work moves from one group to the next. Without groups, the
        # terms of many tasks would wait for their sums in more registers than there are.
        if tasks > first:
            for t in tl.static_range(first, first + GROUP):
                if t < len(tuned_ptrs):
                    delta = load(tuned_ptrs[t], offsets, inside, REAL) - start
                    survives = inside
                    for side in tl.static_range(2):
                        if SELECTIONS[t][side] >= 0:
                            chosen = selected(
                                tl.abs(delta), inside, thresholds_ptr + SELECTIONS[t][side],
                                ties_ptr + SELECTIONS[t][side], ties_before_ptr + SELECTIONS[t][side] * blocks + block,
                            )  # fmt: skip
                            survives = survives & (chosen == (side == 0))
                    factor_ptr = numbers_ptr + 2 + 2 * t
                    if DRAWN[t]:
                        limit_ptr = draws_ptr + 4 * t
                        words = random_words(
                            block, tl.load(limit_ptr + 1), tl.load(limit_ptr + 2), tl.load(limit_ptr + 3), BLOCK
                        )
                        if ranks_ptrs[t] is not None:
                            rank = tl.load(ranks_ptrs[t] + offsets, mask=inside, other=0)  # (BLOCK,)
                            limit_ptr, factor_ptr = rank_thresholds_ptrs[t] + rank, rank_factors_ptrs[t] + rank
                        survives = survives & (words.to(tl.int64) < tl.load(limit_ptr))
                    if mask_ptrs[t] is not None:
                        survives = survives & (tl.load(mask_ptrs[t] + offsets, mask=inside, other=0) != 0)
                    survivor = tl.where(survives, delta, 0.0)
                    factor = tl.load(factor_ptr)
                    vector = factor.to(REAL) * survivor
                    if ELECT == "none":
                        positive += vector
                    else:
                        voter = survivor if ELECT == "unweighted" else vector
                        if ELECT == "count":
                            vote = (voter > 0).to(tl.float64) - (voter < 0).to(tl.float64)
                        elif ELECT == "unweighted":
                            vote = survivor.to(tl.float64)
                        else:
                            vote = factor * survivor.to(tl.float64)
                        # 2^-39 is exact in every format, unlike AGAINST of the reference, and so is the product.
                        votes += tl.where(vote < 0, vote - vote * 1.8189894035458565e-12, vote)
                        # NaN is on both sides, so that it is never lost.
                        positive += tl.where(voter < 0, 0.0, vector)
                        negative += tl.where(voter > 0, 0.0, vector)
                        if NORMALIZE:
                            weight = tl.load(numbers_ptr + 3 + 2 * t).to(REAL)
                            positive_weight += tl.where((voter < 0) | (voter == 0), 0.0, weight)
                            negative_weight += tl.where((voter > 0) | (voter == 0), 0.0, weight)
    combined = positive
    if ELECT != "none":
        combined = tl.where(votes >= 0, positive, negative)
        if NORMALIZE:
            divisor = tl.where(votes >= 0, positive_weight, negative_weight)
            combined = divide(combined, tl.where(tl.abs(divisor) <= tl.load(numbers_ptr + 1).to(REAL), 1.0, divisor))
    step = tl.load(numbers_ptr).to(REAL) * combined
    merged = tl.where(step == 0, start, start + step)
    tl.store(out_ptr + offsets, rounded(merged, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def divide(x, y):
    """``x / y``, correctly rounded: for float32 Triton's operator is not, and `tl.div_rn` may flush subnormals.

    The quotient of float32 numbers in float64 is never so near a tie of float32 that the second rounding goes wrong.
    """
    return (x.to(tl.float64) / y.to(tl.float64)).to(x.dtype)


def run(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    sparsifiers: Sequence[Sparsifier],
    elect: str,
    normalize: bool,
    alpha: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `elect_and_sum`. Never waits for the device."""
    dtype = accumulation_dtype(base, *tuned)
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    numel, real, grid = out.numel(), REAL[dtype], (triton.cdiv(out.numel(), BLOCK),)
    if numel == 0:
        return out
    origin, tensors = flat(base), tuple(flat(tensor) for tensor in tuned)
    numbers = [alpha, least_divisor(weights, dtype)]
    for weight, rule in zip(weights, sparsifiers, strict=True):
        numbers += [weight * rule.rescale, weight]
    # In memory: Triton would pass a Python float as float32.
    scalars = torch.tensor(numbers, dtype=torch.float64, device=base.device)
    drawn = tuple(rule.keep_probability < 1 or rule.ranked is not None for rule in sparsifiers)
    sampled = thresholds = ties = ties_before = None
    if any(drawn):
        sampled = draws(
            [
                (mask_threshold(rule.keep_probability), rule.seed, rule.substream, rule.first // 4)
                for rule in sparsifiers
            ],
            base.device,
        )
    ranked = _ranked(weights, sparsifiers)
    masks = tuple(None if rule.mask is None else flat(rule.mask).view(torch.uint8) for rule in sparsifiers)
    places, selections = _selections(sparsifiers)
    with device_of(base):
        if selections:
            thresholds = torch.stack([selection.rounded(dtype).threshold for selection in selections])
            ties = torch.stack([selection.rounded(dtype).ties for selection in selections])
            ties_in = torch.empty((len(selections), *grid), dtype=torch.int64, device=base.device)
            tie_kernel[grid](origin, tensors, thresholds, ties_in, numel, places, real, BLOCK, **LAUNCH)
            ties_before = ties_in.cumsum(1) - ties_in
        elect_and_sum_kernel[grid](
            origin, tensors, scalars, thresholds, ties, ties_before, sampled, *ranked, masks, out, numel, len(tensors),
            places, drawn, elect, normalize, real, GROUP[dtype], BLOCK, **LAUNCH,
        )  # fmt: skip
    return out


def _ranked(weights: Sequence[float], sparsifiers: Sequence[Sparsifier]) -> tuple[tuple[Tensor | None, ...], ...]:
    """Return for each task its ranks, thresholds by rank and factors by rank, or None."""
    rows: list[tuple[Tensor | None, ...]] = []
    for weight, rule in zip(weights, sparsifiers, strict=True):
        row: tuple[Tensor | None, ...] = (None, None, None)
        if rule.ranked is not None:
            ranks = flat(rule.ranked.ranks)
            tables = rank_tables(rule.ranked, weight * rule.rescale)
            row = (ranks, *(table.to(ranks.device) for table in tables))
        rows.append(row)
    return tuple(zip(*rows, strict=True))


def _selections(sparsifiers: Sequence[Sparsifier]) -> tuple[tuple[tuple[int, int], ...], list[MagnitudeSelection]]:
    """Return the selections of all tasks, and for each task the places of its two among them, -1 for none."""
    selections: list[MagnitudeSelection] = []

    def place(selection: MagnitudeSelection | None) -> int:
        if selection is None:
            return -1
        selections.append(selection)
        return len(selections) - 1

    return tuple((place(rule.largest), place(rule.outliers)) for rule in sparsifiers), selections
