"""What became of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, repr=False)
class Trial:
    """A candidate that was merged and evaluated, or that failed.

    Attributes:
        number: from 1, in the order in which candidates are tried.
        values: value of each varied parameter, by its label.
        scores: what the evaluation gave, by name; empty if it failed.
        failure: why there are no scores; empty otherwise.
        exit_status: of the command that failed; negative: the signal that ended it; None if it was stopped, or if
            something else failed.
        stderr: the end of what a failed command, or function, printed on stderr.
        merge_seconds: wall time of the merge, with that of making parts before it.
        evaluation_seconds: wall time of the evaluation.
        from_parts: whether it was merged from parts that candidates share.
    """

    number: int
    values: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    exit_status: int | None = None
    stderr: str = ""
    merge_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    from_parts: bool = False

    def __repr__(self) -> str:
        found = described(self.scores) if self.scores else f"failed ({self.failure})"
        return f"Trial({self.number}: {described(self.values)}: {found})"


def described(values: Mapping[str, Any]) -> str:
    """Return values as text: ``alpha=0.5, weight.math=1``."""
    return ", ".join(f"{label}={written(value)}" for label, value in values.items())


def written(value: Any) -> str:
    """Return a value in a few characters."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
