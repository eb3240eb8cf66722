"""Write CLIP vision models, and merge them inside FusionBench; belongs to its virtual environment.

    python -m benchmarks.peers.fusion_bench_clip write FOLDER WIDTH LAYERS TASKS
    python -m benchmarks.peers.fusion_bench_clip merge FOLDER SIDE OUT

`write` saves a base and fine-tunes; ViT-B/32 has the width 768. `merge` takes one SIDE: `theirs`, FusionBench's TSVM;
`accelerated`, the same with our solver under it; `ours`, our `tsvm` as FusionBench's algorithm. It saves the merged
state dict as OUT and prints a line of JSON: seconds and growth of resident memory of the algorithm's `run`, loading of
the models included, and how often our method was called.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import lightning
import torch
from fusion_bench.method import TaskSingularVectorMerging
from fusion_bench.modelpool import CLIPVisionModelPool
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from r_tsvm_kernels.bench import peak_of
from r_tsvm_kernels.integrations import fusion_bench as integration

SEED = 0
SIGNAL_RANK = 16


def task_vector(weight: torch.Tensor) -> torch.Tensor:
    """A strong part of low rank and white noise."""
    delta = 5e-4 * torch.randn(weight.shape)
    if weight.ndim == 2:
        delta += 1e-3 * torch.randn(weight.shape[0], SIGNAL_RANK) @ torch.randn(SIGNAL_RANK, weight.shape[1])
    return delta


def write(folder: Path, width: int, layers: int, tasks: int) -> None:
    torch.manual_seed(SEED)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    model = CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=layers, patch_size=32, **sizes))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "base")
    for task in range(tasks):
        tuned = {name: t + task_vector(t) if t.is_floating_point() else t for name, t in start.items()}
        model.load_state_dict(tuned)
        model.save_pretrained(folder / f"tuned-{task}")


def merge(folder: Path, side: str, out: Path) -> None:
    paths = {"_pretrained_": str(folder / "base")}
    paths |= {path.name: str(path) for path in sorted(folder.glob("tuned-*"))}
    pool = CLIPVisionModelPool(paths)
    if side == "accelerated":
        integration.install()
    algorithm = integration.MergeAlgorithm("tsvm") if side == "ours" else TaskSingularVectorMerging(alpha=1)
    algorithm.fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def run() -> float:
        began = time.perf_counter()
        run.merged = algorithm.run(pool)
        return time.perf_counter() - began

    with contextlib.redirect_stdout(io.StringIO()):
        seconds, peak = peak_of(run)
    save_file({name: t.contiguous() for name, t in run.merged.state_dict().items()}, out)
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "calls": integration.calls().get("tsvm", 0)}))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]), *map(int, sys.argv[3:6]))
        print(json.dumps({name: version(name) for name in ("fusion-bench", "torch", "transformers", "lightning")}))
    else:
        merge(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
