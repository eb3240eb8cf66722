"""Run self-checks in processes of their own, so that a kernel that crashes or hangs gives a verdict, too.

A child (`selfcheck.__main__`) reads what to check from stdin and prints a line of JSON before and after each step. If
it dies or is silent for too long, the step that it was at has failed, and another child goes on with the rest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

from ..system import load
from .store import PACKAGE, Verdict

COMMAND = (sys.executable, "-m", "r_tsvm_kernels.selfcheck")
START_SECONDS = 60.0  # to import torch from a slow disk
STEP_SECONDS = 30.0  # one kernel, with its compilation, on a machine that does nothing else
AT_ONCE = 4  # children on a GPU: compiling takes most of the time, one core each
CHILD_BYTES = 4 << 30  # of GPU memory that a child may need
# Signals that no kernel causes: Ctrl-C, a scheduler, a machine without memory. Windows has not all of them.
FROM_OUTSIDE = tuple(sent for sent in signal.Signals if sent.name in ("SIGINT", "SIGTERM", "SIGKILL", "SIGHUP"))

Verdicts = dict[str, dict[str, Verdict]]


def run_checks(
    device: str,
    kernels: Mapping[str, Sequence[str]],
    deadline: float | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Verdicts:
    """Check kernels on a device.

    Args:
        device: such as ``cuda:0``.
        kernels: backends by op, without the reference.
        deadline: time of `time.monotonic` at which checking stops; None for no end.
        progress: called with what is checked next.

    Returns:
        Verdicts of what was checked, and times of the references. A kernel is missing if the time did not suffice, the
        device had no memory for it, or no child could start.
    """
    names = [op for op in kernels if kernels[op]]
    count = max(1, min(_at_once(device), len(names)))
    parts = [{op: kernels[op] for op in names[start::count]} for start in range(count)]
    found: Verdicts = {}
    limit = _Limit(deadline)
    with ThreadPoolExecutor(count) as pool:
        try:
            for part in pool.map(lambda part: _run_part(device, part, limit, progress), parts):
                found |= part
        except BaseException:  # such as Ctrl-C
            limit.stop()
            raise
    return found


def _at_once(device: str) -> int:
    """Return how many children work at a time: on a CPU one, because its kernels use all cores."""
    if not device.startswith("cuda"):
        return 1
    import torch

    return min(AT_ONCE, os.cpu_count() or 1, torch.cuda.mem_get_info(device)[0] // CHILD_BYTES)


def _run_part(
    device: str, kernels: Mapping[str, Sequence[str]], limit: _Limit, progress: Callable[[str], None]
) -> Verdicts:
    """Check kernels one after the other."""
    found: Verdicts = {}
    left = {op: list(names) for op, names in kernels.items()}
    while left:
        before, at = sum(map(len, left.values())), None
        with _child(device, left, limit) as (lines, ended):
            for line in lines:
                at = _note(line, found, left)
                if at is not None:
                    progress(f"{at[0]}: {', '.join(at[1])}")
            reason = ended()
        if at is not None and reason is not None:
            op, names = at
            _note({"op": op, "verdicts": {name: {"passed": False, "reason": reason} for name in names}}, found, left)
        left = {op: names for op, names in left.items() if names}
        if reason is None or sum(map(len, left.values())) == before:  # the end, or no child can start
            break
    # One that passed and was not timed, because the time was up, is not done.
    return {
        op: {name: verdict for name, verdict in own.items() if not verdict.passed or verdict.seconds is not None}
        for op, own in found.items()
    }


def _note(line: dict[str, Any], found: Verdicts, left: dict[str, list[str]]) -> tuple[str, list[str]] | None:
    """Take in a line of a child; return the op and the kernels at which it goes to work, if it says so."""
    op = line["op"]
    if "begins" in line:
        return op, line["begins"]
    own = found.setdefault(op, {})
    for backend, verdict in line.get("verdicts", {}).items():
        own[backend] = Verdict(**verdict)
    for backend, seconds in line.get("seconds", {}).items():
        if backend in own or backend == "torch":
            own[backend] = replace(own.get(backend, Verdict(True)), seconds=seconds)
    done = {*line.get("verdicts", {}), *line.get("unchecked", [])}
    left[op] = [name for name in left.get(op, []) if name not in done]
    return None


@contextmanager
def _child(
    device: str, kernels: Mapping[str, Sequence[str]], limit: _Limit
) -> Iterator[tuple[Iterator[dict[str, Any]], Callable[[], str | None]]]:
    """Yield the lines of a child, and a function that says how its kernels ended it; None if they did not."""
    environment = os.environ | {"RTSVM_SELFCHECK": "off"}
    with tempfile.TemporaryFile() as errors:
        # In the folder of the package, which `-m` puts first: the child must check the kernels of this process.
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, cwd=PACKAGE.parent
        )
        asked, said = process.stdin, process.stdout
        assert asked is not None and said is not None
        watch = limit.watch(process)
        try:
            with suppress(OSError), asked:  # it may have died at once
                asked.write(json.dumps({"device": device, "kernels": kernels}).encode())
            yield _lines(said, watch), lambda: _end(process, watch, errors)
        finally:
            watch.stop()
            process.kill()
            process.wait()
            said.close()


class _Limit:
    """The end of all checks, at a time of `time.monotonic` or when they are stopped."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = float("inf") if deadline is None else deadline
        self._watches: list[_Watch] = []

    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def watch(self, process: subprocess.Popen[bytes]) -> _Watch:
        """Return a watch over a child."""
        watch = _Watch(process, self)
        self._watches.append(watch)
        return watch

    def stop(self) -> None:
        """End all checks now."""
        self._deadline = 0.0
        for watch in self._watches:
            watch.expect(0.0)


class _Watch:
    """Kills a child that is silent for too long, or when the time is up."""

    def __init__(self, process: subprocess.Popen[bytes], limit: _Limit) -> None:
        self.hung: float | None = None
        self.late = False
        self._process, self._limit = process, limit
        self._timer: threading.Timer | None = None
        self.expect(START_SECONDS)

    def expect(self, seconds: float) -> None:
        """Allow so many seconds until the next line."""
        self.stop()
        left = self._limit.left()
        self._timer = threading.Timer(min(seconds, left), self._kill, [seconds, left <= seconds])
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Allow any time."""
        if self._timer is not None:
            self._timer.cancel()

    def _kill(self, seconds: float, late: bool) -> None:
        self.hung, self.late = seconds, late
        self._process.kill()


def _lines(stream: IO[bytes], watch: _Watch) -> Iterator[dict[str, Any]]:
    for text in stream:
        watch.expect(STEP_SECONDS * min(4.0, load()))
        if text.endswith(b"\n"):  # otherwise it was killed while it wrote
            yield json.loads(text)


def _end(process: subprocess.Popen[bytes], watch: _Watch, errors: IO[bytes]) -> str | None:
    code = process.wait()
    watch.stop()
    if watch.late or code == 0 or (-code in FROM_OUTSIDE and watch.hung is None):
        return None
    if watch.hung is not None:
        return f"it did not end within {watch.hung:.0f} s"
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"it crashed its process ({', '.join([how, *last])})"
