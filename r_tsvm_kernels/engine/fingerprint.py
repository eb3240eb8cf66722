"""The fingerprint of a merge: everything that its bytes depend on, and the state of every input file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__, dispatch
from ..checkpoint import checksum
from ..methods import Method
from ..plan import MergePlan
from .shards import layouts

# Increased when journals of older versions cannot be resumed.
_FORMAT = 4


def fingerprint(plan: MergePlan, device: torch.device) -> dict[str, Any]:
    """Return the fingerprint of a merge, as JSON. Merges with equal fingerprints give the same bytes."""
    inputs = {
        str(state.path): {**asdict(state), "path": str(state.path)} for model in plan.inputs for state in model.files()
    }
    shards = {layout.file_name: [layout.size, checksum(layout.header)] for layout in layouts(plan)}
    content = {
        "format": _FORMAT,
        **software(device, plan.config.method),
        "recipe": plan.config.model_dump(mode="json"),
        "models": [str(model.path) for model in plan.inputs],
        "inputs": inputs,
        "shards": shards,
    }
    normal: dict[str, Any] = json.loads(json.dumps(content))
    return normal


def software(device: torch.device, method: Method) -> dict[str, Any]:
    """Return the facts of this machine that the bytes of a merge depend on, as JSON."""
    return {
        "versions": {"r_tsvm_kernels": __version__, "torch": torch.__version__},
        "device": device.type,
        "kernels": kernels(device, method),
    }


def kernels(device: torch.device, method: Method) -> dict[str, str | None]:
    """Return the backend of each op that a method may call; kernels without a verdict are checked first, together."""
    names = sorted(dispatch.ops() if method.ops is None else method.ops)
    dispatch.prepare(names, device.type)
    return {op: dispatch.chosen(op, device.type) for op in names}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe the first difference between two fingerprints; None if they are equal."""
    for key in {**now, **before}:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return f"{key}: {old} then, {new} now"
        name = next(name for name in {**new, **old} if old.get(name) != new.get(name))
        if key == "inputs":
            return f"the input {name} " + ("changed" if name in old and name in new else "is not in both")
        return f"{key}: {name} was {old.get(name)}, is {new.get(name)}"
    return None
