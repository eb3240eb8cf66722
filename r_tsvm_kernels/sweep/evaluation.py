"""Evaluate a merged model: by a command, or by a function."""

from __future__ import annotations

import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, OutputBusyError
from .commands import CALL, Running, evaluation_command, filled
from .durations import format_duration
from .scores import as_scores, parse_scores

Evaluate = str | Callable[[Path], float | Mapping[str, float]]

# Kept from the end of what a failed evaluation printed.
_STDERR_LINES, _STDERR_CHARACTERS = 20, 2000


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gave: scores, or why there are none. See `Trial`."""

    seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    exit_status: int | None = None
    stderr: str = ""


class Evaluation(Protocol):
    """A way to evaluate a model.

    Attributes:
        name: for the journal; another name is another evaluation.
    """

    name: str

    def __call__(self, model: Path, slot: Path) -> Outcome:
        """Evaluate the model in a folder; `slot` is a folder for files."""

    def stop(self) -> None:
        """Stop what runs."""


def make_evaluation(evaluate: Evaluate, timeout: float | None) -> Evaluation:
    """Return the evaluation by a command, or a function.

    Raises:
        ConfigError: neither, a command that cannot run, or a time limit for a function.
    """
    if isinstance(evaluate, str):
        return _Command(evaluate, timeout)
    if not callable(evaluate):
        raise ConfigError(f"evaluate: expected a command or a function, got {type(evaluate).__name__}")
    if timeout is not None:
        raise ConfigError("a function cannot be stopped: an evaluation has a time limit only as a command")
    return _Function(evaluate)


class _Command:
    def __init__(self, text: str, timeout: float | None) -> None:
        self.name = text
        self._words, self._timeout = evaluation_command(text), timeout
        self._running = Running()
        if self._words[1:2] == [str(CALL)]:
            _require_function(self._words)

    def __call__(self, model: Path, slot: Path) -> Outcome:
        start = time.monotonic()
        try:
            status, out, err = self._running.run(filled(self._words, model), slot, self._timeout)
        except OutputBusyError:
            raise
        except OSError as error:
            return Outcome(time.monotonic() - start, failure=f"cannot be started: {error.strerror or error}")
        seconds = time.monotonic() - start
        if status == 0:
            try:
                return Outcome(seconds, parse_scores(out))
            except ValueError as error:
                return Outcome(seconds, failure=str(error), exit_status=0, stderr=_end(err))
        if status is None:
            limit = format_duration(self._timeout or 0.0)
            return Outcome(seconds, failure=f"took longer than {limit} and was stopped", stderr=_end(err))
        how = f"exit status {status}" if status > 0 else f"ended by signal {-status}"
        return Outcome(seconds, failure=how, exit_status=status, stderr=_end(err))

    def stop(self) -> None:
        self._running.stop()


class _Function:
    def __init__(self, function: Callable[[Path], Any]) -> None:
        self._function = function
        self.name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(type(function)))}"

    def __call__(self, model: Path, slot: Path) -> Outcome:
        start = time.monotonic()
        try:
            scores = as_scores(self._function(model))
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
            return Outcome(time.monotonic() - start, failure=failure, stderr=_end(traceback.format_exc()))
        return Outcome(time.monotonic() - start, scores)

    def stop(self) -> None:
        """Do nothing: a function ends when it returns."""


def _require_function(words: list[str]) -> None:
    """Look for a function as the sweep will, in a process of its own, before anything is merged."""
    found = subprocess.run(words[:-1], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise ConfigError(f"the evaluation {words[2]!r} cannot be imported: {reason}")


def _end(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-_STDERR_LINES:])[-_STDERR_CHARACTERS:]
