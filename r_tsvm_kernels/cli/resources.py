"""Options that say what a merge may use: the device, threads and memory."""

from __future__ import annotations

import argparse


def add_resource_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the options; more may be added to the group that is returned."""
    group = parser.add_argument_group("how to run")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument(
        "--memory", metavar="SIZE", help="most memory of the whole process, e.g. 8GB (default: no limit)"
    )
    group.add_argument("--device-memory", metavar="SIZE", help="most GPU memory of tensors (default: no limit)")
    return group
