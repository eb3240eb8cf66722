"""Upload a finished merge to the Hugging Face hub, with its model card and report.

  rtsvm push OUT USER/NAME
  rtsvm push --dry-run OUT USER/NAME

OUT is a folder that `rtsvm merge` wrote. Its files are checked first. The token is that of `hf auth login`, or
HF_TOKEN.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .terminal import say
from .verify import require_output

if TYPE_CHECKING:
    from ..engine import PushResult

HELP = "upload a merge to the Hugging Face hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT", help="folder of a merge")
    parser.add_argument("repository", metavar="USER/NAME", help="model repository; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="list the files, and upload nothing")


def run(arguments: argparse.Namespace) -> int:
    """Upload and print where it is."""
    require_output(arguments.out)
    upload(arguments.out, arguments.repository, private=arguments.private, dry_run=arguments.dry_run)
    return 0


def upload(out: str, repository: str, *, private: bool, dry_run: bool) -> PushResult:
    """Upload a merge, or list what would be uploaded."""
    from ..engine import push_to_hub
    from ..sizes import format_size

    result = push_to_hub(out, repository, private=True if private else None, dry_run=dry_run)
    for name, size in result.files.items() if dry_run else ():
        say(f"{format_size(size):>10}  {name}")
    count = f"{len(result.files)} files, {format_size(sum(result.files.values()))}"
    say(f"{repository}: {count}, nothing was uploaded" if dry_run else f"pushed {count} -> {result.url}")
    return result
