"""Train a base and three experts, merge the experts with four methods, and compare the results; no network needed.

A small residual MLP learns to read the 8x8 handwritten digits that come with scikit-learn. Three copies of it are then
fine-tuned on transformed digits: rotated by 90 degrees, mirrored, or negative. Each expert is good at its own task and
poor at the other two. `rtsvm merge` merges them, and a table compares all models on digits that none was trained on.

    python examples/digits_demo.py            # less than a minute on two CPU cores
    python examples/digits_demo.py --quick    # far less training, for tests; importing torch takes most of the time

Also writes the figures of the table to results.json, beside the models.

Needs scikit-learn: pip install ".[demo]".
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from r_tsvm_kernels.bench import Results, row

MARKER = "made_by_digits_demo"  # this file marks a folder that the demo may remove
TEST_DIGITS = 500  # of 1797

# Every task has the same ten classes in other images. Images are (n, 8, 8), from -1 (paper) to 1 (ink).
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda images: images.rot90(1, (1, 2)),
    "mirrored": lambda images: images.flip(2),
    "negative": lambda images: -images,
}

# Folder, label in the table, arguments of `rtsvm merge`: defaults, except for the usual scale of task arithmetic.
MERGES: list[tuple[str, str, list[str]]] = [
    ("linear", "linear", ["--method", "linear"]),
    ("task_arithmetic", "task_arithmetic (alpha=0.4)", ["--method", "task_arithmetic", "--set", "alpha=0.4"]),
    ("tsvm", "tsvm", ["--method", "tsvm"]),
    ("rtsvm", "rtsvm", ["--method", "rtsvm"]),
]

CONFIG: dict[str, str | int] = {
    "model_type": "digits-mlp",
    "num_pixels": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_labels": 10,
    "torch_dtype": "float32",
}


class Block(nn.Module):
    """A residual block, as in a transformer but without attention."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, intermediate)
        self.down = nn.Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, hidden) to (n, hidden)."""
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class DigitsMLP(nn.Module):
    """The model that CONFIG describes."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.embed = nn.Linear(config["num_pixels"], hidden)
        self.blocks = nn.Sequential(
            *(Block(hidden, config["intermediate_size"]) for _ in range(config["num_hidden_layers"]))
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, config["num_labels"])

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, 8, 8) to logits (n, 10)."""
        return self.head(self.norm(self.blocks(self.embed(images.flatten(1)))))


def train(model: DigitsMLP, images: Tensor, labels: Tensor, steps: int) -> None:
    peak_rate = 2e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        loss = functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def save(model: DigitsMLP, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> DigitsMLP:
    model = DigitsMLP(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@torch.no_grad()
def accuracy(model: DigitsMLP, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of digits read correctly."""
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def merge(base: Path, experts: list[Path], arguments: list[str], out: Path) -> None:
    """Merge through the command line; if it fails, show why and stop with its exit code."""
    models = [part for expert in experts for part in ("--model", str(expert))]
    # `linear` would count the base as one more model.
    start = [] if "linear" in arguments else ["--base", str(base)]
    command = ["merge", *start, *models, *arguments, "--quiet", str(out)]
    result = subprocess.run([sys.executable, "-m", "r_tsvm_kernels", *command], capture_output=True, text=True)
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr, end="")
        sys.exit(result.returncode)


def make_output_folder(out: Path) -> None:
    """Make the folder again; refuse to remove one that this demo did not make."""
    if out.is_symlink() or out.exists():
        if out.is_symlink() or not (out / MARKER).is_file():
            sys.exit(f"{out} exists and was not made by this demo; remove it or choose another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def results_table(rows: list[tuple[str, list[float]]], section_ends: set[str], seed: int) -> Table:
    table = Table(
        title=f"Accuracy in % on {TEST_DIGITS} held-out digits, seed {seed}",
        caption="Differences of two or three points may be noise.",
    )
    table.add_column("model")
    for column in [*TASKS, "mean"]:
        table.add_column(column, justify="right")
    for label, scores in rows:
        values = [*scores, sum(scores) / len(scores)]
        table.add_row(label, *(f"{value:.1f}" for value in values), end_section=label in section_ends)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune three models on scikit-learn's digits, then merge them.")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for all models (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="train far less, for tests")
    options = parser.parse_args()

    make_output_folder(options.out)
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # matrices so small gain nothing from a second thread

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    test, training = torch.randperm(len(images)).split([TEST_DIGITS, len(images) - TEST_DIGITS])
    base_steps, expert_steps = (80, 60) if options.quick else (400, 200)

    print("Training the base on upright digits ...")
    base_folder = options.out / "base"
    base = DigitsMLP(CONFIG)
    train(base, images[training], labels[training], base_steps)
    save(base, base_folder)
    print(f"It reads {accuracy(base, images[test], labels[test]):.1f} % of the held-out upright digits.")

    expert_folders = []
    for task, transform in TASKS.items():
        print(f"Fine-tuning an expert on {task} digits ...")
        expert = load(base_folder)
        train(expert, transform(images[training]), labels[training], expert_steps)
        expert_folders.append(options.out / f"expert_{task}")
        save(expert, expert_folders[-1])

    models = [("base", base_folder)]
    models += [(f"expert: {task}", folder) for task, folder in zip(TASKS, expert_folders, strict=True)]
    section_ends = {models[0][0], models[-1][0]}
    for name, label, arguments in MERGES:
        print(f"Merging the experts with {name} ...")
        merge(base_folder, expert_folders, arguments, options.out / name)
        models.append((label, options.out / name))

    rows = []
    for label, folder in models:
        model = load(folder)  # from disk: what is measured is what was written
        rows.append((label, [accuracy(model, task(images[test]), labels[test]) for task in TASKS.values()]))
    Console().print(results_table(rows, section_ends, options.seed))
    seconds = time.perf_counter() - start
    run = {"seed": options.seed, "quick": options.quick}
    results = Results(options.out / "results.json", replace=True)
    results.add([row("demo", "digits_demo", "time", round(seconds, 1), options=run)])
    results.add(
        row(label, "digits_demo", "accuracy", value, unit="%", dtype="float32", options=run | {"task": task})
        for label, values in rows
        for task, value in zip(TASKS, values, strict=True)
    )
    print("Merged models:")
    for name, _, _ in MERGES:
        print(f"  {name:<16} {options.out / name}")
    print(f"Open {options.out / 'rtsvm' / 'merge_report.html'} in a browser for the report of a merge.")
    print(f"Done in {seconds:.0f} seconds.")


if __name__ == "__main__":
    main()
