"""Show the progress of a running command."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..text import printable
from .terminal import tell

if TYPE_CHECKING:
    from ..engine import Progress
    from ..sweep import SweepProgress


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show a bar on a terminal, a plain line every few seconds elsewhere, nothing if quiet.

    A display that fails is switched off with one line that says so, and the merge continues.
    """
    if quiet:
        yield None
        return
    display = _Guarded(_Bar if sys.stderr.isatty() else _PlainLines)
    try:
        yield display.show
    finally:
        display.close()


@contextmanager
def shown_sweep(quiet: bool) -> Iterator[Callable[[SweepProgress], None] | None]:
    """Print a line for each candidate of a sweep, and one every few seconds while a candidate is merged."""
    yield None if quiet else _SweepLines().show


class _SweepLines:
    """One line for each candidate, and what a long merge has done."""

    def __init__(self) -> None:
        self._merge: _PlainLines | None = None

    def show(self, state: SweepProgress) -> None:
        from ..sweep.durations import format_duration
        from ..sweep.trial import described

        trial = state.trial
        if state.merge is not None:
            self._merge = self._merge or _PlainLines()
            if state.merge.tensors_done < state.merge.tensors_total:
                self._merge.show(state.merge)
        if trial is None:
            return
        self._merge = None
        found = described(trial.scores) or f"failed: {trial.failure.splitlines()[0]}"
        spent = f"merge {format_duration(trial.merge_seconds)}, evaluation {format_duration(trial.evaluation_seconds)}"
        tell(f"{state.done}/{state.total} {described(trial.values)}: {found} ({spent})")


class _Guarded:
    """A display that may fail at any time."""

    def __init__(self, make: Callable[[], _Bar | _PlainLines]) -> None:
        self._display: _Bar | _PlainLines | None = None
        with self._switching_off():
            self._display = make()

    def show(self, state: Progress) -> None:
        if self._display is not None:
            with self._switching_off():
                self._display.show(state)

    def close(self) -> None:
        if self._display is not None:
            with self._switching_off():
                self._display.close()

    @contextmanager
    def _switching_off(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._display = None
            tell(f"rtsvm: progress is not shown any more ({type(error).__name__}: {error})")


class _Bar:
    """A bar, with what is merged at the moment."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar = Progress(
            TextColumn("{task.fields[done]}/{task.fields[count]} tensors"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=Console(stderr=True),
        )
        self._bar.live.transient = True  # hidden until there is progress, so that no empty bar is above an error
        self._task = self._bar.add_task("reading headers", total=None, done=0, count="?")
        self._bar.start()

    def show(self, state: Progress) -> None:
        self._bar.live.transient = False
        self._bar.update(
            self._task,
            description=printable(state.tensor),
            completed=state.bytes_done,
            total=state.bytes_total,
            done=state.tensors_done,
            count=state.tensors_total,
        )

    def close(self) -> None:
        self._bar.stop()


class _PlainLines:
    """One line every few seconds, and one for the last tensor."""

    INTERVAL = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def show(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self.last < self.INTERVAL and state.tensors_done < state.tensors_total:
            return
        self.last = now
        elapsed = now - self.start
        left = elapsed * (state.bytes_total / state.bytes_done - 1) if state.bytes_done else 0.0
        tell(
            f"{state.tensors_done}/{state.tensors_total} tensors, "
            f"{state.bytes_done / 1e6:.1f}/{state.bytes_total / 1e6:.1f} MB, {left:.0f} s left: {state.tensor}"
        )

    def close(self) -> None:
        """Do nothing: every line is printed already."""
