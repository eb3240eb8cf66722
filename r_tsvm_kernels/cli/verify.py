"""Check that a merged model is still what was written, byte for byte, by the checksums in its journal.

  rtsvm verify OUT
  rtsvm verify --inputs OUT

OUT is a folder or .safetensors file that `rtsvm merge` wrote. With --inputs the models it was made from are read
again as well. Exit codes: 0 all is as it was, 1 something differs or cannot be read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

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
    """Check and say what differs."""
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
    verdict = "are as they were written" if found.ok else "were checked: the output is NOT what was written"
    if found.inputs_changed and not (found.missing or found.extra or found.changed):
        verdict = "are as they were written, but inputs are not what they were"
    say(f"{arguments.out}: {found.tensors} tensors {verdict}")
    return 0 if found.ok else 1
