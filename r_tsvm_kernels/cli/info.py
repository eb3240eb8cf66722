"""Show versions, which kernels run on this machine and why others do not, and the merge methods."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

from .terminal import console, say

HELP = "show versions, backends and merge methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print what is here."""
    facts = _collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _collect() -> dict[str, Any]:
    import torch

    from .. import __version__, backends, dispatch
    from ..methods import METHODS

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "build": backends.build_info(),
        "backends": {name: backends.state(name) for name in ("cpu", "cuda", "triton", "torch")},
        "ops": {
            op: {device: [name for name, _ in dispatch.explain(op, device)] for device in order}
            for op, order in ((op, found.order) for op, found in dispatch.ops().items())
        },
        "chosen": {
            device: {op: dispatch.chosen(op, device) for op in dispatch.ops()}
            for device in ("cpu", *(["cuda"] if gpus else []))
        },
        "methods": {
            name: {
                "pretty_name": method.pretty_name,
                "aliases": list(method.aliases),
                "paper": method.paper_url,
                "parameters": {
                    key: {"default": _default(info.default), "help": info.description}
                    for key, info in method.parameters.model_fields.items()
                },
            }
            for name, method in sorted(METHODS.items())
        },
    }


def _default(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    say(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    say(f"GPUs: {', '.join(facts['gpus']) or 'none that torch sees'}; CPU threads: {facts['threads']}")

    backends = Table(title="Backends")
    for heading in ("backend", "state", "ops it has kernels for", *(f"runs on {device}" for device in facts["chosen"])):
        backends.add_column(heading)
    for name, state in facts["backends"].items():
        ops = [op for op, devices in facts["ops"].items() if any(name in order for order in devices.values())]
        runs = [
            ", ".join(op for op, backend in chosen.items() if backend == name) or "none"
            for chosen in facts["chosen"].values()
        ]
        backends.add_row(name, state, "all (the reference)" if name == "torch" else ", ".join(ops), *runs)
    shown = console()
    shown.print(backends)

    shown.print("\nMerge methods, with their parameters and defaults")
    for name, method in facts["methods"].items():
        also = f" (also {', '.join(method['aliases'])})" if method["aliases"] else ""
        shown.print(Text.assemble("\n", (name, "bold"), f"{also}  {method['pretty_name']}, {method['paper']}"))
        for key, value in method["parameters"].items():
            line = Text.assemble(f"    {key} = {value['default']} ", (value["help"], "dim"))
            shown.print(line, soft_wrap=True)
