"""Compare results of spectral functions, and their certificates, with numpy in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from r_tsvm_kernels import ConvergenceError, MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import (
    Certificate,
    Factored,
    joint_svd,
    leading_subspaces,
    merge_factored,
    polar,
    truncated_svd,
    tsv_merge,
    tsv_merge_layers,
    weighted_merge,
)
from r_tsvm_kernels.merge import summands_of
from r_tsvm_kernels.methods import get_method
from r_tsvm_kernels.parts import StoredParts, merge_parts, store_parts
from r_tsvm_kernels.parts_folder import TensorParts

from . import truth
from .inputs import Problem
from .truth import EPS, Svd, Triplets

# Relative to the size of the weighted cores: a merge that cancels to less than this is zero up to rounding.
CANCELLED = 2.0**-20
# Rounding errors of an SVD in float64, in units of eps times the largest singular value.
BACKWARD = 200
# If float64 SVDs differ by less, they cannot judge an estimate.
FEW_DIGITS = 2.0**-46
SVDS = (truth.plain, truth.flipped)


@dataclass(frozen=True)
class Verdict:
    """What became of one call.

    Attributes:
        name: the function.
        label: the input.
        outcome: ``judged``; ``arbitrary``: the certificate admits to a choice among singular values that are equal to
            rounding, which is a valid one if it can be seen, and the result is judged for it; ``refused``
            (ConvergenceError); or ``dishonest``.
        error: against numpy, relative to the Frobenius norm; what float64 cannot tell is taken off.
        claimed: the certificate's error.
        why: of a dishonest one.
        route: of the certificate.
        needless: whether an arbitrary choice was admitted to where changes of the last bits make no difference.
    """

    name: str
    label: str
    outcome: str
    error: float = 0.0
    claimed: float = 0.0
    why: str = ""
    route: str = ""
    needless: bool = False

    @property
    def ratio(self) -> float:
        """True error over claimed error."""
        return self.error / self.claimed if self.claimed else 0.0


def compared(
    name: str, label: str, got: np.ndarray, truths: Sequence[np.ndarray], certificate: Certificate, size: float
) -> Verdict:
    """Judge a result by two float64 computations of the truth."""
    norm = max(float(np.linalg.norm(truths[0])), CANCELLED * size)
    if norm == 0:
        return verdict(name, label, float(np.linalg.norm(got)) / max(size, 1.0), 0.0, certificate)
    unknown = float(np.linalg.norm(truths[0] - truths[1])) / norm
    error = min(float(np.linalg.norm(got - exact)) for exact in truths) / norm
    return verdict(name, label, error, unknown, certificate)


def verdict(name: str, label: str, error: float, unknown: float, certificate: Certificate) -> Verdict:
    """Judge an error; `unknown` is how far two float64 computations of the truth are apart.

    After an arbitrary choice more is unknown than they show: a left direction of rounding noise has few digits.
    """
    claimed, why = certificate.error, ""
    error = max(error - (8 if certificate.arbitrary else 1) * unknown, 0.0)
    if not np.isfinite(error):
        why = "not finite"
    elif not claimed > 0:
        why = "the estimate is 0"
    elif error > 2 * claimed:
        why = f"error {error:.1e} above twice the estimate {claimed:.1e}"
    elif certificate.met and error > certificate.tolerance:
        why = f"error {error:.1e} where {certificate.tolerance:.0e} is met"
    elif unknown > max(4 * claimed, FEW_DIGITS) and not certificate.arbitrary:
        why = f"the estimate is {claimed:.1e} where float64 SVDs differ by {unknown:.1e}"
    outcome = "dishonest" if why else "arbitrary" if certificate.arbitrary else "judged"
    return Verdict(name, label, outcome, error, claimed, why, certificate.route)


def needless(exact: Callable[[Svd], np.ndarray], certificate: Certificate) -> bool:
    """Whether the last bits of the input make no difference, 1 % of the tolerance or more, for the result."""
    results = [exact(svd) for svd in (*SVDS, truth.blurred)]
    size = float(np.linalg.norm(results[0]))
    if any(other.shape != results[0].shape for other in results):
        return False
    return max(float(np.linalg.norm(other - results[0])) for other in results) <= certificate.tolerance / 100 * size


def valid_choice(D: np.ndarray, V: np.ndarray, claimed: float) -> str:
    """Say what is wrong with V (n, k) as right singular vectors of a matrix within rounding of D; '' if nothing.

    In the exact singular basis, the projector on V may only mix directions whose singular values differ by rounding,
    beyond twice the sine of an angle that the certificate claims.
    """
    k = V.shape[1]
    if not k:
        return ""
    _, S, Wh = np.linalg.svd(D, full_matrices=D.shape[0] < D.shape[1])
    values = np.concatenate([S, np.zeros(len(Wh) - len(S))])
    P = Wh @ V
    P = P @ P.T
    allowed = BACKWARD * EPS * values[0] * len(values) ** 0.5
    lead, rest = values[:k], values[k:]
    sine, square = 2 * claimed, 4 * claimed**2
    crossed = (np.maximum(np.abs(P[k:, :k]) - sine, 0) * (lead[None, :] - rest[:, None])).max(initial=0)
    gained = (np.maximum(np.diag(P)[k:] - square, 0) * (lead[-1] - rest)).max(initial=0)
    lost = (np.maximum(1 - np.diag(P)[:k] - square, 0) * (lead - rest[:1].sum())).max(initial=0) if len(rest) else 0.0
    worst = max(crossed, gained, lost)
    return f"a choice that is off by {worst / allowed:.1e} of what rounding allows" if worst > allowed else ""


@contextmanager
def recorded(module_name: str, function: str) -> Iterator[list[tuple[object, object]]]:
    """Record the calls of a function of `linalg`: its first argument and what it returned."""
    module = import_module(f"r_tsvm_kernels.linalg.{module_name}")
    original, calls = getattr(module, function), []

    def record(first, *args, **kwargs):
        found = original(first, *args, **kwargs)
        calls.append((first, found))
        return found

    with patch.object(module, function, record):
        yield calls


def doubles(matrices: Sequence[Tensor]) -> list[np.ndarray]:
    return [matrix.double().numpy() for matrix in matrices]


def single(matrix: Tensor) -> bool:
    return matrix.dtype != torch.float64


def sine(found: np.ndarray, exact: np.ndarray) -> float:
    """Frobenius norm of the sines of the angles between the ranges of two matrices with orthonormal columns."""
    return float(np.linalg.norm(found - exact @ (exact.T @ found)))


def judge_subspaces(problem: Problem, mode: str, svd: bool = False) -> Verdict:
    """`leading_subspaces`, or `truncated_svd`: both subspaces and the singular values."""
    name, (matrix, rank) = "truncated_svd" if svd else "leading_subspaces", (problem.matrices[0], problem.ranks[0])
    D = matrix.double().numpy()
    exact = [truth.leading(D, rank, single(matrix), route) for route in SVDS]
    if svd:
        found = truncated_svd(matrix, rank, mode=mode)
        k, certificate = found.ranks[0], found.certificate
        U, S, Vh = (part.numpy() for part in found)
    else:
        part = leading_subspaces(matrix, rank, mode=mode)
        k, certificate = part.rank, part.certificate
        U, Vh = part.U.numpy(), part.Vh.numpy()
        S = np.linalg.svd(part.core.numpy(), compute_uv=False)
    defect = max(float(np.abs(Q.T @ Q - np.eye(k)).max(initial=0)) for Q in (U, Vh.T))
    values = np.linalg.svd(D, compute_uv=False)
    if certificate.arbitrary:
        why = valid_choice(D, Vh.T, certificate.subspace_error)

        def projector(route: Svd) -> np.ndarray:
            triplets = truth.leading(D, rank, single(matrix), route)
            return np.concatenate([(basis @ basis.T).ravel() for basis in (triplets.U, triplets.Vh.T)])

        outcome = "dishonest" if why else "arbitrary"
        idle = needless(projector, certificate)
        return Verdict(name, problem.label, outcome, why=why, route=certificate.route, needless=idle)
    if k != len(exact[0].S):
        why = f"rank {k} instead of {len(exact[0].S)}"
        return Verdict(name, problem.label, "dishonest", 1.0, certificate.error, why, certificate.route)
    if k == 0:
        return Verdict(name, problem.label, "judged", 0.0, certificate.error)
    error = max(sine(U, exact[0].U), sine(Vh.T, exact[0].Vh.T), defect)
    error = max(error, float(np.abs(S - values[:k]).max()) / values[0])
    unknown = max(sine(exact[1].U, exact[0].U), sine(exact[1].Vh.T, exact[0].Vh.T))
    return verdict(name, problem.label, error, unknown, certificate)


def judge_tsv_merge(problem: Problem, mode: str, solver: str, layers: bool = False) -> Verdict:
    """`tsv_merge` or `tsv_merge_layers`: the merged matrix."""
    name, tasks = f"tsv_merge{'_layers' if layers else ''} {solver}", doubles(problem.matrices)
    with recorded("eigen_merge", "right_vectors") as calls:
        if layers:
            call = ([problem.matrices] * 2, [problem.ranks] * 2, [problem.weights] * 2)
            got = tsv_merge_layers(*call, mode=mode, solver=solver)[1]
        else:
            got = tsv_merge(problem.matrices, problem.ranks, problem.weights, mode=mode, solver=solver)
    kind = single(problem.matrices[0])

    def parts(svd: Svd) -> list[Triplets]:
        return [truth.leading(D, rank, kind, svd) for D, rank in zip(tasks, problem.ranks, strict=True)]

    def exact(svd: Svd) -> np.ndarray:
        return truth.tsv_merge(parts(svd), problem.weights, svd)

    if got.certificate.arbitrary:
        found = _of_choice(name, problem, got.matrix.double().numpy(), got.certificate, calls[-len(tasks) :])
        return replace(found, needless=needless(exact, got.certificate))
    size = _size(parts(truth.plain), problem.weights)
    return compared(name, problem.label, got.matrix.double().numpy(), list(map(exact, SVDS)), got.certificate, size)


def judge_weighted(problem: Problem, mode: str, rng: np.random.Generator, solver: str | None = None) -> Verdict:
    """`weighted_merge`: the merged matrix. None draws a solver."""
    tasks, kind = doubles(problem.matrices), single(problem.matrices[0])
    power = float(rng.choice([1.0, 1.0, 0.0, 0.5, 0.75, 1.5]))
    chosen = [rank for rank in problem.ranks if isinstance(rank, int)]
    ranks = chosen if len(chosen) == len(tasks) and rng.random() < 0.3 else None
    solver = solver or ("products" if power == 1 and rng.random() < 0.5 else "eigen")
    got = weighted_merge(problem.matrices, problem.weights, power=power, ranks=ranks, mode=mode, solver=solver)
    label = f"{problem.label}, power {power:g}, {'these' if ranks else 'all'} ranks, {solver}"

    def exact(svd: Svd) -> np.ndarray:
        return truth.weighted_merge(tasks, problem.weights, power, ranks, kind, svd)

    if got.certificate.arbitrary:  # its choice cannot be seen from outside
        found = Verdict("weighted_merge", label, "arbitrary", route=got.certificate.route)
        return replace(found, needless=needless(exact, got.certificate))
    size = float(np.sqrt(sum((w * np.linalg.norm(D)) ** 2 for w, D in zip(problem.weights, tasks, strict=True))))
    truths = [exact(svd) for svd in SVDS]
    return compared("weighted_merge", label, got.matrix.double().numpy(), truths, got.certificate, size)


def _size(parts: Sequence[Triplets], weights: Sequence[float]) -> float:
    return float(
        np.sqrt(sum((weight * part.S) @ (weight * part.S) for weight, part in zip(weights, parts, strict=True)))
    )


def _of_choice(name: str, problem: Problem, merged: np.ndarray, certificate: Certificate, calls) -> Verdict:
    """Judge a merge that admits to an arbitrary choice: is the choice valid, and the merge right for it?"""
    parts: tuple[list[Triplets], list[Triplets]] = ([], [])
    for tall, found in calls:
        D, V = tall.matrix.double().numpy(), found.V.numpy()
        why = valid_choice(D, V, certificate.subspace_error)
        if why:
            return Verdict(name, problem.label, "dishonest", why=why, route=found.route)
        for kind, backwards in zip(parts, (False, True), strict=True):
            part = truth.of_basis(D, V, backwards)
            kind.append(Triplets(part.Vh.T, part.S, part.U.T) if tall.transposed else part)
    inner = [truth.tsv_merge(kind, problem.weights, svd) for kind, svd in zip(parts, SVDS, strict=True)]
    touched = np.any([matrix.numpy() != 0 for matrix in problem.matrices], axis=0)
    rows, columns = touched.any(1), touched.any(0)
    if merged[~rows].any() or merged[:, ~columns].any():
        return Verdict(name, problem.label, "dishonest", why="an untouched row or column changed")
    size = _size(parts[0], problem.weights)
    return compared(name, problem.label, merged[rows][:, columns], inner, certificate, size)


def judge_polar(problem: Problem, mode: str) -> Verdict:
    """`polar` of one task matrix, or of the leading singular vectors of all, which is ill-conditioned."""
    matrix = problem.matrices[0]
    if len(problem.matrices) > 1:
        pairs = zip(doubles(problem.matrices), problem.ranks, strict=True)
        parts = [truth.leading(D, k, False, truth.plain) for D, k in pairs]
        matrix = torch.from_numpy(np.hstack([part.U for part in parts])).to(matrix.dtype)
    got = polar(matrix, mode=mode)
    D = matrix.double().numpy()
    rank = got.rank if got.certificate.arbitrary else None
    found = compared(
        "polar", problem.label, got.matrix.numpy(), [truth.polar(D, svd, rank) for svd in SVDS], got.certificate, 1.0
    )
    if rank is None:
        return found
    return replace(found, needless=needless(lambda svd: truth.polar(D, svd), got.certificate))


def judge_factored(problem: Problem, mode: str, rng: np.random.Generator) -> Verdict:
    """`merge_factored`: LoRA-like factors of any conditioning, some of which cancel each other."""
    m, n = problem.matrices[0].shape
    dtype = (torch.float64, torch.float32, torch.float16, torch.bfloat16)[rng.integers(4)]
    tasks: list[Factored] = []
    for _ in problem.matrices:
        inner = int(rng.integers(1, 1 + min(m, n, 24)))
        columns = 10.0 ** rng.uniform(-3, 0, inner) if rng.random() < 0.3 else np.ones(inner)
        left, right = rng.standard_normal((m, inner)) * columns, rng.standard_normal((inner, n))
        if inner > 1 and rng.random() < 0.2:  # two columns that nearly cancel
            left[:, 1], right[1] = left[:, 0] * (1 + 10.0 ** rng.uniform(-14, 0)), -right[0]
        tasks.append(
            Factored(torch.from_numpy(left).to(dtype), torch.from_numpy(right).to(dtype), float(rng.uniform(0.1, 2)))
        )
    ranks = [int(rng.integers(0, 1 + min(m, n, 30))) for _ in tasks]
    with recorded("factored", "leading_triplets") as calls:
        got = merge_factored(tasks, ranks, problem.weights, mode=mode)
    merged, label = got.update.dense().double().numpy(), f"{problem.label} {dtype}"
    dense = [task.scale * task.left.double().numpy() @ task.right.double().numpy() for task in tasks]

    def parts(svd: Svd) -> list[Triplets]:
        return [truth.leading(D, k, False, svd) for D, k in zip(dense, got.ranks, strict=True)]

    def exact(svd: Svd) -> np.ndarray:
        return truth.tsv_merge(parts(svd), problem.weights, svd)

    if not got.certificate.arbitrary:
        size = _size(parts(truth.plain), problem.weights)
        return compared("merge_factored", label, merged, list(map(exact, SVDS)), got.certificate, size)
    chosen = [Triplets(part.U.numpy(), part.S.numpy(), part.Vh.numpy()) for _, part in calls]
    for D, part, task in zip(dense, chosen, tasks, strict=True):
        summed = np.linalg.norm(task.left.double(), axis=0) @ np.linalg.norm(task.right.double(), axis=1)
        rounding = BACKWARD * EPS * task.scale * float(summed) / max(float(np.linalg.norm(D, 2)), 1e-300)
        why = valid_choice(D, part.Vh.T, got.certificate.subspace_error + rounding)
        if why:
            return Verdict("merge_factored", label, "dishonest", why=why, route=got.certificate.route)
    truths = [truth.tsv_merge(chosen, problem.weights, svd) for svd in SVDS]
    found = compared("merge_factored", label, merged, truths, got.certificate, _size(chosen, problem.weights))
    return replace(found, needless=needless(exact, got.certificate))


def judge_joint(problem: Problem, mode: str) -> Verdict:
    """`joint_svd`: the basis of all columns, which must hold every task matrix."""
    found = joint_svd(problem.matrices, mode=mode)
    U = found.U.numpy()
    joined = np.hstack(doubles(problem.matrices))
    rebuilt = np.hstack([U @ part.numpy() for part in found.parts])
    norm = max(float(np.linalg.norm(joined)), 1e-300)
    lost = float(np.linalg.norm(rebuilt - joined)) / norm
    S = np.linalg.svd(joined, compute_uv=False)
    beyond = float(np.linalg.norm(S[U.shape[1] :])) / norm
    return verdict("joint_svd", problem.label, max(lost - beyond, 0.0), 0.0, found.certificate)


METHODS: dict[str, dict[str, object]] = {
    "tsvm": {}, "iso_c": {}, "iso_cts": {"common_space_fraction": 0.8}, "star": {"eta": 40.0},
    "knots": {"inner_method": "task_arithmetic"}, "core_space": {"inner_method": "tsvm"},
    "subspace_boosting": {"boost_beta": 0.3},
}  # fmt: skip


def judge_method(problem: Problem, mode: str, name: str) -> Verdict:
    """A whole merge method, on task matrices that are the fine-tunes of a base of zeros."""
    base, weights = torch.zeros_like(problem.matrices[0]), problem.weights
    config = MergeConfig(name, weight=weights, mode=mode, **METHODS[name])
    with recorded("eigen_merge", "right_vectors") as calls:
        result = merge_tensors(base, problem.matrices, config, out_dtype=torch.float64)
    certificate, tasks, kind = result.report.certificate, doubles(problem.matrices), single(base)
    if certificate is None:  # nothing was decomposed
        return Verdict(name, problem.label, "judged")

    def exact(svd: Svd) -> np.ndarray:
        if name == "iso_c":
            return truth.iso_c(tasks, weights, svd)
        if name == "iso_cts":
            return truth.iso_cts(tasks, weights, 0.8, svd)
        if name == "star":
            return truth.star(tasks, weights, 40.0, kind, svd)
        if name == "subspace_boosting":
            return truth.subspace_boosting(tasks, weights, 0.3, svd)
        if name == "knots":
            return sum(weight * D for weight, D in zip(weights, tasks, strict=True))
        if name == "core_space":
            return truth.core_space(tasks, weights, kind, svd)
        rank = int(min(base.shape) * (1 / len(tasks)))
        parts = [truth.leading(D, rank, kind, svd) for D in tasks]
        return truth.tsv_merge(parts, weights, svd)

    merged = result.weight.numpy()
    if certificate.arbitrary:
        if name == "tsvm" and len(calls) >= len(tasks):
            found = _of_choice(name, problem, merged, certificate, calls[-len(tasks) :])
        else:  # its choice cannot be seen from outside
            found = Verdict(name, problem.label, "arbitrary", route=certificate.route)
        return replace(found, needless=name != "knots" and needless(exact, certificate))
    size = float(np.sqrt(sum((w * np.linalg.norm(D)) ** 2 for w, D in zip(weights, tasks, strict=True))))
    return compared(name, problem.label, merged, [exact(svd) for svd in SVDS], certificate, size)


PARTS: dict[str, dict[str, object]] = {
    "tsvm": {}, "rtsvm": {"preset": "weighted", "damping": 0.0, "retention": 0.0}, "star": {"eta": 40.0},
    "core_space": {"inner_method": "tsvm"},
}  # fmt: skip


def judge_parts(problem: Problem, mode: str, rng: np.random.Generator, name: str) -> Verdict:
    """A merge from stored parts, which were made with weights 1, and its own certificate."""
    base, weights = torch.zeros_like(problem.matrices[0]), problem.weights
    T, (m, n) = len(problem.matrices), base.shape
    tasks, kind, label = doubles(problem.matrices), single(base), f"{problem.label}, parts of {name}"
    config = MergeConfig(name, mode=mode, **PARTS[name])
    found = summands_of(base, problem.matrices, config)
    certificate = found.report.certificate
    if not found.parts or certificate is None or certificate.arbitrary:  # choices are judged without parts
        return Verdict("parts", label, "judged")
    rank = min(m, n) // T
    factors = name == "tsvm" and rng.random() < 0.7
    stored = torch.bfloat16 if mode == "fast" and rng.random() < 0.5 else base.dtype
    layout = StoredParts(tuple(map(str, range(T))), stored, (rank,) * T if factors else None)
    written = store_parts(found.parts, layout, "w")
    options = config.options(T)
    linear = get_method(name).linear
    facts = TensorParts(
        kind=layout.kind, shape=(m, n), base="", treatment="merge", ranks=tuple(found.report.ranks),
        checksums=(("",) * (2 if factors else 1),) * T,  # nothing is read from files
        products=tuple(map(tuple, written.products)), error=found.error, spread=linear.spread(T, options),
        rounding=tuple(written.rounding), certificate=asdict(certificate),
    )  # fmt: skip
    pieces = [written.tensors[name] for name in layout.specs("w", (m, n))]
    parts = [Factored(*pair) for pair in zip(pieces[::2], pieces[1::2], strict=True)] if factors else pieces
    asked = options.model_copy(update={"weight": tuple(weights)})
    merged = merge_parts(base, parts, facts, asked, base.dtype, method=name, name="w")

    def exact(svd: Svd) -> np.ndarray:
        if name == "rtsvm":
            return truth.weighted_merge(tasks, weights, 1.0, None, kind, svd)
        if name == "star":
            return truth.star(tasks, weights, 40.0, kind, svd)
        if name == "core_space":
            return truth.core_space(tasks, weights, kind, svd)
        return truth.tsv_merge([truth.leading(D, rank, kind, svd) for D in tasks], weights, svd)

    size = float(np.sqrt(sum((w * np.linalg.norm(D)) ** 2 for w, D in zip(weights, tasks, strict=True))))
    got = merged.weight.double().numpy()
    return compared("parts", label, got, [exact(svd) for svd in SVDS], merged.report.certificate, size)


def judges(rng: np.random.Generator) -> Callable[[Problem], Verdict]:
    """Draw a function to judge, its mode and its solver."""
    mode = "exact" if rng.random() < 0.8 else "fast"
    kind = rng.random()
    if kind < 0.12:
        return lambda problem: judge_subspaces(problem, mode)
    if kind < 0.2:
        return lambda problem: judge_subspaces(problem, mode, svd=True)
    if kind < 0.38:
        return lambda problem: judge_tsv_merge(problem, mode, "eigen")
    if kind < 0.5:
        return lambda problem: judge_weighted(problem, mode, rng)
    if kind < 0.6:
        layers = rng.random() < 0.3
        return lambda problem: judge_tsv_merge(problem, mode, "products", layers)
    if kind < 0.7:
        return lambda problem: judge_polar(problem, mode)
    if kind < 0.8:
        return lambda problem: judge_factored(problem, mode, rng)
    if kind < 0.82:
        return lambda problem: judge_joint(problem, mode)
    if kind < 0.87:
        whole = str(rng.choice(list(PARTS)))
        return lambda problem: judge_parts(problem, mode, rng, whole)
    name = str(rng.choice(list(METHODS)))
    return lambda problem: judge_method(problem, mode, name)


@contextmanager
def sizes(small: bool, two_stage: bool = False) -> Iterator[None]:
    """Let small matrices take the routes of large ones, or those of even larger ones."""
    limits = (
        ("leading_right_vectors", "TINY", 6),
        ("leading_right_vectors", "SMALL", 24),
        ("eigen_merge", "LARGE", 48),
        ("products.subspaces", "FORESEEN_FROM", 12),
        *((("two_stage", "LARGE", 12), ("two_stage", "LARGE_FOR_THREADS", 12)) if two_stage else ()),
        ("eigenspaces", "WINDOW", 4)
        if two_stage
        else ("leading_right_vectors", "two_stage_runs", lambda device: False),
    )
    with ExitStack() as stack:
        for module, name, limit in limits if small else ():
            stack.enter_context(patch.object(import_module(f"r_tsvm_kernels.linalg.{module}"), name, limit))
        yield


def judged(rng: np.random.Generator, problem: Problem) -> Verdict:
    """Judge one call; a refusal is a verdict, too."""
    judge = judges(rng)
    try:
        with sizes(rng.random() < 0.7, two_stage=rng.random() < 0.5):
            return judge(problem)
    except ConvergenceError as error:
        return Verdict("?", problem.label, "refused", why=str(error))
