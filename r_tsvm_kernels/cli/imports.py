"""Import what a command needs, without the collector of cyclic garbage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Import torch in the ``with`` block in three quarters of the time.

    Its import makes 200,000 objects that live as long as the process. Python's collector would walk them time and
    again, and once more when the process ends. Nothing changes in a process that has imported torch before.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
