"""Call ``module:function`` or ``file.py:function`` with the path of a model, and print what it returns.

    python call.py module:function MODEL

A sweep runs this file in a process of its own, so that a function can be stopped as a command can. It imports nothing
of this package, and so starts quickly. Without MODEL it only looks for the function.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Call the function; the last line on stdout has its scores."""
    function = find_function(arguments[0])
    if len(arguments) > 1:
        scores = function(Path(arguments[1]))
        sys.stdout.write(f"\n{json.dumps(scores, default=float)}\n")


def find_function(name: str) -> Callable[[Path], Any]:
    """Return a function by its name.

    Raises:
        ImportError, OSError, AttributeError, TypeError: there is no such module or function.
    """
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, module)
        if spec is None or spec.loader is None:
            raise ImportError(f"{module} cannot be imported")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    function: Callable[[Path], Any] = getattr(loaded, attribute)
    if not callable(function):
        raise TypeError(f"{name} is no function")
    return function


if __name__ == "__main__":
    sys.path[0] = str(Path.cwd())  # in place of the folder of this file
    main(sys.argv[1:])
