"""Call ``module:function`` or ``file.py:function`` with the path of a model, and print what it returns.

    python -m r_tsvm_kernels.sweep.call module:function MODEL

A sweep runs this in a process of its own, so that a function can be stopped as a command can. Without MODEL it only
looks for the function.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .scores import as_scores


def main(arguments: Sequence[str]) -> None:
    """Call the function; the last line on stdout has its scores."""
    function = find_function(arguments[0])
    if len(arguments) > 1:
        sys.stdout.write(f"\n{json.dumps(as_scores(function(arguments[1])))}\n")


def find_function(name: str) -> Callable[[str], Any]:
    """Return a function by its name.

    Raises:
        ImportError, AttributeError, TypeError: there is no such module or function.
    """
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("evaluation", module)
        if spec is None or spec.loader is None:
            raise ImportError(f"{module} cannot be imported")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        loaded = importlib.import_module(module)
    function: Callable[[str], Any] = getattr(loaded, attribute)
    if not callable(function):
        raise TypeError(f"{name} is no function")
    return function


if __name__ == "__main__":
    main(sys.argv[1:])
