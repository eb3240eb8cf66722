"""Compare two versions by what `rtsvm bench` wrote for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .results import Key, Row, case_of

NOISE = 0.05  # relative; smaller changes are never reported
FEWEST_ROUNDS = 2  # that have a spread

Turn = tuple[Sequence[Row], Sequence[Row]]  # before, after


class Change(NamedTuple):
    """A time that was measured on both sides.

    Attributes:
        row: of the side after.
        before: median seconds.
        after: median seconds.
        ratio: after / before.
        verdict: ``faster`` or ``slower``, beyond noise; otherwise empty.
    """

    row: Row
    before: float
    after: float
    ratio: float
    verdict: str


def compare(turns: Sequence[Turn]) -> tuple[list[Change], float]:
    """Compare two versions that ran in turns, or once each.

    Eager torch and peers are the control: their code is the same on both sides, so their changes measure the noise. A
    row of ours has changed if all turns agree on the direction and it changed by more than 19 of 20 control rows; for
    a single turn its quartiles must not overlap either.

    Args:
        turns: pairs of results, before and after, each pair measured one right after the other.

    Returns:
        Every time that is in all results, without a verdict for the control; and the noise: the relative change, at
        least 0.05, below which nothing is reported.
    """
    pairs = [(_times(before), _times(after)) for before, after in turns]
    found = {
        key: [(before[key], after[key]) for before, after in pairs]
        for key in pairs[0][1]
        if all(key in rows for pair in pairs for rows in pair)
    }
    turnwise = {key: [after["median"] / before["median"] for before, after in rows] for key, rows in found.items()}
    control = [median(turnwise[key]) for key, rows in found.items() if rows[0][1]["role"] != "ours"]
    sizes = sorted(max(ratio, 1 / ratio) - 1 for ratio in control)
    noise = max(NOISE, sizes[math.ceil(0.95 * len(sizes)) - 1] if sizes else 0.0)
    changes = []
    for key, rows in found.items():
        ratio, verdict = median(turnwise[key]), ""
        if rows[0][1]["role"] == "ours":
            if _slower(rows) and ratio > 1 + noise:
                verdict = "slower"
            elif _slower([(after, before) for before, after in rows]) and ratio < 1 / (1 + noise):
                verdict = "faster"
        before, after = (median(side["median"] for side in sides) for sides in zip(*rows, strict=True))
        changes.append(Change(rows[0][1], before, after, ratio, verdict))
    return changes, noise


def _slower(rows: Sequence[tuple[Row, Row]]) -> bool:
    """Return whether the second side was slower in all turns, beyond its spread if there is one turn."""
    if len(rows) > 1:
        return all(after["median"] > before["median"] for before, after in rows)
    ((before, after),) = rows
    return bool(min(before["rounds"], after["rounds"]) >= FEWEST_ROUNDS and after["q1"] > before["q3"])


def summary(changes: Sequence[Change], noise: float) -> str:
    """Return in a sentence how many of our times changed."""
    ours = [change for change in changes if change.row["role"] == "ours"]
    faster, slower = (sum(change.verdict == verdict for change in ours) for verdict in ("faster", "slower"))
    found = f"{faster} faster, {slower} slower" if faster or slower else "nothing changed"
    return (
        f"{len(changes)} times in both; of {len(ours)} of ours: {found} beyond noise. Noise is {noise:.0%}: 19 of 20 "
        f"of the {len(changes) - len(ours)} times of torch and peers, whose code is the same, changed by less"
    )


def different_circumstances(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Return the differences between two runs besides the code: processor, threads, versions of torch."""
    was, now = ({**rows[0]["machine"], "torch": rows[0]["versions"].get("torch")} for rows in (before, after))
    return [f"{name}: {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]


def _times(rows: Sequence[Row]) -> dict[Key, Row]:
    return {
        (case_of(row), row["provider"]): row for row in rows if row["metric"] == "time" and row["median"] is not None
    }
