"""What a running command shows of its progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine import Progress


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show a bar on a terminal, a plain line every few seconds elsewhere, nothing if quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _PlainLines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.fields[done]}/{task.fields[count]} tensors"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading headers", total=None, done=0, count="?")

        def show(state: object) -> None:
            from ..engine import Progress as State

            assert isinstance(state, State)
            bar.update(
                task,
                description=state.tensor,
                completed=state.bytes_done,
                total=state.bytes_total,
                done=state.tensors_done,
                count=state.tensors_total,
            )

        yield show


class _PlainLines:
    """One line every few seconds, and one for the last tensor."""

    INTERVAL = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self.last < self.INTERVAL and state.tensors_done < state.tensors_total:
            return
        self.last = now
        elapsed = now - self.start
        left = elapsed * (state.bytes_total / state.bytes_done - 1) if state.bytes_done else 0.0
        print(
            f"{state.tensors_done}/{state.tensors_total} tensors, "
            f"{state.bytes_done / 1e6:.1f}/{state.bytes_total / 1e6:.1f} MB, {left:.0f} s left: {state.tensor}",
            file=sys.stderr,
            flush=True,
        )
