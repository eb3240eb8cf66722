"""An independent implementation of the methods in numpy, float64, from the formulas; no code of the package."""

import math
from fractions import Fraction

import numpy as np


def thin_svd(matrix):
    """U (m, r), values (r,), Vh (r, n)."""
    return np.linalg.svd(matrix, full_matrices=False)


def polar(matrix, svd=thin_svd, rank=None):
    """Canonical polar factor: singular values up to 1e-6 times the largest count as zero, or all but `rank`."""
    if matrix.size == 0:
        return matrix
    left, values, right = svd(matrix)
    kept = int((values > 1e-6 * values[0]).sum()) if rank is None else rank
    return left[:, :kept] @ right[:kept]


def merge_triplets(parts, weights, svd=thin_svd):
    """Concatenate singular triplets, orthogonalise both sides, multiply."""
    lefts, values, rights = zip(*parts, strict=True)
    core = np.concatenate([weight * s for weight, s in zip(weights, values, strict=True)])
    return polar(np.hstack(lefts), svd) * core @ polar(np.vstack(rights), svd)


def tsv_merge(deltas, ranks, weights):
    """TSV-Merge of the leading singular triplets."""
    parts = []
    for delta, rank in zip(deltas, ranks, strict=True):
        left, values, right = thin_svd(delta)
        # Beyond float32 rounding of the matrix there are no singular directions.
        k = min(rank, int((values > np.finfo(np.float32).eps * np.linalg.norm(delta)).sum()))
        parts.append((left[:, :k], values[:k], right[:k]))
    return merge_triplets(parts, weights)


def weighted_merge(deltas, weights, power, ranks=None, lead=None, svd=thin_svd, eps=2.0**-23):
    """TSV-Merge with singular vectors scaled by (s / norm)^power; without `lead` both sides whole."""
    if len(deltas[0]) < deltas[0].shape[1]:
        return weighted_merge([delta.T for delta in deltas], weights, power, ranks, lead, svd, eps).T
    parts = []
    for index, delta in enumerate(deltas):
        left, values, right = svd(delta)
        k = int((values > eps * np.linalg.norm(delta)).sum()) if power != 1 or ranks else len(values)
        k = min(k, ranks[index]) if ranks else k
        parts.append((left[:, :k], values[:k], right[:k].T, (values[:k] / np.linalg.norm(delta)) ** power))
    ends = np.cumsum([len(values) for _, values, _, _ in parts])[:-1]
    rights = np.hstack([right * scale for _, _, right, scale in parts])
    Q = np.split(polar(rights, svd), ends, axis=1)
    if lead is None:
        P = np.split(polar(np.hstack([left * scale for left, _, _, scale in parts]), svd), ends, axis=1)
        return sum(w * (p * part[1]) @ q.T for w, p, q, part in zip(weights, P, Q, parts, strict=True))
    axes, values, _ = svd(rights)
    kept = values > 1e-6 * values[:1].sum()
    root = (axes[:, kept] / values[kept]) @ axes[:, kept].T  # applied to Q, not its square to V: that loses digits
    P = polar(np.hstack([left[:, :lead] * scale[:lead] for left, _, _, scale in parts]), svd)
    P = np.split(P, np.cumsum([min(lead, len(values)) for _, values, _, _ in parts])[:-1], axis=1)
    merged = 0
    for w, p, q, (left, values, _, scale) in zip(weights, P, Q, parts, strict=True):
        k = p.shape[1]
        tail = (left[:, k:] * values[k:] * scale[k:]) @ q[:, k:].T @ root
        merged = merged + w * ((p * values[:k]) @ q[:, :k].T + tail)
    return merged


def tsvm(base, tuned, alpha=1.0, weights=None):
    """TSV-Merge of float64 arrays; the updated weight."""
    tasks = len(tuned)
    weights = weights or [1.0] * tasks
    deltas = [t - base for t in tuned]
    if base.ndim != 2:
        return base + alpha * sum(w * d for w, d in zip(weights, deltas, strict=True)) / tasks
    rank = int(min(base.shape) * (1 / tasks))
    return base + alpha * tsv_merge(deltas, [rank] * tasks, weights)


def keep_largest(delta, density):
    """Sparsifier ceil(density * size) largest magnitudes, lowest flat index first among equals."""
    keep = math.ceil(Fraction(str(density)) * delta.size)
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")
    pruned = np.zeros_like(delta)
    pruned.flat[order[:keep]] = delta.flat[order[:keep]]
    return pruned


def rtsvm(
    base,
    tuned,
    alpha=1.0,
    weights=None,
    outlier_sigma=3.0,
    outlier_weighting="clip",
    density=1.0,
    sparsity_eps=0.1,
    rank="sparsity",
    rank_rho=1.0,
    rank_energy=0.95,
):
    """R-TSVM of float64 arrays; the updated weight and the ranks."""
    tasks = len(tuned)
    weights = weights or [1.0] * tasks
    deltas = [t - base for t in tuned]
    if base.ndim != 2 or min(base.shape) < tasks:
        return base + alpha * sum(w * d for w, d in zip(weights, deltas, strict=True)) / tasks, []
    share, prepared, ranks, masses = min(base.shape) * (1 / tasks), [], [], []
    for delta in deltas:
        magnitude = np.abs(delta)
        theta = magnitude.mean() + (outlier_sigma * magnitude.std() if math.isfinite(outlier_sigma) else math.inf)
        masses.append(magnitude[magnitude > theta].sum() / magnitude.sum() if magnitude.any() else 0.0)
        clipped = np.clip(delta, -theta, theta) if outlier_weighting == "clip" else delta
        pruned = keep_largest(clipped, density)
        prepared.append(pruned)
        values = np.linalg.svd(pruned, compute_uv=False)
        if rank == "sparsity":
            sparsity = (np.abs(pruned) <= sparsity_eps * magnitude.mean()).mean()
            k = max(1, math.floor(share * (1 - sparsity) ** rank_rho))
        elif rank == "energy":
            energy = np.cumsum(values**2)
            k = int(np.searchsorted(energy, rank_energy * energy[-1])) + 1
        elif rank == "noise":
            beta = min(base.shape) / max(base.shape)
            edge = (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * np.sort(values)[(len(values) - 1) // 2]
            k = max(1, int((values > edge).sum()))
        else:
            k = int(share) if rank == "fixed" else rank
        ranks.append(min(k, max(1, int(share))))
    if outlier_weighting in ("damp", "boost", "complement"):
        floored = np.maximum(masses, 0.1 * np.mean(masses))
        shares = {"damp": 1 / floored, "boost": floored, "complement": 1 - np.array(masses)}[outlier_weighting]
        weights = [w * tasks * s / sum(shares) for w, s in zip(weights, shares, strict=True)]
    return base + alpha * tsv_merge(prepared, ranks, weights), ranks


def elected_sign(votes):
    """Return the sign of the sum over the first axis, + where it is 0 up to the rounding of float64."""
    return np.where(votes.sum(0) >= -1e-12 * np.abs(votes).sum(0), 1.0, -1.0)


def vote_and_sum(base, kept, weights, alpha=1.0, elect=False, normalize=False):
    """Sum sparsified task vectors, after TIES' election of a sign; float64 arrays."""
    weighted = np.array([w * d for w, d in zip(weights, kept, strict=True)])
    if elect:
        weighted = np.where(np.sign(weighted) == elected_sign(weighted), weighted, 0.0)
    update = weighted.sum(0)
    if normalize and elect:
        counted = sum(w * (v != 0) for w, v in zip(weights, weighted, strict=True))
        update = update / np.where(counted == 0, 1.0, counted)
    elif normalize:
        update = update / sum(weights)
    return base + alpha * update


def della_probabilities(delta, density, epsilon):
    """Probability of survival by rank within the row: ``density - epsilon`` to ``density + epsilon``."""
    rows = np.atleast_1d(delta)
    columns = rows.shape[-1]
    if columns == 1:
        return np.full(delta.shape, density)
    # The lower index has the higher rank among equals.
    order = np.argsort(np.abs(rows[..., ::-1]), axis=-1, kind="stable")
    ranks = np.argsort(order, axis=-1)[..., ::-1]
    return (density - epsilon + 2 * epsilon * ranks / (columns - 1)).reshape(delta.shape)
