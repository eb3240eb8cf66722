"""TSV-Merge from the right singular vectors of the tasks, with Gram matrices and their inverse roots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .interference import interference_of_gram
from .inverse_root import PROBES, root_of_factor, root_of_gram, root_of_gram_float32
from .leading_right_vectors import ROUTES, RightVectors
from .merge_accuracy import Side, WeightedCores, merge_certificate
from .on_device import gaussian
from .parallel import run_concurrently
from .tall_matrix import TallMatrix, add_gram

# From this size on bases of float32 tasks are whitened by float32 eigenvectors, if the estimated error is at most this
# share of the tolerance. Below it float64 costs next to nothing.
LARGE, WHITENING_SHARE = 768, 0.1

# Where tasks cancel each other, and the merged matrix has less than this share of their norm, rounding counts more.
CANCELLING = 0.25


class EigenMerge:
    """The merge of tall matrices in the long side's tiles: the left bases ``U_t = D_t V_t R_t^-1`` are never stored.

    With ``W = [D_1 V_1 .. D_T V_T]`` and ``R = blockdiag(R_t)``, where ``R_t^T R_t`` are the diagonal blocks of
    ``W^T W``, the concatenated left basis is ``U = W R^-1``, the cores are R_t, and the merged matrix is
    ``W (R^-1 (U^T U)^(-1/2))`` times ``blockdiag(w_t R_t) (V^T V)^(-1/2) V^T``.

    Attributes:
        parts: what was given.
        interference: overlap of the tasks' left and of their right subspaces.
        certificate: estimated accuracy; whether it is met is up to the caller.
    """

    def __init__(
        self,
        matrices: Sequence[TallMatrix],
        parts: Sequence[RightVectors],
        weights: Sequence[float],
        tolerance: float,
        given_up: tuple[str, ...],
    ) -> None:
        """Find the polar factors and what is to be multiplied with W."""
        self.matrices, self.parts, self.tolerance = matrices, parts, tolerance
        ranks = [part.V.shape[1] for part in parts]
        ends = torch.tensor(ranks).cumsum(0).tolist()
        self.blocks = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        self.images: list[Tensor] | None = None  # tiles of W, if they all fit into the workspace
        V = torch.cat([part.V for part in parts], dim=1)
        gram = self._gram(V)
        # The columns of a task's image are orthogonal but for rounding: scaled to norm 1 nothing is lost.
        lengths = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).sqrt()
        scaled = gram / lengths / lengths[:, None]
        self.factors = [self._cholesky(scaled[block, block]) for block in self.blocks]  # upper, R_t / lengths
        self.core_energy = [
            float((R * lengths[b]).square().sum()) for R, b in zip(self.factors, self.blocks, strict=True)
        ]
        left_gram = self._left(self._left(scaled, True).mT, True).mT
        right_gram = self._mirrored(V.new_zeros(len(gram), len(gram)), V)
        right_gram.diagonal()[:] = 1  # within a task the basis is orthonormal already
        self.interference = (interference_of_gram(left_gram, ranks), interference_of_gram(right_gram, ranks))
        scales = [weight / matrix.scale for weight, matrix in zip(weights, matrices, strict=True)]
        cores = WeightedCores([R * lengths[block] for R, block in zip(self.factors, self.blocks, strict=True)], scales)
        (left, left_failed), (right, right_failed) = run_concurrently(
            [
                partial(self._root, left_gram, cores, False, lambda: self._left_factor(lengths)),
                partial(self._root, right_gram, cores, True, lambda: torch.linalg.qr(V, mode="r").R),
            ],
            len(lengths),
            lengths.device,
        )
        del gram, scaled, left_gram, right_gram  # of 8 s^2 bytes each

        # W times this is polar(U).
        self.to_polar = left.root.matrix.map_rows(lambda x: self._left(x, False) / lengths[:, None].to(x.dtype))
        right_factor = right.root.matrix.after(V).mT  # polar(V)^T
        self.inner = torch.empty_like(right_factor)
        for core, block in zip(cores.blocks, self.blocks, strict=True):
            torch.matmul(core.to(right_factor.dtype), right_factor[block], out=self.inner[block])
        self.unit = cores.unit
        self.shrunk = cores.norm_between(left, right)
        escalations = [*given_up, *left_failed, *right_failed, *(e for part in parts for e in part.escalations)]
        routes = {part.route for part in parts}
        self.certificate = merge_certificate(
            [part.cut for part in parts],
            left,
            right,
            cores,
            shrunk=self.shrunk,
            tolerance=tolerance,
            route=max(routes | ({left.root.route, right.root.route} & {ROUTES[-1]}), key=ROUTES.index),
            rounding=4 * torch.finfo(matrices[0].matrix.dtype).eps,
            exact=routes == {ROUTES[-1]},
            escalations=tuple(dict.fromkeys(escalations)),
        )
        if matrices[0].transposed:
            self.interference = self.interference[::-1]
            self.certificate = self.certificate.transposed()

    def captured_energy(self) -> tuple[float, ...]:
        """Return the share of each task's squared Frobenius norm inside its subspaces."""
        energies = zip(self.core_energy, self.matrices, strict=True)
        return tuple(min(1.0, e / matrix.squared_norm) if matrix.squared_norm else 1.0 for e, matrix in energies)

    def write(self, out: Tensor) -> None:
        """Write the merged matrix to `out` (m, n).

        The dtype of `out` does for the product of two well-conditioned factors, unless little is left of it.
        """
        dtype = torch.float64 if self.shrunk < CANCELLING else out.dtype
        inner = self.inner.to(dtype)
        first = 0
        for image in self._tiles():
            rows = slice(first, first + len(image))
            out[rows] = (self.to_polar.after(image).to(dtype) @ inner).mul_(self.unit)
            first = rows.stop

    def _gram(self, V: Tensor) -> Tensor:
        """Return ``W^T W``; keep W if there is room."""
        columns = V.shape[1]
        m = self.matrices[0].shape[0]
        keep = 8 * m * columns <= self.matrices[0].workspace // 2
        kept = []
        total = V.new_zeros(columns, columns)
        for image in self._tiles():
            for block in self.blocks:
                add_gram(total[block, block], image[:, block])
            self._mirrored(total, image)
            if keep:
                kept.append(image)
        self.images = kept if keep else None
        return total

    def _mirrored(self, total: Tensor, basis: Tensor) -> Tensor:
        """Add what different tasks have in ``basis^T basis`` to `total`, one product for both halves."""
        for block in self.blocks:
            rest = slice(block.stop, total.shape[1])
            product = basis[:, block].mT @ basis[:, rest]
            total[block, rest] += product
            total[rest, block] += product.mT
        return total

    def _tiles(self) -> Iterator[Tensor]:
        """Yield W, row tile by row tile."""
        if self.images is not None:
            yield from self.images
            return
        tasks = list(zip(self.matrices, self.parts, self.blocks, strict=True))
        for rows in self.matrices[0].ranges():
            image = self.parts[0].V.new_empty(rows.stop - rows.start, self.blocks[-1].stop)
            for matrix, part, block in tasks:
                image[:, block] = matrix.tile(rows, torch.float64) @ part.V
            yield image

    def _left(self, x: Tensor, transposed: bool) -> Tensor:
        """Return ``blockdiag(R)^-1 x``, or ``blockdiag(R)^-T x``, for R in units of the lengths."""
        out = torch.empty_like(x)
        for R, block in zip(self.factors, self.blocks, strict=True):
            R = R.to(x.dtype)
            out[block] = torch.linalg.solve_triangular(R.mT if transposed else R, x[block], upper=not transposed)
        return out

    def _left_factor(self, lengths: Tensor) -> Tensor:
        """Return the triangular factor of the concatenated left basis, tile by tile."""
        R = lengths.new_zeros(0, len(lengths))
        for image in self._tiles():
            R = torch.linalg.qr(torch.cat([R, self._left((image / lengths).mT, True).mT]), mode="r").R
        return R

    def _root(
        self, gram: Tensor, cores: WeightedCores, transposed: bool, factor: Callable[[], Tensor]
    ) -> tuple[Side, list[str]]:
        """Return the inverse root by the cheapest route that is exact enough, and why others gave way."""
        given_up = []
        probes = cores.times(gaussian(len(gram), PROBES, gram.device), transposed)
        if len(gram) >= LARGE and self.matrices[0].matrix.dtype == torch.float32:
            try:
                root = root_of_gram_float32(gram, WHITENING_SHARE * self.tolerance, [probes])
                return Side.measured(root, probes, (gram,)), []
            except ConvergenceError as failure:
                given_up.append(str(failure))
        try:
            return Side.measured(root_of_gram(gram), probes, (gram,)), given_up
        except ConvergenceError as failure:
            R = factor()
            return Side.measured(root_of_factor(R), probes, (R.mT, R)), [*given_up, str(failure)]

    @staticmethod
    def _cholesky(gram: Tensor) -> Tensor:
        L, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise ConvergenceError("the images of a task's right singular vectors are linearly dependent")
        upper: Tensor = L.mT
        return upper
