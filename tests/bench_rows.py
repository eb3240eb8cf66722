"""The rows of a benchmark by provider: its status and its figures."""

from types import SimpleNamespace


def outcomes(rows):
    """Return by provider: role, status, reason, and the rows of its metrics by name; None for those it has not."""
    found = {}
    for row in rows:
        if row["role"] == "ceiling":
            continue
        outcome = found.setdefault(row["provider"], SimpleNamespace(role=row["role"], metrics={}, status=None))
        outcome.metrics.setdefault(row["metric"], row)
        if row["metric"] == "time":
            outcome.status, outcome.reason = row["notes"].get("status", "timed"), row["notes"].get("reason", "")
    for outcome in found.values():
        error = outcome.metrics.get("error")
        outcome.error = None if error is None else error["median"]
        outcome.limit = None if error is None else error["notes"]["limit"]
        outcome.timed = outcome.metrics["time"]["median"] is not None
    return found
