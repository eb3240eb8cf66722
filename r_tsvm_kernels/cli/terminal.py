"""Standard output and error of the commands. Neither a failure of these streams nor any text stops a merge."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..text import printable

if TYPE_CHECKING:
    from rich.console import Console

# Width of tables if the output is not a terminal.
WIDTH = 160


class Stream:
    """A text stream that silently discards all text after a write failed; otherwise it behaves like the stream.

    Attributes:
        error: error of the failed write; None as long as the stream works.
    """

    def __init__(self, stream: TextIO) -> None:
        self.error: OSError | None = None
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text; discard it if the stream has failed."""
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream has failed."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., object], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            action(*arguments)
        except OSError as error:
            self.error = error
            # Discard the buffered text; otherwise Python would fail to flush it at exit.
            with suppress(OSError, ValueError), Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def standard_streams() -> Iterator[tuple[Stream, Stream]]:
    """Yield stdout and stderr as streams that never fail; `sys.stdout` and `sys.stderr` are these inside the block.

    Characters that their encoding lacks are escaped. A descriptor that was closed (``>&-``) is opened on /dev/null:
    the next file to be opened would take its number, and receive what a library prints.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            _open_null(number, flags)
    before = sys.stdout, sys.stderr
    out, err = (Stream(_encoding_all(stream)) for stream in before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def say(line: object) -> None:
    """Print one line on stdout, with everything escaped that is not printable."""
    print(printable(line))


def tell(line: object) -> None:
    """Print one line on stderr, with everything escaped that is not printable."""
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def told_warnings(quiet: bool) -> Iterator[None]:
    """Print the warnings of the package on stderr, as notes; none if quiet."""
    handler = _Notes(logging.CRITICAL if quiet else logging.WARNING)
    logger = logging.getLogger("r_tsvm_kernels")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"note: {record.getMessage()}")


def console(width: int = WIDTH) -> Console:
    """Return a console on stdout that shows text as it is: no markup, no emoji names, no colours of its own choice.

    Args:
        width: of what it prints where stdout is no terminal.
    """
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False)


def _open_null(number: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    if null == number:
        os.set_inheritable(number, True)
    else:
        os.dup2(null, number)
        os.close(null)


def _encoding_all(stream: TextIO | None) -> TextIO:
    if stream is None:  # its descriptor was closed when Python started
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
