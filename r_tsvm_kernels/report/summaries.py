"""The report of a merge in a few numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

# In the order in which a tensor goes through them; the parts of `merge` follow it.
STAGES = ("read", "merge", "statistics", "spectral", "write")


def summary(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the reports of all tensors up.

    Args:
        tensors: name to the entry of the report: a `TensorReport` as JSON.

    Returns:
        ``tensors``, ``elements``, and how many tensors there are of each ``treatment`` and ``route``; how many
        ``escalated`` to a more exact route, and how many depend on an ``arbitrary`` choice among equal singular values;
        the ``largest_error`` estimate, with its tensor and tolerance; mean and least ``captured_energy`` and mean
        ``interference`` (0 as of independent tasks, 1 the same subspaces) of the matrices that have one; and the norms
        of the whole model's task vectors and update. None where nothing was measured.
    """
    entries = tensors.values()
    certificates = {name: e["certificate"] for name, e in tensors.items() if e["certificate"]}
    errors = {name: c["error"] for name, c in certificates.items() if _is_finite(c["error"])}
    worst = max(errors, key=errors.__getitem__, default=None)
    energies = [value for e in entries for value in e["captured_energy"]]
    overlaps = [value for e in entries for value in e["interference"]]
    norms = [e["task_norms"] for e in entries if e["task_norms"]]
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
        "task_norms": [math.hypot(*of_task) for of_task in zip(*norms, strict=True)] if norms else None,
        "update_norm": math.hypot(*(e["update_norm"] or 0.0 for e in entries)) if norms else None,
    }  # fmt: skip


def time_per_stage(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the seconds of each stage, ``wall`` and ``cpu``, summed over the tensors: stages of several overlap.

    ``statistics`` and ``spectral`` are parts of ``merge``. Tensors that were merged before a stop count too.
    """
    total: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        spent = [entry["stages"][stage] for entry in tensors.values() if stage in entry["stages"]]
        if spent:
            total[stage] = {"wall": sum(wall for wall, _ in spent), "cpu": sum(cpu for _, cpu in spent)}
    return total


def plain(data: Any) -> Any:
    """Return a copy of JSON data without NaN and infinity, which JSON does not have: they become null."""
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
