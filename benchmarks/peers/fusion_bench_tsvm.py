"""Run FusionBench's own TSV-Merge function on a file of task matrices; belongs to its virtual environment.

    python fusion_bench_tsvm.py INPUT.safetensors OUTPUT.safetensors

INPUT holds `<case>/<t>` for t = 0..T-1, float32 or float64. OUTPUT holds `<case>`, in the dtype of the input;
`OUTPUT.safetensors.json` says which versions made it.
"""

from __future__ import annotations

import contextlib
import io
import json
import platform
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

with contextlib.redirect_stdout(io.StringIO()):
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction


def main(source: Path, target: Path) -> None:
    cases: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in load_file(source).items():
        case, _, task = name.rpartition("/")
        cases[case][int(task)] = tensor

    merged = {}
    for case, tasks in cases.items():
        task_vectors = [{"weight": tasks[t]} for t in range(len(tasks))]
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            result = compute_and_sum_svd_mem_reduction(task_vectors, accelerator="cpu")
        merged[case] = result["weight"].to(tasks[0].dtype).contiguous()

    save_file(merged, target)
    versions = {
        "fusion_bench": version("fusion-bench"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    Path(f"{target}.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
