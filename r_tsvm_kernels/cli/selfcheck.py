"""Check the kernels of every op on this machine against their references, and time both.

  rtsvm selfcheck                      # on the GPU if there is one
  rtsvm selfcheck --device cpu --op elect_and_sum
  rtsvm selfcheck --json > report.json # for a bug report

On a GPU each kernel is checked by itself before its first use, once: this command checks all of them, again if
need be. The results are stored: a kernel that fails is not used any more. The exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .resources import add_device_argument
from .terminal import say, tell

HELP = "check and time the kernels on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_device_argument(parser)
    parser.add_argument("--op", metavar="NAME", action="append", help="only this op; repeat")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Check the kernels and print what was found; return 1 if one failed."""
    from .. import backends, dispatch, verdicts
    from ..engine import choose_device
    from ..errors import ConfigError
    from ..verdicts.store import as_json, circumstances

    device = choose_device(arguments.device)
    names = arguments.op or sorted(dispatch.ops())
    for name in names:
        if name not in dispatch.ops():
            raise ConfigError(f"--op: no op {name!r}; expected one of {', '.join(sorted(dispatch.ops()))}")
    states = {name: {b: backends.state(b) for b in dispatch.ops()[name].order[device.type]} for name in names}
    kernels = {
        name: [backend for backend, state in found.items() if backend != "torch" and state == backends.READY]
        for name, found in states.items()
    }

    def progress(what: str) -> None:
        if sys.stderr.isatty():
            tell(f"checking {what}")

    reports = []
    for one in verdicts.devices(device.type) if device.index is None else [str(device)]:
        found = verdicts.check(one, kernels, progress)
        reports.append({"circumstances": circumstances(one), "verdicts": as_json(found)})
    facts = {"reports": reports, "states": states}
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        for report in reports:
            _print(report, states)
    failed = any(
        not verdict["passed"] for report in reports for ops in report["verdicts"].values() for verdict in ops.values()
    )
    return 1 if failed else 0


def _print(report: dict[str, Any], states: dict[str, dict[str, str]]) -> None:
    facts, verdicts = report["circumstances"], report["verdicts"]
    say(f"{facts['device']}, capability {facts['capability']}, driver {facts['driver'] or 'none'}")
    say(", ".join(f"{name} {facts[name]}" for name in ("r_tsvm_kernels", "torch", "triton", "python", "sources")))
    say("")
    say(f"{'op':<18}{'kernel':<8}{'self-check':<12}{'cases':>5}{'worst error':>13}{'ms':>10}{'reference':>12}")
    for op, found in states.items():
        for backend in [name for name, state in found.items() if name != "torch" and state == "ready"]:
            say(f"{op:<18}{backend:<8}{_cells(verdicts.get(op, {}), backend)}")
    for op, found in verdicts.items():
        for backend, verdict in found.items():
            if not verdict["passed"]:
                say(f"FAILED: {op}, {backend}: {verdict['reason']}")
    for backend in ("cpu", "cuda", "triton", "cublas"):
        reasons = {found[backend] for found in states.values() if backend in found} - {"ready"}
        for reason in reasons:
            say(f"not checked: {backend}: {reason}")


def _cells(found: dict[str, Any], backend: str) -> str:
    """Return the columns of a kernel: verdict, cases, worst error, time, and its speed relative to the reference."""
    if backend not in found:
        return "not checked: no memory, or no process could start"
    verdict, reference = found[backend], found.get("torch", {}).get("seconds")
    seconds, error = verdict["seconds"], verdict["error"]
    shown = "infinite" if error is None else "none" if error == 0 else f"{error:.1e}"
    times = f"{1e3 * seconds:>10.3g}{f'{reference / seconds:.3g} x':>12}" if seconds and reference else ""
    return f"{'passed' if verdict['passed'] else 'FAILED':<12}{verdict['cases']:>5}{shown:>13}{times}"
