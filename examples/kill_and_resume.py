"""Kill a merge, resume it, and compare its bytes with those of a merge that was not disturbed.

Writes a base and two fine-tunes of random weights, merges them once, merges them again with `kill -9` after some
tensors, resumes, and compares the two outputs byte by byte. Memory stays at a fraction of the models' size.

    python examples/kill_and_resume.py                  # models of 256 MB each, in a temporary folder
    python examples/kill_and_resume.py --layers 4       # smaller
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from r_tsvm_kernels import verify_output

ROWS, COLUMNS = 2048, 1024


def write_model(folder: Path, layers: int, seed: int, base: Path | None = None) -> Path:
    """Write a folder with one shard per layer, so that no model is ever in memory whole."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for layer in range(layers):
        names = [f"model.layers.{layer}.mlp.{kind}.weight" for kind in ("up_proj", "gate_proj")]
        shard = f"model-{layer:05}.safetensors"
        tensors = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in names}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}\n")
    return folder


def command(models: list[Path], out: Path, *options: str) -> list[str]:
    base, *tuned = models
    tuned_options = [part for model in tuned for part in ("--model", str(model))]
    method = ["--method", "ties", "--set", "density=0.2"]
    merge = ["merge", "--base", str(base), *tuned_options, *method, "--shard-size=32MB", "--quiet", *options, str(out)]
    return [sys.executable, "-m", "r_tsvm_kernels", *merge]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors*")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a merge, resume it, compare the bytes.")
    parser.add_argument("--layers", type=int, default=16, help="of 16 MB each (%(default)s)")
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = [write_model(folder / f"model{seed}", layers, seed) for seed in range(3)]
        size = sum(len(shard) for shard in shards(models[0]).values())
        print(f"Three models of {size / 1e6:.0f} MB.")

        subprocess.run(command(models, folder / "undisturbed"), check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"Merged undisturbed; peak memory {peak / 1e6:.0f} MB, Python and torch included.")

        stopped = folder / "stopped"
        running = subprocess.Popen(command(models, stopped))
        journal = folder / ".stopped.partial" / "merge_journal.jsonl"
        while running.poll() is None and not journal.exists():
            time.sleep(0.001)
        running.send_signal(signal.SIGKILL)
        running.wait()
        print(f"Killed; {'finished before that' if stopped.exists() else 'no output under its name'}.")

        if not stopped.exists():
            subprocess.run(command(models, stopped, "--resume"), check=True)
        same = shards(stopped) == shards(folder / "undisturbed")
        intact = verify_output(stopped).ok
        print(f"Resumed: {'the same bytes' if same else 'OTHER BYTES'}, checksums {'right' if intact else 'WRONG'}.")
        sys.exit(0 if same and intact else 1)


if __name__ == "__main__":
    main()
