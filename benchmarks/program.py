"""Code that the programs share: command line, interleaved rounds of several sides, memory of processes, results."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from benchmarks import RESULTS, ROOT
from r_tsvm_kernels.bench import Results, Row, ratios, row
from r_tsvm_kernels.bench.measure import resident
from r_tsvm_kernels.bench.table import fitting, rich_table, sheets

SAMPLE_SECONDS = 0.02
WIDTH = 140  # of tables where there is no terminal


class Program:
    """Command line and results of a program.

    Args:
        description: the docstring of the program.
        file: name of its results below benchmarks/results/cpu.
        environment: of a peer, ``.venv-<environment>``, whose Python `--peer-python` may choose; None: there is none.
        rounds: by default; None if nothing is timed.
        optional: whether the peer takes part only if ``--<environment>`` is given.
    """

    def __init__(
        self,
        description: str | None,
        file: str,
        environment: str | None = None,
        rounds: int | None = None,
        optional: bool = False,
    ) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        self.parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
        self._environment, self._optional = environment, optional
        if environment is not None:
            python = ROOT / f".venv-{environment}" / "bin" / "python"
            self.parser.add_argument(
                "--peer-python", type=Path, default=python, help="Python of the peer's environment"
            )
        if rounds is not None:
            self.parser.add_argument("--rounds", type=int, default=rounds, help="interleaved runs (%(default)s)")
        self.parser.add_argument("--json", type=Path, default=RESULTS / file, help="file of results, replaced")

    def arguments(self) -> argparse.Namespace:
        """Read the command line; end the program with a message if it cannot run."""
        args = self.parser.parse_args()
        if "rounds" in args and args.rounds < 1:
            self.parser.error("--rounds must be at least 1")
        wanted = self._environment is not None and (not self._optional or vars(args)[self._environment])
        if self._environment is not None and wanted and not args.peer_python.exists():
            script = f"benchmarks/peers/{self._environment.replace('-', '_')}_env.sh"
            self.parser.error(f"no {args.peer_python}: run {script} first")
        return args


class Turns:
    """Times and peak memory of sides that run in interleaved rounds."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._peaks: dict[str, list[int]] = {}

    def add(self, side: str, seconds: float, peak_bytes: int | None = None) -> None:
        """Note one run of a side."""
        self._seconds.setdefault(side, []).append(seconds)
        if peak_bytes is not None:
            self._peaks.setdefault(side, []).append(peak_bytes)

    def seconds(self, side: str) -> list[float]:
        """Return the times of a side."""
        return self._seconds[side]

    def rows(self, name: str, against: Sequence[str], ours: Sequence[str], **case: Any) -> list[Row]:
        """Return the rows of a case.

        Args:
            name: of the case.
            against: the sides that ours are compared with.
            ours: our sides.
            case: shape, dtype, options of the rows.
        """
        roles = dict.fromkeys(self._seconds, "peer") | dict.fromkeys(ours, "ours")
        rows = [row(name, side, "time", values, role=roles[side], **case) for side, values in self._seconds.items()]
        rows += [
            row(name, side, "speed-up", ratios(self._seconds[other], self._seconds[side]), notes={"against": other},
                **case)
            for side in ours for other in against
        ]  # fmt: skip
        return rows + [row(name, side, "memory", max(p), role=roles[side], **case) for side, p in self._peaks.items()]


class Run(NamedTuple):
    """Wall time and peak memory of a command."""

    seconds: float
    peak_bytes: int


def run_measured(command: list[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command; return its wall time and the peak resident memory of it and all its children together.

    The sum over all processes is sampled; the peak of a single process is the system's own and exact. Pages that
    processes share count for each of them; mapped pages of files count too.

    Raises:
        RuntimeError: the command failed; the message ends with its output.
    """
    # Python keeps what it has compiled, as for users: otherwise each process compiles torch again, for seconds.
    env = {key: value for key, value in (env or os.environ).items() if key != "PYTHONDONTWRITEBYTECODE"}
    peak = 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:  # a pipe could fill up and stop the command
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                residents = [(resident(pid, "VmRSS"), resident(pid, "VmHWM")) for pid in _tree(process.pid)]
                peak = max(peak, sum(now for now, _ in residents), *(highest for _, highest in residents))
                time.sleep(SAMPLE_SECONDS)
        finally:
            process.kill()  # if we were interrupted
        seconds = time.perf_counter() - start
        log.seek(0)
        said = log.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{said[-4000:]}")
    return Run(seconds, peak)


def _tree(pid: int) -> list[str]:
    """Return a process and all its descendants."""
    found = [str(pid)]
    for parent in found:  # grows while it is walked
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += (thread / "children").read_text().split()
        except OSError:  # ended meanwhile
            continue
    return found


class Server:
    """A process of another environment that answers lines of JSON with lines of JSON; the first one is its versions."""

    def __init__(self, command: Sequence[str | Path]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions: dict[str, str] = self._answer()

    def ask(self, question: Any) -> Any:
        """Return the answer to a question."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process ended; its message is above")
        return json.loads(line)


def versions_of(python: Path, *packages: str) -> dict[str, str]:
    """Return versions of packages in another environment."""
    program = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {packages}}}))"
    )
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def finish(results: Results) -> int:
    """Print results as tables; return 1 if one of them is wrong."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for sheet in sheets(results.rows, "provider", short=True):
        console.print(rich_table(fitting(sheet)))
    wrong = [found for found in results.rows if found["notes"].get("status") == "wrong"]
    for found in wrong:
        console.print(f"WRONG: {found['name']} {found['options']} by {found['provider']}: {found['median']}")
    console.print(f"written: {results.path}")
    return 1 if wrong else 0


def judged(found: Row, right: bool) -> Row:
    """Return the row, marked if it is wrong."""
    return found if right else found | {"notes": found["notes"] | {"status": "wrong"}}
