"""Run FusionBench's own TSV-Merge function on a file of task matrices; belongs to its virtual environment.

    python -m benchmarks.peers.fusion_bench_tsvm INPUT.safetensors OUTPUT.safetensors
    python -m benchmarks.peers.fusion_bench_tsvm --serve

INPUT holds `<case>/<t>` for t = 0..T-1, float32 or float64. OUTPUT holds `<case>`, in the dtype of the input;
`OUTPUT.safetensors.json` says which versions made it. With --serve it takes turns with another program that times it:
commands are lines of JSON, each answered by one: ["load", INPUT], ["run"] (seconds of one merge), ["save", OUTPUT].
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

with contextlib.redirect_stdout(io.StringIO()):
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction


def read_cases(source: Path) -> dict[str, list[torch.Tensor]]:
    cases: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in load_file(source).items():
        case, _, task = name.rpartition("/")
        cases[case][int(task)] = tensor
    return {case: [tasks[t] for t in range(len(tasks))] for case, tasks in cases.items()}


def merge(tasks: list[torch.Tensor]) -> torch.Tensor:
    task_vectors = [{"weight": task} for task in tasks]
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        result = compute_and_sum_svd_mem_reduction(task_vectors, accelerator="cpu")
    return result["weight"].to(tasks[0].dtype).contiguous()


def versions() -> dict[str, str]:
    found = {"fusion_bench": version("fusion-bench"), "torch": torch.__version__}
    return found | {"python": platform.python_version()}


def main(source: Path, target: Path) -> None:
    save_file({case: merge(tasks) for case, tasks in read_cases(source).items()}, target)
    Path(f"{target}.json").write_text(json.dumps(versions(), indent=2) + "\n")


def serve() -> None:
    print(json.dumps(versions()), flush=True)
    tasks: list[torch.Tensor] = []
    merged = torch.empty(0)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer: float | None = None
        if command == "load":
            (tasks,) = read_cases(Path(arguments[0])).values()
        elif command == "run":
            start = time.perf_counter()
            merged = merge(tasks)
            answer = time.perf_counter() - start
        else:
            save_file({"case": merged}, arguments[0])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif len(sys.argv) == 3:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
