"""Task Singular Vectors Merging (TSV-Merge)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from ..linalg import Mode, Solver, fixed_rank, tsv_merge
from ..ops import accumulation_dtype, add_update
from .base import FiniteFloat, MergeResult, MethodParameters, TensorReport, register


class TsvmParameters(MethodParameters):
    """Parameters of `tsvm`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    solver: Solver = Field(default="eigen", description="eigen, or products (tensor cores)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


@register(
    "tsvm",
    pretty_name="TSV-Merge",
    paper_url="https://arxiv.org/abs/2412.00081",
    parameters=TsvmParameters,
    matrices_only=True,
)
def tsvm(base: Tensor, tuned: Sequence[Tensor], options: TsvmParameters) -> MergeResult:
    """Return ``W_0 + alpha * TSV-Merge(D_1 .. D_T)`` at the uniform rank ``floor(min(m, n) / T)``.

    Gargiulo et al., CVPR 2025. A matrix with fewer rows or columns than tasks has rank 0 to give away: it stays the
    base's, as in the published code.
    """
    dtype = accumulation_dtype(base, *tuned)
    task_matrices = [tensor.to(dtype) - base.to(dtype) for tensor in tuned]
    rank = fixed_rank((base.shape[0], base.shape[1]), len(tuned))
    merged = tsv_merge(task_matrices, [rank] * len(tuned), options.weight, options.mode, solver=options.solver)
    report = TensorReport(
        ranks=list(merged.ranks),
        weights=list(options.weight),
        captured_energy=list(merged.captured_energy),
        certificate=merged.certificate,
    )
    return MergeResult(add_update(base, merged.matrix, options.alpha), report)
