"""Write the report of a merge as one self-contained HTML page: no network, no fonts, no other files."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ..parameters import split_layer
from ..text import printable
from .summaries import by_blocks, plain

# The fields of each tensor, in this order; page.js uses their names.
FIELDS = (
    "name", "kind", "layer", "treatment", "reason", "shape", "dtype", "bytes", "ranks", "ranks_asked", "sparsities",
    "outlier_masses", "weights", "parameters", "captured_energy", "interference", "task_norms", "update_norm", "error",
    "tolerance", "route", "basis_rank", "basis_condition", "gap", "arbitrary", "escalations", "stages",
    "damping", "retained", "gain",
)  # fmt: skip
_CERTIFICATE = ("error", "tolerance", "route", "basis_rank", "basis_condition", "gap", "arbitrary", "escalations")
# Digits in the page; the JSON beside it has all of them.
_DIGITS = 5


def report_page(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a merge.

    Names in recipes and tensors are untrusted. They are embedded as JSON without ``<`` and reach the document as text
    nodes only; the page's content security policy allows no script and no style but its own.

    Args:
        report: the content of ``merge_report.json``.

    Raises:
        KeyError, TypeError, ValueError: `report` is not the report of a merge.
    """
    style, script = page_part("page.css"), page_part("page.js")
    parts = {
        "title": html.escape(printable(f"{report['method']['name']}: {report['name']}")),
        "style_hash": policy_hash(style),
        "script_hash": policy_hash(script),
        "style": style,
        "script": script,
        "data": _embedded(_page_data(report)),
    }
    # One pass, so that inserted text is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page_part("template.html"))


def _page_data(report: Mapping[str, Any]) -> dict[str, Any]:
    names = kinds(report["tensors"])
    rows = []
    for name, entry in by_blocks(report["tensors"]).items():
        part = entry.get("part", "")
        kind, layer = names.get(name.removesuffix(part), (None, None))
        facts = {**entry, "name": name, "kind": kind, "layer": layer}
        facts |= {key: (entry["certificate"] or {}).get(key) for key in _CERTIFICATE}
        rows.append([_rounded(facts[field]) for field in FIELDS])
    shown = {key: value for key, value in report.items() if key != "tensors"}
    return {**plain(shown), "fields": FIELDS, "rows": rows}


def kinds(names: Mapping[str, object]) -> dict[str, tuple[str, int]]:
    """Map the name of each tensor in a layer to its kind and the index of the layer.

    The kind is the rest of the name. Later numbers (of experts) become ``*``. The prefix of the layer is part of the
    kind if there are several kinds of layer.
    """
    split = {name: parts for name in names if (parts := split_layer(name))}
    one_prefix = len({prefix for prefix, _, _ in split.values()}) == 1
    return {
        name: (("" if one_prefix else prefix) + re.sub(r"\b\d+\b", "*", rest.removesuffix(".weight")), layer)
        for name, (prefix, layer, rest) in split.items()
    }


def _embedded(data: object) -> str:
    """Return JSON in which no tag, comment or entity of HTML can begin."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return {key: _rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def page_part(name: str) -> str:
    """Return a file that pages are made of."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def policy_hash(text: str) -> str:
    """Return the hash that names a script or a style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
