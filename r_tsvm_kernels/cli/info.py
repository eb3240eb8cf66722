"""Show versions, which kernels run on this machine and why others do not, and the merge methods.

  rtsvm info
  rtsvm info ties

METHOD shows one method: its parameters with defaults, its formula and its paper.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from .terminal import say

if TYPE_CHECKING:
    from ..methods import Method

HELP = "show versions, backends and merge methods"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("method", metavar="METHOD", nargs="?", help="show this merge method")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print the versions and backends of this machine, or a method."""
    if arguments.method is not None:
        from ..methods import get_method

        method = get_method(arguments.method)
        facts = _method_facts(method)
    else:
        facts = _collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif arguments.method is not None:
        _print_method(method.name, facts)
    else:
        _print(facts)
    return 0


def _collect() -> dict[str, Any]:
    import torch

    from .. import __version__, backends, dispatch, verdicts
    from ..methods import METHODS
    from ..verdicts.store import as_json

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if gpus else [])]
    return {
        "versions": {"r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "build": backends.build_info(),
        "backends": {name: backends.state(name) for name in ("cpu", "cuda", "triton", "cublas", "torch")},
        "ops": {
            op: {device: [name for name, _ in dispatch.explain(op, device)] for device in order}
            for op, order in ((op, found.order) for op, found in dispatch.ops().items())
        },
        "chosen": {
            device: {op: dispatch.chosen(op, device, check=False) for op in dispatch.ops()} for device in devices
        },
        "selfcheck": "on" if verdicts.enabled() else "off",
        "verdicts": {device: as_json({op: verdicts.known(op, device) for op in dispatch.ops()}) for device in devices},
        "methods": {name: _method_facts(method) for name, method in sorted(METHODS.items())},
    }


def _method_facts(method: Method) -> dict[str, Any]:
    module = sys.modules[method.run.__module__]
    return {
        "pretty_name": method.pretty_name,
        "aliases": list(method.aliases),
        "paper": method.paper_url,
        "formula": (module.__doc__ or "").strip().replace("::\n", ":\n").replace("``", "").replace("`", ""),
        "tasks": method.tasks,
        "parameters": {
            key: {
                "default": _default(info.default),
                "help": info.description,
                "aliases": [alias for alias, field in method.parameters.names().items() if field == key != alias],
                "per_model": method.parameters.is_per_model(key),
            }
            for key, info in method.parameters.model_fields.items()
        },
    }


def _default(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def _print(facts: dict[str, Any]) -> None:
    say(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    say(f"GPUs: {', '.join(facts['gpus']) or 'none that torch sees'}; CPU threads: {facts['threads']}")
    say("")
    say("Backends")
    for name, state in facts["backends"].items():
        say(f"  {name:<8}{state}")
    devices = list(facts["chosen"])
    say("")
    say("Kernels of each op; * runs here: on a CPU the first, on a GPU the fastest")
    for op, orders in sorted(facts["ops"].items()):
        cells = []
        for device, names in orders.items():
            chosen = facts["chosen"].get(device, {}).get(op)
            cells.append(f"{device}: {', '.join(name + '*' * (name == chosen) for name in names)}")
        say(f"  {op:<20}{cells[0]:<20}{'  '.join(cells[1:])}".rstrip())
    for device in devices:
        for line in _self_checks(device, facts):
            say(f"  {line}")
    say("")
    say("Merge methods; `rtsvm info METHOD` has parameters, formula and paper")
    for line in textwrap.wrap(", ".join(facts["methods"]), 76):
        say(f"  {line}")


def _self_checks(device: str, facts: dict[str, Any]) -> list[str]:
    """Return what is known of the kernels on a type of device; on a CPU, which needs no checks, what is stored."""
    if facts["selfcheck"] == "off":
        return ["Self-checks are off (RTSVM_SELFCHECK=off): references only."] if device == "cuda" else []
    passed, failed, missing = 0, list[str](), 0
    for op, orders in sorted(facts["ops"].items()):
        for backend in [name for name in orders[device] if name != "torch" and facts["backends"][name] == "ready"]:
            verdict = facts["verdicts"][device][op].get(backend)
            passed += bool(verdict and verdict["passed"])
            missing += verdict is None
            failed += [f"  failed: {op}, {backend}: {verdict['reason']}"] if verdict and not verdict["passed"] else []
    if device == "cpu" and not passed and not failed:
        return []
    later = f", {missing} not checked yet (rtsvm selfcheck --device {device})" if missing else ""
    return [f"Self-checks on {device}: {passed} kernels passed, {len(failed)} failed{later}", *failed]


def _wrapped(text: str) -> list[str]:
    """Return the lines of a docstring for a narrow terminal: prose is wrapped, and indented formulas stay whole."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        formula = paragraph.startswith("  ") and " = " in paragraph
        items = paragraph.splitlines() if formula else re.split(r"\n(?=\d\. )", paragraph)
        for item in items:
            lines += [f"  {item.strip()}"] if formula else textwrap.wrap(" ".join(item.split()), 79)
    return lines


def _print_method(name: str, facts: dict[str, Any]) -> None:
    also = f", also {', '.join(facts['aliases'])}" if facts["aliases"] else ""
    say(f"{name}{also}: {facts['pretty_name']}, {facts['paper']}")
    for line in _wrapped(facts["formula"]):
        say(line)
    say("")
    say("parameters, with their defaults; * may differ between the models of a recipe")
    for key, value in facts["parameters"].items():
        first = f"  {'/'.join([key, *value['aliases']])}{'*' * value['per_model']} = {value['default']}".ljust(28)
        for line in textwrap.wrap(value["help"] or "", 79, initial_indent=f"{first} ", subsequent_indent=" " * 29):
            say(line)
    say("")
    say("example")
    say(f"  rtsvm merge --base B --model A{'' if facts['tasks'] == 1 else ' --model C'} --method {name} OUT")
    say(f'  merge_tensors(base, tuned, "{name}")  # in Python')
