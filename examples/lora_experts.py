"""How small can an expert be? Extract LoRA adapters from fine-tunes, merge them, and measure what is lost.

The experts are those of digits_demo.py, which runs first if its models are missing. Each expert becomes an adapter at
several ranks; TSV-Merge merges the adapters without forming a dense update. The table compares accuracies on digits
that no model was trained on, and sizes on disk.

    python examples/lora_experts.py                        # uses or makes demo_output
    python examples/lora_experts.py --models demo --ranks 2 8 --quick

Needs scikit-learn: pip install ".[demo]".
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from digits_demo import MARKER, TASKS, TEST_DIGITS, accuracy, load
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from r_tsvm_kernels import MergeConfig, extract_lora, merge_lora, merge_state_dicts
from r_tsvm_kernels.lora import Adapter


def held_out(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the digits that digits_demo.py does not train on, with this seed."""
    torch.manual_seed(seed)
    digits = load_digits()
    test = torch.randperm(len(digits.images))[:TEST_DIGITS]
    return torch.tensor(digits.images, dtype=torch.float32)[test] / 8 - 1, torch.tensor(digits.target)[test]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def with_adapter(base: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """The base's weights plus what the adapter says; PEFT does the same when it merges an adapter."""
    adapter = Adapter(folder)
    updates = {module.weight_name: adapter.load(name).dense() for name, module in adapter.modules.items()}
    return {name: weight + updates.get(name, 0) for name, weight in base.items()}


def scores(
    base_folder: Path, weights: dict[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor
) -> list[str]:
    """Accuracy in % per task, and the mean."""
    model = load(base_folder)
    model.load_state_dict(weights)
    found = [accuracy(model, task(images), labels) for task in TASKS.values()]
    return [f"{value:.1f}" for value in [*found, sum(found) / len(found)]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn experts into LoRA adapters and merge those.")
    parser.add_argument("--models", type=Path, default=Path("demo_output"), help="models of the demo (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32], help="ranks of the adapters (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="train far less, for tests")
    options = parser.parse_args()

    if not (options.models / MARKER).exists():
        demo = [sys.executable, str(Path(__file__).with_name("digits_demo.py")), "--out", str(options.models)]
        subprocess.run(demo + ["--quick"] * options.quick, check=True)
    base_folder = options.models / "base"
    experts = [options.models / f"expert_{task}" for task in TASKS]
    base, tuned = load_file(base_folder / "model.safetensors"), [load_file(f / "model.safetensors") for f in experts]
    images, labels = held_out()

    table = Table(title="Three experts, merged by TSV-Merge", caption="Biases and norms are not part of the adapters.")
    for column in ("experts", "size of one", *TASKS, "mean"):
        table.add_column(column, justify="left" if column == "experts" else "right")
    dense = merge_state_dicts(base, tuned, MergeConfig("tsvm")).state_dict
    size = f"{size_of(experts[0]) / 1e3:.0f} kB"
    table.add_row("whole models", size, *scores(base_folder, dense, images, labels), end_section=True)
    with tempfile.TemporaryDirectory() as scratch:
        for rank in options.ranks:
            folders = [Path(scratch, f"{expert.name}-{rank}") for expert in experts]
            for expert, folder in zip(experts, folders, strict=True):
                extract_lora(str(base_folder), str(expert), folder, rank=rank, embed_lora=True)
            merged = Path(scratch, f"merged-{rank}")
            merge_lora([str(folder) for folder in folders], merged, method="tsvm")
            size = f"{size_of(folders[0]) / 1e3:.0f} kB"
            row = scores(base_folder, with_adapter(base, merged), images, labels)
            table.add_row(f"adapters of rank {rank}", size, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
