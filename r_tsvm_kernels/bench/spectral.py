"""Benchmarks of products and decompositions, which are bound by arithmetic: flops count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import linalg, ops
from ..linalg import Factored, Solver
from ..ops import Planes
from . import published
from .case import Case, Inputs, Provider
from .element_wise import op_case
from .registry import benchmark

# Errors allowed: of fp16x3 products and float32 sums; of a merged matrix in exact mode; and of float32 SVDs on these
# inputs, which are not wrong for it.
PRODUCT, PROMISED, FLOAT32_SVD = 2e-6, 1e-4, 1e-2
LORA_RANK = 16


def _dense(result: Any) -> list[Tensor]:
    result = result[0] if isinstance(result, tuple) else result
    matrix: Any = getattr(result, "matrix", result)
    return [matrix.dense() if isinstance(matrix, Planes) else matrix]


@benchmark("split_planes", "ops")
def _(inputs: Inputs) -> Case:
    x = inputs.deltas[0]
    return op_case(
        inputs, ["split_planes"], lambda: ops.split_planes(x), x.double, 8 * inputs.numel, values=_dense,
        limit=2.0**-21,
    )  # fmt: skip


def _product(
    inputs: Inputs,
    op: str,
    call: Callable[[], Any],
    truth: Callable[[], Tensor],
    plain: Callable[[], Tensor],
    flops: float,
    moved: int,
) -> Case:
    """Return the case of a product of planes; torch has its own float32 product."""
    return op_case(
        inputs, [op], call, truth, moved, best=plain, values=_dense, limit=PRODUCT, flops=flops, ceiling="matmul"
    )


def _square(inputs: Inputs) -> Tensor:
    """Return a symmetric matrix of the short side, of norm 1 at most."""
    x = inputs.deltas[0] if inputs.shape[0] >= inputs.shape[1] else inputs.deltas[0].mT
    gram = x.mT @ x
    square: Tensor = (gram + gram.mT) / (2 * gram.norm())
    return square


@benchmark("symm_gram", "ops", "spectral")
def _(inputs: Inputs) -> Case:
    x, (m, n) = inputs.deltas[0], inputs.shape
    planes = ops.split_planes(x)
    exact = planes.dense().double()
    return _product(
        inputs, "symm_gram", lambda: ops.symm_gram(planes), lambda: exact.mT @ exact, lambda: x.mT @ x,
        m * n * n, 4 * (m * n + n * n),
    )  # fmt: skip


@benchmark("symm_square", "ops", "spectral")
def _(inputs: Inputs) -> Case:
    x = _square(inputs)
    planes, n = ops.split_planes(x), len(x)
    exact = planes.dense().double()
    return _product(
        inputs, "symm_square", lambda: ops.symm_square(planes, -1.0, 2.0), lambda: 2 * exact - exact @ exact,
        lambda: torch.addmm(x, x, x, beta=2.0, alpha=-1.0), float(n**3), 8 * n * n,
    )  # fmt: skip


@benchmark("purify_step", "ops", "spectral")
def _(inputs: Inputs) -> Case:
    x = _square(inputs)[None]
    planes, n, one = ops.split_planes(x), x.shape[-1], x.new_ones(1)
    steering = ops.first_steering(one, one, 2 * one, [(0 * one, 0 * one)], 1).of_unscaled(planes.scale)
    exact = planes.dense().double()
    return _product(
        inputs, "purify_step", lambda: ops.purify_step(planes, steering), lambda: 2 * exact - exact @ exact,
        lambda: torch.baddbmm(x, x, x, beta=2.0, alpha=-1.0), float(n**3), 8 * n * n,
    )  # fmt: skip


@benchmark("gemm3", "ops", "spectral")
def _(inputs: Inputs) -> Case:
    x, y, (m, n) = inputs.deltas[0], inputs.deltas[1], inputs.shape
    left, right = ops.split_planes(x), ops.split_planes(y).mT
    exact, exact_right = left.dense().double(), right.dense().double()
    return _product(
        inputs, "gemm3", lambda: ops.gemm3(left, right), lambda: exact @ exact_right, lambda: x @ y.mT,
        2.0 * m * m * n, 4 * (2 * m * n + m * m),
    )  # fmt: skip


def solver_case(
    inputs: Inputs,
    ours: dict[str, Callable[[], Any]],
    by_svd: Callable[[Sequence[Tensor]], Tensor],
    matrices: Sequence[Tensor],
    flops: float,
    values: Callable[[Any], Sequence[Tensor]] = _dense,
) -> Case:
    """Return the case of a decomposition: our solvers against float32 SVDs; the truth by SVDs in float64."""
    plain = Provider("float32 SVD", lambda: by_svd(matrices), "reference", FLOAT32_SVD)
    return Case(
        inputs,
        [*(Provider(name, call) for name, call in ours.items()), plain],
        lambda: [by_svd([matrix.double() for matrix in matrices])],
        PROMISED,
        4 * inputs.numel * (inputs.tasks + 1),
        values,
        flops,
        "matmul",
    )


def _rank(inputs: Inputs, share: int = 1) -> int:
    return max(1, min(inputs.shape) // inputs.tasks // share)


@benchmark("leading_subspaces", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    delta, rank = inputs.deltas[0], _rank(inputs)
    return solver_case(
        inputs,
        {"eigen": lambda: linalg.leading_subspaces(delta, rank)},
        lambda matrices: published.truncated(matrices[0], rank),
        [delta],
        linalg.tsv_merge_flops(inputs.shape, [rank]),
        lambda result: [result if isinstance(result, Tensor) else result.U @ result.core @ result.Vh],
    )


@benchmark("truncated_svd", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    delta, rank = inputs.deltas[0], _rank(inputs)

    def values(result: Any) -> list[Tensor]:
        return [result if isinstance(result, Tensor) else (result.U * result.S) @ result.Vh]

    return solver_case(
        inputs,
        {"eigen": lambda: linalg.truncated_svd(delta, rank)},
        lambda matrices: published.truncated(matrices[0], rank),
        [delta],
        linalg.tsv_merge_flops(inputs.shape, [rank]),
        values,
    )


@benchmark("polar", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    delta, (m, n) = inputs.deltas[0], inputs.shape
    short = min(m, n)
    return solver_case(
        inputs,
        {"eigen": lambda: linalg.polar(delta)},
        lambda matrices: published.polar(matrices[0]),
        [delta],
        4.0 * m * n * short + 9.0 * short**3,
        lambda result: [result if isinstance(result, Tensor) else result.matrix],
    )


def _tsv_merge(inputs: Inputs, share: int) -> Case:
    deltas, ranks = inputs.deltas, [_rank(inputs, share)] * inputs.tasks
    solvers: tuple[Solver, ...] = ("eigen", "products")
    if inputs.device.type == "cpu":
        solvers = ("eigen",)  # a CPU only simulates products
    return solver_case(
        inputs,
        {solver: partial(linalg.tsv_merge, deltas, ranks, solver=solver) for solver in solvers},
        lambda matrices: published.tsv_merge(matrices, ranks),
        deltas,
        linalg.tsv_merge_flops(inputs.shape, ranks),
    )


@benchmark("tsv_merge: k = r // T", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    return _tsv_merge(inputs, 1)


@benchmark("tsv_merge: sum(k) = r / 8", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    return _tsv_merge(inputs, 8)


def lora_set(inputs: Inputs) -> list[Factored]:
    """Return adapters of rank 16 for the weight, one per task; of a smaller rank where the weight has no more."""
    (m, n), rank = inputs.shape, min(LORA_RANK, _rank(inputs))
    generator = torch.Generator(inputs.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=inputs.device)

    return [Factored(normal(m, rank), normal(rank, n) / n) for _ in range(inputs.tasks)]


def lora_case(inputs: Inputs, call: Callable[[Sequence[Factored]], Any], by_svd: Callable[..., Tensor]) -> Case:
    """Return the case of a merge of adapters: of factors by ours, of dense updates by SVDs."""
    adapters = lora_set(inputs)
    total = sum(adapter.left.shape[1] for adapter in adapters)
    (m, n) = inputs.shape
    return solver_case(
        inputs,
        {"factors": lambda: call(adapters)},
        by_svd,
        [adapter.dense() for adapter in adapters],
        6.0 * (m + n) * total**2 + 2.0 * m * n * total,
    )


@benchmark("tsv_merge: LoRA", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    ranks = [min(LORA_RANK, _rank(inputs))] * inputs.tasks
    return lora_case(
        inputs,
        lambda adapters: linalg.tsv_merge(adapters, ranks),
        lambda matrices: published.tsv_merge(matrices, ranks),
    )


@benchmark("tsv_merge_layers", "linalg", "spectral")
def _(inputs: Inputs) -> Case:
    """Two layers of one shape."""
    layers = [inputs.deltas, [delta.flip(0) for delta in inputs.deltas]]
    ranks = [_rank(inputs)] * inputs.tasks
    solvers: tuple[Solver, ...] = ("eigen", "products") if inputs.device.type == "cuda" else ("eigen",)
    return solver_case(
        inputs,
        {solver: partial(linalg.tsv_merge_layers, layers, [ranks] * 2, solver=solver) for solver in solvers},
        lambda matrices: torch.stack(
            [published.tsv_merge(part, ranks) for part in (matrices[: inputs.tasks], matrices[inputs.tasks :])]
        ),
        [delta for layer in layers for delta in layer],
        2 * linalg.tsv_merge_flops(inputs.shape, ranks),
        lambda result: [result] if isinstance(result, Tensor) else [torch.stack([part.matrix for part in result])],
    )
