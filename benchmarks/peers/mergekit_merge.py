"""Merge with mergekit's own functions when told to; belongs to its virtual environment.

    python mergekit_merge.py INPUTS.safetensors

INPUTS holds `base` and `0`, `1`, ... Says its versions in a line of JSON, then answers each line of JSON it reads,
`{"method": ..., "parameters": {...}, "save": path or null, "measure_peak": bool}`, with one: `{"seconds": ...}` or
`{"peak_bytes": ...}`. The result is saved as `merged`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import peak_of

with contextlib.redirect_stdout(sys.stderr):
    from mergekit.merge_methods import merge_tensors


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def main(source: Path) -> None:
    inputs = load_file(source)
    tensors = [inputs["base"], *(inputs[str(t)] for t in range(len(inputs) - 1))]
    names = ("mergekit", "torch")
    say({name: version(name) for name in names} | {"python": platform.python_version()})
    for line in sys.stdin:
        order = json.loads(line)

        def merge(order: dict[str, Any] = order) -> torch.Tensor:
            with torch.no_grad():
                return merge_tensors(tensors, order["method"], parameters=order["parameters"], base_index=0)

        if order["measure_peak"]:
            say({"peak_bytes": peak_of(merge)[1]})
            continue
        start = time.perf_counter()
        merged = merge()
        seconds = time.perf_counter() - start
        if order["save"]:
            save_file({"merged": merged.contiguous()}, order["save"])
        del merged
        say({"seconds": seconds})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
