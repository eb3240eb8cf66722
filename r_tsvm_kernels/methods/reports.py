"""What a method returns, and the report of how it came about."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from ..linalg import Certificate, Factored
from ..linalg.decompositions import frobenius_norm
from ..text import dtype_name, listed


@contextmanager
def timed(stages: dict[str, list[float]], stage: str) -> Iterator[None]:
    """Add the wall time and the CPU time of this thread in the ``with`` block to a stage."""
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        yield
    finally:
        before = stages.get(stage, (0.0, 0.0))
        stages[stage] = [before[0] + time.perf_counter() - wall, before[1] + time.thread_time() - cpu]


def shown(report: TensorReport) -> str:
    """Return the main facts of a report: shape, what was done, ranks, accuracy, time."""
    parts = ["x".join(map(str, report.shape)) or "scalar", report.method]
    if report.treatment != "merge":
        words = {"mean": "mean task vector", "base": "the base's value"}[report.treatment]
        parts.append(f"{words} ({report.reason})")
    parts += [f"{len(report.blocks)} blocks"] if report.blocks else []
    parts += [listed(report.ranks)] if report.ranks else []
    if report.certificate is not None:
        parts.append(report.certificate.verdict)
    return ", ".join(part for part in parts if part)


# Lists of a report of which blocks have a mean.
_AVERAGED = ("sparsities", "outlier_masses", "weights", "captured_energy", "interference", "damping", "retained")


@dataclass(repr=False)
class TensorReport:
    """How one tensor was merged. Lists have one entry per task; they are empty where a quantity does not apply.

    Attributes:
        method: name of the merge method.
        treatment: ``merge`` (the method's formula), ``mean`` (mean of the task vectors) or ``base`` (left alone).
        reason: reason for the treatment, or the tensor it is tied to; empty for other merged tensors.
        shape: of the tensor.
        ranks: rank kept per task.
        ranks_asked: rank that `tsvm` and `rtsvm` asked for per task, before the share of each task and the numerical
            rank limited it.
        sparsities: fraction of small elements of each task matrix, see ``sparsity_eps``.
        outlier_masses: share of each task's total magnitude above the outlier threshold.
        weights: factor of each task's core, or weight of each task vector or model.
        captured_energy: fraction of each task matrix's squared Frobenius norm inside the kept subspaces.
        certificate: accuracy of the spectral solve; None if there was none.
        interference: overlap of the tasks' left and of their right singular subspaces before they were made
            orthogonal: 0 for independent tasks, 1 for equal subspaces, negative if they are more orthogonal than
            independent ones. See `linalg.interference_above_chance` for the formula.
        task_norms: Frobenius norm of each task vector ``W_t - W_0``, as loaded; empty if not measured.
        update_norm: Frobenius norm of the change of the base, as stored; None if not measured.
        seconds: wall time of the computation.
        stages: wall time and CPU time of the thread, in seconds, of ``merge`` (the computation), of its parts
            ``statistics`` and ``spectral`` if the method has them, and of ``read`` and ``write`` in an engine.
        damping: factor g_t of each task by which `rtsvm` damps tasks that are far from the base.
        retained: share of each task that weighted orthogonalisation keeps, ``<sum_s M_s, D_t> / norm(D_t)^2``.
        gain: factor of the update by which `rtsvm` gives back what orthogonalisation took; None if not used.
        rounding_norm: Frobenius norm of what rounding to FP8 changed; None if the tensor is not written in FP8.
        weight_norm: Frobenius norm of the merged tensor before that.
        part: index of a block in its tensor, such as ``[3]`` for an expert; empty for a whole tensor.
        blocks: the report of each block of a tensor that was merged in blocks, such as packed experts. In the report of
            a tensor with several, ranks are empty, other numbers are means, and the certificate is the worst.
        solver: ``eigen`` or ``products``, the solver that began; ``certificate.route`` is the one that ended. Empty
            if the method has no choice.
        part_products: ``<M_s, M_t>`` of the parts of a tensor that was decomposed, (T, T).
        part_rounding: norm of what storing changed in the part of each task.
        part_error: estimated error (Frobenius norm) of the sum of the parts, before they were stored.
    """

    method: str = ""
    treatment: str = "merge"
    reason: str = ""
    shape: tuple[int, ...] = ()
    ranks: list[int] = field(default_factory=list)
    ranks_asked: list[int] = field(default_factory=list)
    sparsities: list[float] = field(default_factory=list)
    outlier_masses: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    captured_energy: list[float] = field(default_factory=list)
    certificate: Certificate | None = None
    interference: list[float] = field(default_factory=list)
    task_norms: list[float] = field(default_factory=list)
    update_norm: float | None = None
    seconds: float = 0.0
    stages: dict[str, list[float]] = field(default_factory=dict)
    damping: list[float] = field(default_factory=list)
    retained: list[float] = field(default_factory=list)
    gain: float | None = None
    rounding_norm: float | None = None
    weight_norm: float | None = None
    part: str = ""
    blocks: list[TensorReport] = field(default_factory=list)
    solver: str = ""
    part_products: list[list[float]] = field(default_factory=list)
    part_rounding: list[float] = field(default_factory=list)
    part_error: float = 0.0

    def __repr__(self) -> str:
        return f"TensorReport({shown(self)}, {self.seconds:.3g} s)"

    @classmethod
    def of_blocks(cls, reports: Sequence[TensorReport], parts: Sequence[str]) -> TensorReport:
        """Return the report of a tensor from those of its blocks."""
        found = cls(reports[0].method, blocks=list(reports))
        for report, part in zip(reports, parts, strict=True):
            found._add_times(report)
            report.part, report.seconds, report.stages = part, 0.0, {}
        found._average()
        if not parts[0]:  # the whole tensor, as one matrix
            found.ranks, found.ranks_asked = list(reports[0].ranks), list(reports[0].ranks_asked)
        return found

    def _average(self) -> None:
        """Take means, norms over all blocks, and the worst certificate."""
        reports = self.blocks
        for name in _AVERAGED:
            lists = [getattr(report, name) for report in reports if getattr(report, name)]
            setattr(self, name, [math.fsum(values) / len(values) for values in zip(*lists, strict=True)])
        gains = [report.gain for report in reports if report.gain is not None]
        self.gain = math.fsum(gains) / len(gains) if gains else None
        certificates = [report.certificate for report in reports if report.certificate is not None]
        self.certificate = max(certificates, key=lambda found: found.error, default=None)
        self.task_norms = [math.hypot(*norms) for norms in zip(*(report.task_norms for report in reports), strict=True)]
        updates = [report.update_norm for report in reports if report.update_norm is not None]
        self.update_norm = math.hypot(*updates) if updates else None

    def add_rows(self, other: TensorReport) -> None:
        """Add the times and norms in the report of other rows of the same tensor, or its blocks."""
        self._add_times(other)
        pairs = zip(self.part_products, other.part_products, strict=True)
        self.part_products = [[a + b for a, b in zip(*rows, strict=True)] for rows in pairs]
        self.part_rounding = [math.hypot(a, b) for a, b in zip(self.part_rounding, other.part_rounding, strict=True)]
        self.part_error = math.hypot(self.part_error, other.part_error)
        self.rounding_norm = _joined(self.rounding_norm, other.rounding_norm)
        self.weight_norm = _joined(self.weight_norm, other.weight_norm)
        if self.blocks:
            self.blocks += other.blocks
            self._average()
            return
        self.task_norms = [math.hypot(a, b) for a, b in zip(self.task_norms, other.task_norms, strict=True)]
        self.update_norm = _joined(self.update_norm, other.update_norm)

    def _add_times(self, other: TensorReport) -> None:
        self.seconds += other.seconds
        for stage, spent in other.stages.items():
            self.stages[stage] = [a + b for a, b in zip(self.stages.get(stage, [0.0, 0.0]), spent, strict=True)]


def _joined(norm: float | None, other: float | None) -> float | None:
    """Return the norm of two parts of a tensor; None if it was not measured."""
    return None if norm is None or other is None else math.hypot(norm, other)


@dataclass(repr=False)
class MergeResult:
    """A merged tensor, and how it was merged.

    Attributes:
        weight: the merged tensor.
        report: ranks, sparsities, weights, certificate, time.
        scales: of a weight that an engine writes in FP8; otherwise None.
        parts: what an engine writes instead of the weight, by name, if it decomposes; otherwise None.
    """

    weight: Tensor
    report: TensorReport
    scales: Tensor | None = None
    parts: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        shape, _, rest = shown(self.report).partition(", ")
        form = f"{shape} {dtype_name(self.weight.dtype)}"
        return f"MergeResult({', '.join(part for part in (form, rest) if part)})"


@dataclass(repr=False)
class Summands:
    """The summands of a merge that is linear in the weights, ``W = W_0 + alpha * sum_t w_t M_t``.

    Attributes:
        parts: M_t of each task, (m, n); none if the tensor keeps the base's value.
        report: of the merge with weights 1.
        error: estimated error of that merge (Frobenius norm), in the units of the weights.
    """

    parts: list[Tensor | Factored]
    report: TensorReport
    error: float = 0.0


def total_norm(parts: Sequence[Tensor | Factored]) -> float:
    """Return the root of the sum of the squared Frobenius norms of summands, which no cancelling makes small."""
    return math.hypot(*(part.norm() if isinstance(part, Factored) else frobenius_norm(part) for part in parts))
