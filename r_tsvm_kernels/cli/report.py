"""Write the page of a merge again, merge_report.html, from the merge_report.json beside it.

  rtsvm report OUT

OUT is a folder or .safetensors file that `rtsvm merge` wrote. The page is one file; a browser opens it from disk.
"""

from __future__ import annotations

import argparse

from .terminal import say
from .verify import require_output

HELP = "write the page of a merge again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT", help="output of a merge")


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print where it is."""
    require_output(arguments.out)

    from ..engine import write_page

    say(write_page(arguments.out))
    return 0
