"""The command that evaluates a model: how it is written, and how it is run and stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError, OutputBusyError
from ..system import KILL, lock_descriptor, open_descriptor, signal_group

MODEL = "{model}"
# The program that calls a function.
CALL = Path(__file__).with_name("call.py")
# A function instead of a command: module:function, or file.py:function.
_FUNCTION = re.compile(r"(?:[\w./-]+\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")
# Outside quotes, these have a meaning for a shell only; a backslash and quotes are understood without one.
_FOR_SHELLS = frozenset("|&;<>()*?[~#\n")
# Between the signals that ask a command to end and that end it.
GRACE_SECONDS = 5.0
# Read from the end of stdout and stderr.
_TAIL_BYTES = 1 << 16


def evaluation_command(text: str) -> list[str]:
    """Return the words of a command with ``{model}`` in them, or of the Python that calls ``module:function``.

    A command that needs a shell (pipes, redirections, variables, patterns, ``~``) is given to ``/bin/sh``.

    Raises:
        ConfigError: no ``{model}``, a quote without its end, or no such program.

    Examples:
        >>> evaluation_command("/bin/echo --path={model} 'a b'")
        ['/bin/echo', '--path={model}', 'a b']
        >>> evaluation_command("/bin/cat {model}/scores | tail -n 1")
        ['/bin/sh', '-c', '/bin/cat {model}/scores | tail -n 1']
    """
    if _FUNCTION.fullmatch(text.strip()):
        return [sys.executable, str(CALL), text.strip(), MODEL]
    if MODEL not in text:
        raise ConfigError(
            f"the evaluation is a command with {MODEL} in it, as in `python evaluate.py {MODEL}`, or module:function, "
            f"got {text!r}"
        )
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the evaluation {text!r} cannot be read: {error}") from None
    shell, quoted = _reads(text)
    if shell or re.match(r"\w+=", words[0]):
        if quoted:
            raise ConfigError(f"the evaluation {text!r} needs a shell; write {MODEL} outside quotes, which are added")
        return ["/bin/sh", "-c", text]
    if MODEL not in words[0] and shutil.which(words[0]) is None:
        raise ConfigError(f"the evaluation {text!r}: no such program: {words[0]}")
    return words


def filled(command: Sequence[str], model: Path) -> list[str]:
    """Return a command with the path of a model in place of ``{model}``."""
    if list(command[:2]) == ["/bin/sh", "-c"]:
        return [*command[:2], command[2].replace(MODEL, shlex.quote(str(model)))]
    return [word.replace(MODEL, str(model)) for word in command]


def _reads(text: str) -> tuple[bool, bool]:
    """Return whether a command has a sign that only a shell understands, and whether ``{model}`` is inside quotes."""
    quote, shell, inside, skip = "", False, False, False
    for index, char in enumerate(text):
        if skip:
            skip = False
        elif char == "\\" and quote != "'":
            skip = True
        elif char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        else:
            shell |= (not quote and char in _FOR_SHELLS) or (quote != "'" and char in "$`")
            inside |= bool(quote) and text.startswith(MODEL, index)
    return shell, inside


class Running:
    """The commands that run now, each in a process group of its own, so that all their processes can be stopped."""

    def __init__(self) -> None:
        self._groups = set[int]()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, command: Sequence[str], slot: Path, timeout: float | None) -> tuple[int | None, str, str]:
        """Run a command to its end.

        Args:
            command: its words.
            slot: folder for its output and its lock; one command at a time uses it.
            timeout: seconds after which it is stopped.

        Returns:
            Its exit status, or None if it was stopped, and the ends of its stdout and stderr. What it leaves running in
            its group is ended.

        Raises:
            OSError: it cannot be started.
            OutputBusyError: a process of the command before it still runs, outside of the group of that.
        """
        out, err = slot / "stdout", slot / "stderr"
        with out.open("w+b") as stdout, err.open("w+b") as stderr, _locked(slot) as lock:
            with self._lock:
                if self.stopped:
                    return None, "", ""
                _group_file(slot).unlink(missing_ok=True)  # the group of the command before this one
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
                    pass_fds=(lock,),
                )  # fmt: skip
                self._groups.add(process.pid)
            try:
                with suppress(FileNotFoundError):  # it has deleted its folder already
                    _group_file(slot).write_text(str(process.pid), encoding="ascii")
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                pass
            finally:
                running = process.poll() is None
                end_group(process.pid, process if running else None)
                with self._lock:
                    self._groups.discard(process.pid)
            status = None if running or self.stopped else process.returncode
            # Read while they are open: a command may delete its folder.
            return status, _tail(stdout), _tail(stderr)

    def stop(self) -> None:
        """Stop all commands, and start no more."""
        with self._lock:
            self.stopped = True
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._groups and time.monotonic() < deadline:
            time.sleep(0.02)  # the threads that wait for them take them from the list
        self._signal_all(KILL)

    def _signal_all(self, number: signal.Signals) -> None:
        with self._lock:
            for group in self._groups:
                _signal(group, number)


def end_group(group: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """End all processes of a group: ask first, then kill."""
    _signal(group, signal.SIGTERM)
    if process is not None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _signal(group, KILL)
    if process is not None:
        process.wait()


def end_orphan(slot: Path) -> None:
    """End the command that a killed sweep has left running in a slot, if there is one.

    Raises:
        OutputBusyError: it cannot be ended.
    """
    if not slot.is_dir() or _is_free(slot):
        return
    with suppress(OSError, ValueError):
        end_group(int(_group_file(slot).read_text(encoding="ascii")))
    deadline = time.monotonic() + GRACE_SECONDS
    while not _is_free(slot):
        if time.monotonic() > deadline:
            raise OutputBusyError(f"{slot}: an evaluation that a killed sweep started still runs; stop it")
        time.sleep(0.05)


@contextmanager
def _locked(slot: Path) -> Iterator[int]:
    """Yield the descriptor of a locked file, which a command inherits: the lock lives as long as its processes.

    Raises:
        OutputBusyError: a process of the command before has it.
    """
    lock = open_descriptor(slot / "lock", os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        while not lock_descriptor(lock):
            if time.monotonic() > deadline:
                raise OutputBusyError(
                    f"{slot}: a process that the evaluation before has started still runs, in a session of its own; "
                    "stop it, and let the evaluation wait for what it starts"
                )
            time.sleep(0.02)
        yield lock
    finally:
        os.close(lock)


def _is_free(slot: Path) -> bool:
    lock = open_descriptor(slot / "lock", os.O_RDWR | os.O_CREAT)
    try:
        return lock_descriptor(lock)
    finally:
        os.close(lock)


def _group_file(slot: Path) -> Path:
    return slot / "group"


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        signal_group(group, number)


def _tail(file: BinaryIO) -> str:
    """Return the end of a file as text."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL_BYTES))
    return file.read().decode("utf-8", "replace")
