"""Peak memory, as the system counts it. Needs nothing but Python and Linux: environments of other tools use it too."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SAMPLE_SECONDS = 0.02


class Run(NamedTuple):
    """What a command took."""

    seconds: float
    peak_bytes: int


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """Return the result of the call and the largest growth of resident memory in it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("self", "VmRSS")
    result = call()
    return result, max(0, _resident("self", "VmHWM") - before)


def run_measured(command: list[str], env: Mapping[str, str] | None = None) -> Run:
    """Run a command; return its wall time and the peak resident memory of it and all its children together.

    The sum over all processes is sampled; the peak of a single process is the system's own, which misses nothing.
    Pages that processes share count for each of them, mapped pages of files count too.

    Raises:
        RuntimeError: the command failed; the message ends with what it said.
    """
    peak = 0
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:  # a pipe could fill up and stop the command
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                tree = _tree(process.pid)
                residents = [(_resident(pid, "VmRSS"), _resident(pid, "VmHWM")) for pid in tree]
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
    """Return a process and everything that descends from it."""
    found = [str(pid)]
    for parent in found:  # grows while it is walked
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += (thread / "children").read_text().split()
        except OSError:  # ended meanwhile
            continue
    return found


def _resident(pid: str, field: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # ended meanwhile
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), 0)
