"""Merge a whole model of Mistral-7B's shapes with `rtsvm merge` on a GPU: seconds, device memory, host memory.

    python -m benchmarks.model_merge [--layers 4] [--folder DIR] [--output DIR] [--out DIR] [--dry-run]

A base and three fine-tunes in bfloat16 are written to `--folder`, their merges to `--output`, and all are deleted at
the end. One layer is 0.44 GB, embedding and head 0.52 GB: 12 of the 32 layers are 5.8 GB a model, 29 GB with the
output; all 32 take 58 GB, which a folder in memory such as /dev/shm may hold where the disk does not, and 14.5 GB for
the output. Each number of `--layers` is merged by task arithmetic, with and without `--device-memory`. It is also
merged by R-TSVM (density 0.3, embedding and head by mean): with solver `products` with and without the limit, with
solver `eigen` within the limit. The kernels that run are those whose self-check passed.

Writes `model.json`: wall time of the command; of the merge alone, as its report states it; the sum of the computing
times of all tensors; peak host memory of all processes, mapped files included; peak device memory in use, as the driver
sees it, minus what was in use before. With `--dry-run` tiny models on the CPU; such figures mean nothing.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.gpu import TASKS, Suite, arguments_of, suite_of
from benchmarks.program import run_measured
from benchmarks.synthetic_checkpoints import Family, checkpoint_bytes, family_of_shapes, mistral_shapes, warm
from r_tsvm_kernels.bench import Row, row

RTSVM = ["--method", "rtsvm", "--set", "density=0.3", "--set", 'exclude_keys=["*embed_tokens*", "lm_head*"]']
METHODS = {
    "task_arithmetic": ["--method", "task_arithmetic", "--set", "alpha=0.4"],
    "rtsvm products": [*RTSVM, "--set", "solver=products"],
    "rtsvm eigen": [*RTSVM, "--set", "solver=eigen"],
}
# Whether each is merged within a given device memory. The references of solver `products` need more than 6 GB; the
# slowest is last.
BOUNDED = {"task_arithmetic": (False, True), "rtsvm products": (False, True), "rtsvm eigen": (True,)}
SAMPLE_SECONDS = 0.02


class DevicePeak:
    """The largest memory in use on the device while a block runs, minus what was in use before; in `bytes`."""

    bytes: int | None = None


@contextmanager
def device_peak(device: torch.device) -> Iterator[DevicePeak]:
    found = DevicePeak()
    if device.type != "cuda":
        yield found
        return
    done = threading.Event()
    free = torch.cuda.mem_get_info()[0]
    lowest = [free]

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            lowest.append(min(lowest.pop(), torch.cuda.mem_get_info()[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.bytes = free - lowest[0]


def command(models: Family, method: str, out: Path, device: str, budget: str | None) -> list[str]:
    inputs = ["--base", str(models.base), *(word for model in models.tuned for word in ("--model", str(model)))]
    limit = [] if budget is None else ["--device-memory", budget]
    return [
        sys.executable, "-m", "r_tsvm_kernels", "merge", *inputs, *METHODS[method], "--device", device,
        *limit, "--quiet", str(out),
    ]  # fmt: skip


def measure(suite: Suite, models: Family, output: Path, layers: int, method: str, budget: str | None) -> list[Row]:
    out = output / "rtsvm-merged"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped
    warm(models.files)
    options = {
        "layers": layers, "device_memory": budget, "checkpoint": f"{models.checkpoint_bytes / 1e9:.1f} GB",
        "tasks": TASKS,
    }  # fmt: skip
    name, case = f"merge {method}", {"dtype": "bfloat16", "options": options}
    try:
        with device_peak(suite.device) as device:
            run = run_measured(command(models, method, out, suite.device.type, budget))
        report = json.loads((out / "merge_report.json").read_text())
    except RuntimeError as error:  # a loss is a result
        reason = str(error)[-600:]
        return [row(name, "rtsvm merge", "time", None, notes={"status": "failed", "reason": reason}, **case)]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    tensors = report["tensors"].values()
    moved = report["bytes_read"] + report["bytes_written"]
    escalated = sum(bool((tensor["certificate"] or {}).get("escalations")) for tensor in tensors)
    computing = sum(tensor["seconds"] for tensor in tensors)
    return [
        row(name, "rtsvm merge", "time", run.seconds, notes={"escalated": escalated}, **case),
        row(name, "rtsvm merge, started", "time", report["seconds"], **case),
        row(name, "rtsvm merge, computing", "time", computing, **case),
        row(name, "rtsvm merge, started", "rate", moved / report["seconds"], **case),
        row(name, "rtsvm merge", "memory", run.peak_bytes, **case),
        row(name, "rtsvm merge", "device memory", device.bytes, unit="B", **case),
    ]


def main() -> None:
    parser = arguments_of(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    parser.add_argument("--output", type=Path, help="where the merged models are written; by default beside the others")
    parser.add_argument("--device-memory", default="6GB", help="of the merges that are bounded")
    suite, options = suite_of("model.json", parser)
    shapes = mistral_shapes(shrink=128 if suite.dry else 1)
    output = options.output or options.folder
    beside = output.stat().st_dev == options.folder.stat().st_dev
    for layers in [1] if suite.dry else options.layers:
        start = time.perf_counter()
        with family_of_shapes(options.folder, shapes, layers, TASKS, outputs=int(beside)) as models:
            print(f"{layers} layers, {checkpoint_bytes(shapes, layers) / 1e9:.2f} GB a model: "
                  f"written in {time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
            for method in METHODS:
                # On a CPU there is no device memory to bound.
                for bounded in (False,) if suite.dry else BOUNDED[method]:
                    budget = options.device_memory if bounded else None
                    suite.add(measure(suite, models, output, layers, method, budget))


if __name__ == "__main__":
    sys.exit(main())
