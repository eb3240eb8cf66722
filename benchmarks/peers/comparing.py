"""What the programs that compare with a peer share: their command line, turns of the sides, tables, the JSON file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import RESULTS, ROOT, quartiles, ratios


class Program:
    """Command line and results of a comparison.

    Args:
        description: of the program; the first line is its help.
        environment: of the peer, as in ``.venv-mergekit``, whose Python the user may choose; None if we run in it.
        rounds: by default; None if nothing is timed.
    """

    def __init__(self, description: str | None, environment: str | None, rounds: int | None) -> None:
        self.parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
        self._environment = environment
        if environment is not None:
            python = ROOT / f".venv-{environment}" / "bin" / "python"
            self.parser.add_argument(
                "--peer-python", type=Path, default=python, help="Python of the peer's environment"
            )
        if rounds is not None:
            self.parser.add_argument("--rounds", type=int, default=rounds)
        self.parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")

    def arguments(self) -> argparse.Namespace:
        """Read the command line; end the program with a message where it cannot work."""
        args = self.parser.parse_args()
        if "rounds" in args and args.rounds < 2:
            self.parser.error("a spread needs at least two rounds")
        if self._environment is not None and not args.peer_python.exists():
            script = f"{self._environment.replace('-', '_')}_env.sh"
            self.parser.error(f"no {args.peer_python}: run {script} first")
        return args


class Turns:
    """Wall times and peak memory of sides that run in turn, so that whatever else the machine does hits all alike."""

    def __init__(self, sides: Sequence[str]) -> None:
        self._seconds: dict[str, list[float]] = {side: [] for side in sides}
        self._peaks: dict[str, list[int]] = {side: [] for side in sides}

    def add(self, side: str, seconds: float, peak_bytes: int) -> None:
        """Note one run."""
        self._seconds[side].append(seconds)
        self._peaks[side].append(peak_bytes)

    def summary(self, peer: str, ours: str | None = None) -> dict[str, Any]:
        """Return quartiles of the times, of the ratios to the peer's by rounds, and the largest peaks.

        The ratio is that of `ours`; one for each other side where that is None.
        """
        peers = self._seconds[peer]
        ratio: dict[str, Any] = {side: ratios(peers, times) for side, times in self._seconds.items() if side != peer}
        return {
            "seconds": {side: quartiles(times) for side, times in self._seconds.items()},
            "ratio": ratio if ours is None else ratio[ours],
            "peak_bytes": {side: max(peaks) for side, peaks in self._peaks.items()},
        }


def wide_console(width: int) -> Console:
    """Return a console of this width at least: a log has none of its own."""
    console = Console()
    console.width = max(console.width, width)
    return console


def verdict(right: bool) -> str:
    """Return the cell of a table that says whether a result is right."""
    return "right" if right else "[bold red]WRONG"


def spread(ratio: dict[str, float], digits: int = 1) -> tuple[str, str]:
    """Return the two cells of a ratio: median and quartiles."""
    return f"{ratio['median']:.{digits}f}", f"{ratio['q1']:.{digits}f} - {ratio['q3']:.{digits}f}"


def write(report: dict[str, Any], target: Path, console: Console) -> None:
    """Write the JSON file, and say so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {target}")
