"""TSV-Merge by eigenvalue decompositions: Gram matrices, whitening, cores, product.

V_t are the leading right singular vectors of the task matrix D_t, and ``Y = [D_1 V_1 .. D_T V_T]`` are their images.

1. `Images.gram`: ``Y^T Y``, whose diagonal blocks give the Cholesky factors ``R = blockdiag(R_t)``. The concatenated
   left basis is ``U = Y R^-1``; it is never stored.
2. `whiten`: the inverse roots of ``U^T U`` and ``V^T V``, which turn both bases into their polar factors.
3. `WeightedCores.times`: ``blockdiag(w_t R_t) (V^T V)^(-1/2) V^T``, the weighted cores times ``polar(V)^T``.
4. `EigenMerge.write`: ``Y (R^-1 (U^T U)^(-1/2))``, which is ``polar(U)``, times that, by tiles of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .certificate import Certificate, Mode, tolerance_of
from .factored import Factored
from .interference import interference_of_gram
from .inverse_root import PROBES, SplitMatrix, root_of_factor, root_of_gram, root_of_gram_float32, root_of_pair
from .leading_right_vectors import ROUTES, RightVectors, right_vectors
from .merge_accuracy import Side, WeightedCores, merge_certificate
from .on_device import gaussian
from .parallel import run_concurrently
from .ranks import Rank
from .tall_matrix import TallMatrix, add_gram

# From this size on the bases of two tasks are whitened in closed form, those of more float32 tasks by float32
# eigenvectors, if the estimated error is at most this share of the tolerance. For smaller ones the cost of float64 is
# negligible.
LARGE, WHITENING_SHARE = 768, 0.1

# The images of exact singular vectors are orthogonal. If those of float32 tasks are up to this much (Frobenius norm),
# triangular solves would change nothing: amplified by the condition of the bases, it is below the result's rounding.
ORTHOGONAL = 2.0**-40

# If tasks cancel each other to less than this share of their norm, the last product needs float64.
CANCELLING = 0.25


class Images:
    """The images ``Y = [D_1 V_1 .. D_T V_T]`` of the right singular vectors, by tiles of rows.

    Attributes:
        blocks: the columns of each task.
    """

    def __init__(self, matrices: Sequence[TallMatrix], parts: Sequence[RightVectors]) -> None:
        self.matrices, self.parts = matrices, parts
        ranks = [part.V.shape[1] for part in parts]
        self.blocks = [slice(end - rank, end) for end, rank in zip(accumulate(ranks), ranks, strict=True)]
        self._kept: list[Tensor] | None = None

    def tiles(self) -> Iterator[Tensor]:
        """Yield Y, row tile by row tile."""
        if self._kept is not None:
            yield from self._kept
            return
        tasks = list(zip(self.matrices, self.parts, self.blocks, strict=True))
        for rows in self.matrices[0].ranges():
            image = self.parts[0].V.new_empty(rows.stop - rows.start, self.blocks[-1].stop)
            for matrix, part, block in tasks:
                image[:, block].addmm_(matrix.tile(rows, torch.float64), part.V, beta=0)
            yield image

    def times(self, z: Tensor) -> Iterator[Tensor]:
        """Yield the rows of ``Y z``, tile by tile, for few columns z."""
        if self._kept is not None:
            yield from (image @ z for image in self._kept)
            return
        inner = [part.V @ z[block] for part, block in zip(self.parts, self.blocks, strict=True)]
        for rows in self.matrices[0].ranges():
            image = z.new_zeros(rows.stop - rows.start, z.shape[1])
            for matrix, own in zip(self.matrices, inner, strict=True):
                image.addmm_(matrix.tile(rows, torch.float64), own)
            yield image

    def gram(self) -> Tensor:
        """Return ``Y^T Y``; keep Y if it fits into half of the workspace."""
        m, columns = self.matrices[0].shape[0], self.blocks[-1].stop
        keep = 8 * m * columns <= self.matrices[0].workspace // 2
        kept = []
        total = self.parts[0].V.new_empty(columns, columns)
        for number, image in enumerate(self.tiles()):
            add_gram(total, image, fresh=number == 0)
            if keep:
                kept.append(image)
        self._kept = kept if keep else None
        return total

    def gram_of_bases(self, basis: Tensor) -> Tensor:
        """Return ``basis^T basis`` of orthonormal bases side by side, one for each task."""
        total = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        for block in self.blocks:
            rest = slice(block.stop, len(total))
            torch.mm(basis[:, rest].mT, basis[:, block], out=total[rest, block])
            total[block, rest] = total[rest, block].mT
        return total


@dataclass(frozen=True)
class Triangles:
    """The Cholesky factors ``R = blockdiag(R_t)`` of the tasks' images, with columns scaled to norm 1.

    The columns of a task's image are orthogonal up to rounding, so scaling them to norm 1 loses nothing.

    Attributes:
        blocks: the columns of each task.
        lengths: (k,) norms of the columns.
        factors: ``R_t / lengths``, upper triangular; None for the identity.
    """

    blocks: list[slice]
    lengths: Tensor
    factors: list[Tensor | None]

    @classmethod
    def of_gram(cls, gram: Tensor, blocks: list[slice], negligible: float = 0.0) -> tuple[Triangles, Tensor]:
        """Factor the diagonal blocks of ``Y^T Y``; return them with the scaled Gram matrix.

        Args:
            gram: ``Y^T Y``; it is scaled in place.
            blocks: the columns of each task.
            negligible: distance from the identity (Frobenius norm) up to which a factor counts as that.

        Raises:
            ConvergenceError: a task's images are linearly dependent.
        """
        lengths = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        scaled = gram.div_(lengths).div_(lengths[:, None])
        factors = list[Tensor | None]()
        for block in blocks:
            R = _cholesky(scaled[block, block])
            apart = torch.linalg.vector_norm(R - torch.eye(len(R), dtype=R.dtype, device=R.device))
            factors.append(R if float(apart) > negligible else None)
        return cls(blocks, lengths, factors), scaled

    def solve(self, x: Tensor, transposed: bool = False) -> Tensor:
        """Return ``blockdiag(R)^-1 x``, or ``blockdiag(R)^-T x``, for R in units of the lengths."""
        if not any(R is not None for R in self.factors):
            return x
        solution = torch.empty_like(x)
        for R, block in zip(self.factors, self.blocks, strict=True):
            if R is None:
                solution[block] = x[block]
                continue
            R = R.to(x.dtype)
            solution[block] = torch.linalg.solve_triangular(R.mT if transposed else R, x[block], upper=not transposed)
        return solution

    def cores(self) -> list[Tensor]:
        """Return the R_t, which are the cores of the tasks; of a diagonal one its diagonal."""
        lengths = [self.lengths[block] for block in self.blocks]
        return [own if R is None else R * own for R, own in zip(self.factors, lengths, strict=True)]

    def gram_of_left_images(self, images: Images, z: Tensor) -> Tensor:
        """Return ``(U z)^T (U z)`` (j, j) for the concatenated left basis ``U = Y R^-1`` and z (k, j)."""
        inner, total = self.solve(z) / self.lengths[:, None], z.new_empty(z.shape[1], z.shape[1])
        for number, image in enumerate(images.times(inner)):
            add_gram(total, image, fresh=number == 0)
        return total

    def left_factor(self, images: Images) -> Tensor:
        """Return the triangular factor of the concatenated left basis ``Y R^-1``, tile by tile."""
        R = self.lengths.new_zeros(0, len(self.lengths))
        for image in images.tiles():
            R = torch.linalg.qr(torch.cat([R, self.solve((image / self.lengths).mT, True).mT]), mode="r").R
        return R


@dataclass(frozen=True)
class EigenMerge:
    """A merge that is ready to be written.

    Attributes:
        images: Y.
        to_polar: (k, k), ``Y @ to_polar`` is the polar factor of the concatenated left basis.
        core: (k, n), the weighted cores times the transposed polar factor of the right basis, over `unit`.
        unit: a power of two near the largest weighted core.
        shrunk: norm of the merged matrix as a share of that of the cores; small if tasks cancel each other.
        ranks: of the tasks.
        captured_energy: share of each task's squared Frobenius norm inside its subspaces.
        interference: overlap of the tasks' left and of their right subspaces.
        certificate: estimated accuracy. The caller checks whether it is met.
    """

    images: Images
    to_polar: SplitMatrix
    core: Tensor
    unit: float
    shrunk: float
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    interference: tuple[float, float]
    certificate: Certificate

    def factors(self) -> list[Factored]:
        """Return the summand of each task with its weight, ``polar(U)_t (w_t R_t) polar(V)_t^T``, in float64."""
        tiles = [self.to_polar.after(image).to(self.core.dtype) for image in self.images.tiles()]
        left = torch.cat(tiles) if tiles else self.core.new_zeros(0, len(self.core))  # no rows
        return [Factored(left[:, block], self.core[block] * self.unit) for block in self.images.blocks]

    def write(self, target: Tensor) -> None:
        """Write the merged matrix to `target` (m, n).

        The product is in the dtype of `target`, which is accurate enough for two well-conditioned factors. If the tasks
        nearly cancel each other, it is in float64.
        """
        dtype = torch.float64 if self.shrunk < CANCELLING else target.dtype
        core = self.core.to(dtype)
        first = 0
        for image in self.images.tiles():
            part = target[first : first + len(image)]
            polar = self.to_polar.after(image).to(dtype)
            if dtype == target.dtype:
                torch.mm(polar, core, out=part).mul_(self.unit)
            else:
                part.copy_((polar @ core).mul_(self.unit))
            first += len(image)


def merge_by_eigenvalues(
    matrices: Sequence[TallMatrix],
    ranks: Sequence[Rank],
    weights: Sequence[float],
    mode: Mode,
    escalations: tuple[str, ...] = (),
) -> EigenMerge:
    """Merge by the cheapest route to the subspaces that gives an accurate result.

    Args:
        matrices: T tall matrices of one shape.
        ranks: of the tasks, or rank rules.
        weights: factors of the cores.
        mode: ``exact`` or ``fast``.
        escalations: routes that failed before, with the reason.

    Raises:
        ConvergenceError: no route is accurate enough.
    """
    for first in range(len(ROUTES)):
        try:
            return _attempt(matrices, ranks, weights, mode, ROUTES[first:] if first else None, escalations)
        except ConvergenceError as failure:
            if first == len(ROUTES) - 1:
                raise
            escalations += (str(failure),)
            for matrix in matrices:
                matrix.forget()
    raise AssertionError  # the last route returns or raises


def _attempt(
    matrices: Sequence[TallMatrix],
    ranks: Sequence[Rank],
    weights: Sequence[float],
    mode: Mode,
    routes: Sequence[str] | None,
    escalations: tuple[str, ...],
) -> EigenMerge:
    """Merge by the first of `routes` that is accurate enough. A failed attempt leaves nothing in memory.

    Raises:
        ConvergenceError: none is.
    """
    solves = [partial(right_vectors, matrix, rank, mode, routes) for matrix, rank in zip(matrices, ranks, strict=True)]
    parts = run_concurrently(solves, matrices[0].shape[1], matrices[0].matrix.device)
    merge = prepare(matrices, parts, weights, tolerance_of(mode), escalations)
    merge.certificate.require()
    return merge


def prepare(
    matrices: Sequence[TallMatrix],
    parts: Sequence[RightVectors],
    weights: Sequence[float],
    tolerance: float,
    escalations: tuple[str, ...],
) -> EigenMerge:
    """Do all steps but the last: see the top of this module."""
    images = Images(matrices, parts)
    V = torch.cat([part.V for part in parts], dim=1)
    single = matrices[0].matrix.dtype == torch.float32
    triangles, scaled = Triangles.of_gram(images.gram(), images.blocks, ORTHOGONAL if single else 0.0)
    cores = triangles.cores()
    energies = [float(core.square().sum()) for core in cores]
    weighted = WeightedCores(cores, [weight / matrix.scale for weight, matrix in zip(weights, matrices, strict=True)])
    del cores
    whitening = whiten(images, triangles, scaled, V, weighted, tolerance)
    del scaled  # 8 k^2 bytes
    left, right = whitening.left, whitening.right
    to_polar = left.root.matrix.map_rows(lambda x: triangles.solve(x) / triangles.lengths[:, None].to(x.dtype))
    core = weighted.times(right.root.matrix.after(V).mT)
    shrunk = weighted.norm_between(left, right)
    routes = {part.route for part in parts}
    reasons = [*escalations, *whitening.escalations, *(reason for part in parts for reason in part.escalations)]
    certificate = merge_certificate(
        [part.cut for part in parts],
        left,
        right,
        weighted,
        shrunk=shrunk,
        tolerance=tolerance,
        route=max(routes | ({left.root.route, right.root.route} & {ROUTES[-1]}), key=ROUTES.index),
        rounding=4 * torch.finfo(matrices[0].matrix.dtype).eps,
        exact=routes == {ROUTES[-1]},
        escalations=tuple(dict.fromkeys(reasons)),
    )
    transposed = matrices[0].transposed
    return EigenMerge(
        images,
        to_polar,
        core,
        weighted.unit,
        shrunk,
        ranks=tuple(part.V.shape[1] for part in parts),
        captured_energy=tuple(
            min(1.0, energy / matrix.squared_norm) if matrix.squared_norm else 1.0
            for energy, matrix in zip(energies, matrices, strict=True)
        ),
        interference=whitening.interference[::-1] if transposed else whitening.interference,
        certificate=certificate.transposed() if transposed else certificate,
    )


@dataclass(frozen=True)
class Whitening:
    """The inverse roots of the Gram matrices of both concatenated bases.

    Attributes:
        left: of ``U^T U``.
        right: of ``V^T V``.
        interference: overlap of the tasks' left and of their right subspaces.
        escalations: routes that failed, with the reason.
    """

    left: Side
    right: Side
    interference: tuple[float, float]
    escalations: tuple[str, ...]


def whiten(
    images: Images, triangles: Triangles, scaled: Tensor, V: Tensor, cores: WeightedCores, tolerance: float
) -> Whitening:
    """Find the inverse roots of ``U^T U`` and ``V^T V`` concurrently.

    Args:
        images: Y.
        triangles: its Cholesky factors by task.
        scaled: ``Y^T Y`` over the lengths of the columns.
        V: (n, k) the right singular vectors of all tasks.
        cores: the weighted cores between the polar factors.
        tolerance: of the merged matrix.
    """
    ranks = [block.stop - block.start for block in images.blocks]
    left_gram = triangles.solve(triangles.solve(scaled, True).mT, True).mT
    right_gram = images.gram_of_bases(V)
    interference = interference_of_gram(left_gram, ranks), interference_of_gram(right_gram, ranks)
    single = images.matrices[0].matrix.dtype == torch.float32
    pair = ranks[0] if len(ranks) == 2 and all(ranks) else 0

    def solve_left() -> tuple[Side, tuple[str, ...]]:
        probes = cores.times(gaussian(len(left_gram), PROBES, left_gram.device))
        basis = partial(triangles.gram_of_left_images, images), partial(triangles.left_factor, images)
        return _find_root(left_gram, probes, *basis, tolerance, single, pair)

    def solve_right() -> tuple[Side, tuple[str, ...]]:
        probes = cores.times(gaussian(len(right_gram), PROBES, right_gram.device), transposed=True)
        basis = partial(_gram_of_images, V), lambda: torch.linalg.qr(V, mode="r").R
        return _find_root(right_gram, probes, *basis, tolerance, single, pair)

    (left, left_reasons), (right, right_reasons) = run_concurrently([solve_left, solve_right], V.shape[1], V.device)
    return Whitening(left, right, interference, (*left_reasons, *right_reasons))


def _gram_of_images(X: Tensor, z: Tensor) -> Tensor:
    """Return ``(X z)^T (X z)``."""
    total = z.new_empty(z.shape[1], z.shape[1])
    add_gram(total, X @ z, fresh=True)
    return total


def _find_root(
    gram: Tensor,
    probes: Tensor,
    gram_of_images: Callable[[Tensor], Tensor],
    factor: Callable[[], Tensor],
    tolerance: float,
    single: bool,
    pair: int,
) -> tuple[Side, tuple[str, ...]]:
    """Return the inverse root of a Gram matrix by the cheapest route that is accurate enough, and why others are not.

    Args:
        gram: (k, k).
        probes: (k, any number), vectors that the root is measured on.
        gram_of_images: for the basis, see `root_of_gram_float32`.
        factor: computes a triangular factor of the basis.
        tolerance: of the merged matrix.
        single: whether the task matrices are float32.
        pair: columns of the first of two bases; 0 for any other number of bases.
    """
    escalations: tuple[str, ...] = ()
    if len(gram) >= LARGE and (pair or single):
        try:
            root = root_of_pair(gram, pair, single) if pair else root_of_gram_float32(gram, gram_of_images)
            side, allowed = Side.measured(root, probes, (gram,)), WHITENING_SHARE * tolerance
            if side.defect <= allowed:
                return side, escalations
            error = f"estimated error {side.defect:.0e} of a polar factor, allowed {allowed:.0e}"
            raise ConvergenceError(f"{root.route}: {error}")
        except ConvergenceError as failure:
            escalations += (str(failure),)
    try:
        return Side.measured(root_of_gram(gram), probes, (gram,)), escalations
    except ConvergenceError as failure:
        R = factor()
        return Side.measured(root_of_factor(R), probes, (R.mT, R)), (*escalations, str(failure))


def _cholesky(gram: Tensor) -> Tensor:
    L, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise ConvergenceError("the images of a task's right singular vectors are linearly dependent")
    upper: Tensor = L.mT
    return upper
