"""SIGTERM ends a command as Ctrl-C does: by an exception, so that all cleanup runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(BaseException):
    """SIGTERM was received. Not an Exception, like KeyboardInterrupt: only the command line may catch it."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` in the main thread when SIGTERM comes inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
