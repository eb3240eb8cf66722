"""Summarise the report of a merge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

# In the order of processing; `statistics` and `spectral` are parts of `merge`.
STAGES = ("read", "merge", "statistics", "spectral", "write")


def summary(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Summarise the reports of all tensors.

    Args:
        tensors: name to its entry of the report: a `TensorReport` as JSON.

    Returns:
        A dict; values are None where nothing was measured.

        - ``tensors``, ``elements``: their numbers.
        - ``treatments``: number of tensors of each treatment. In the next four, each block counts as a tensor.
        - ``routes``: number of tensors of each solver.
        - ``escalated``: tensors that a more exact solver recomputed.
        - ``arbitrary``: tensors whose result depends on a choice among equal singular values.
        - ``largest_error``: the largest error estimate, with its tensor and tolerance.
        - ``captured_energy``: mean and least; ``interference``: mean (0: independent tasks, 1: the same subspaces).
        - ``task_norms``, ``update_norm``: Frobenius norms over the whole model.
        - ``rounding``: what rounding to FP8 changed, relative to the norm of the weights: ``relative``, of all
          together, and ``largest``, of the worst tensor.
    """
    entries, matrices = tensors.values(), by_blocks(tensors)
    certificates = {name: e["certificate"] for name, e in matrices.items() if e["certificate"]}
    errors = {name: c["error"] for name, c in certificates.items() if _is_finite(c["error"])}
    worst = max(errors, key=errors.__getitem__, default=None)
    energies = [value for e in matrices.values() for value in e["captured_energy"]]
    overlaps = [value for e in matrices.values() for value in e["interference"]]
    norms = [e["task_norms"] for e in entries if e["task_norms"]]
    alike = len({len(of_tensor) for of_tensor in norms}) == 1  # slices may have different numbers of models
    rounded = {name: e for name, e in tensors.items() if e.get("rounding_norm") is not None}
    return {
        "tensors": len(tensors),
        "elements": sum(math.prod(e["shape"]) for e in entries),
        "treatments": dict(Counter(e["treatment"] for e in entries)),
        "routes": dict(Counter(c["route"] for c in certificates.values())),
        "escalated": sum(bool(c["escalations"]) for c in certificates.values()),
        "arbitrary": sum(bool(c.get("arbitrary")) for c in certificates.values()),
        "largest_error": worst and {
            "tensor": worst, "error": errors[worst], "tolerance": certificates[worst]["tolerance"],
        },
        "captured_energy": {"mean": sum(energies) / len(energies), "least": min(energies)} if energies else None,
        "interference": sum(overlaps) / len(overlaps) if overlaps else None,
        "task_norms": [math.hypot(*of_task) for of_task in zip(*norms, strict=True)] if alike else None,
        "update_norm": math.hypot(*(e["update_norm"] or 0.0 for e in entries)) if norms else None,
        "rounding": _rounding(rounded) if rounded else None,
    }  # fmt: skip


def _rounding(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what rounding to FP8 changed, relative to the weights: of all tensors, and of the worst."""
    shares = {name: e["rounding_norm"] / e["weight_norm"] if e["weight_norm"] else 0.0 for name, e in tensors.items()}
    worst = max(shares, key=shares.__getitem__)
    changed, norm = (math.hypot(*(e[key] for e in tensors.values())) for key in ("rounding_norm", "weight_norm"))
    return {"relative": changed / norm if norm else 0.0, "largest": {"tensor": worst, "relative": shares[worst]}}


def by_blocks(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the entries of all tensors, with blocks in place of tensors that were merged in blocks.

    The name of a block is that of the tensor with its index, as in ``mlp.experts.down_proj[3]``.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for name, entry in tensors.items():
        whole = math.prod(entry["shape"])
        for block in entry.get("blocks") or [{"part": ""}]:
            share = math.prod(block["shape"]) / whole if block["part"] else 1
            found[name + block["part"]] = {**entry, **block, "bytes": round(entry.get("bytes", 0) * share)}
    return found


def time_per_stage(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each stage, ``wall`` and ``cpu``, summed over all tensors.

    Tensors overlap, so a sum may exceed the time of the merge. Tensors merged before an interruption are included.
    """
    total: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        spent = [entry["stages"][stage] for entry in tensors.values() if stage in entry["stages"]]
        if spent:
            total[stage] = {"wall": sum(wall for wall, _ in spent), "cpu": sum(cpu for _, cpu in spent)}
    return total


def plain(data: Any) -> Any:
    """Return a copy of JSON data with null for NaN and infinity, which JSON lacks."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
