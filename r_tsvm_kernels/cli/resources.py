"""Options that say what a merge may use: the device, kernels, threads and memory."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..sizes import parse_size

if TYPE_CHECKING:
    import torch

BACKENDS = ("torch", "cpu", "cuda", "triton", "cublas")


def size(text: str) -> str:
    """Return a size such as ``8GB`` as it is given; argparse names the option if it is none."""
    try:
        parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_device_argument(group: argparse._ActionsContainer) -> None:
    """Declare where to compute."""
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")


def add_resource_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the options; more may be added to the group that is returned."""
    group = parser.add_argument_group("how to run")
    add_device_argument(group)
    group.add_argument(
        "--backend",
        metavar="B",
        action="append",
        default=[],
        help=f"{', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}: the kernels of every op that has such; OP=B for one op; "
        "repeat (default: see `rtsvm info`)",
    )
    group.add_argument("--threads", type=int, metavar="N", help="tensors merged at a time (default: one per core)")
    group.add_argument(
        "--memory", type=size, metavar="SIZE", help="memory limit of the whole process, e.g. 8GB (default: none)"
    )
    group.add_argument(
        "--device-memory", type=size, metavar="SIZE", help="limit of the GPU memory of the process (default: none)"
    )
    return group


def chosen_backends(given: list[str], device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which the kernels of `--backend` run.

    Raises:
        ConfigError: two backends for all ops.
        BackendUnavailableError: no such backend or op, or it cannot run on the device.
    """
    import torch

    from .. import dispatch

    for_all = [item for item in given if "=" not in item]
    if len(for_all) > 1:
        raise ConfigError(f"--backend: one backend for all ops, got {' and '.join(for_all)}; for one op write OP=B")
    per_op = dict(item.split("=", 1) for item in given if "=" in item)
    if given:
        with dispatch.use_backend(*for_all, **per_op):
            dispatch.prepare(dispatch.forced_backends(), device.type)
            for op in dispatch.forced_backends():  # refuse what cannot run before anything is read
                dispatch.select(op, torch.empty(0, device=device))
    return dispatch.use_backend(*for_all, **per_op)
