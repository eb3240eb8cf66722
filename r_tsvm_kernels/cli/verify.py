"""Check that a merged model is still what was written, byte for byte, by the checksums in its journal.

  rtsvm verify OUT
  rtsvm verify --inputs OUT

OUT is a folder or .safetensors file that `rtsvm merge` wrote. --inputs also reads the models that were merged. Exit
codes: 0 nothing has changed, 1 something differs or cannot be read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..errors import CheckpointError
from .terminal import say

HELP = "check a merged model against its journal"

# Names printed per kind of difference.
_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT", help="output of a merge")
    parser.add_argument("--inputs", action="store_true", help="also check the models it was made from")
    parser.add_argument("--allow-pickle", action="store_true", help="read inputs that are pickled (tensors only)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Check and print what differs."""
    require_output(arguments.out)

    from ..engine import verify_output

    found = verify_output(arguments.out, inputs=arguments.inputs, allow_pickle=arguments.allow_pickle)
    if arguments.json:
        print(json.dumps({"ok": found.ok, **asdict(found)}, indent=2))
        return 0 if found.ok else 1
    for what, names in (
        ("missing", found.missing),
        ("not in the journal", found.extra),
        ("changed", found.changed),
        ("input changed", found.inputs_changed),
    ):
        for name in names[:_SHOWN]:
            say(f"{what}: {name}")
        if len(names) > _SHOWN:
            say(f"{what}: {len(names) - _SHOWN} more")
    changed = found.missing or found.extra or found.changed
    verdict = "were checked: the output is NOT what was written" if changed else "are as they were written"
    if arguments.inputs:
        verdict += "; the inputs have changed" if found.inputs_changed else "; the inputs have not changed"
    say(f"{arguments.out}: {found.tensors} tensors {verdict}")
    return 0 if found.ok else 1


def require_output(out: str) -> None:
    """Require that the output exists.

    Raises:
        CheckpointError: it does not.
    """
    if not Path(out).exists():
        raise CheckpointError(f"{out}: no such folder or file; expected the output of a merge")
