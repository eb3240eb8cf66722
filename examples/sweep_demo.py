"""Sweep over the parameters of merges: choose them on validation digits, and see what they are worth on test digits.

Trains a base and three experts on scikit-learn's handwritten digits, as digits_demo.py does. Then it merges the experts
by task arithmetic and by TSV-Merge with many scales and weights, evaluates each merge on digits that are for this
alone, and keeps the best. At the end it compares the best with the defaults on other digits, which neither the training
nor the sweeps have seen.

    python examples/sweep_demo.py            # some two minutes on two CPU cores
    python examples/sweep_demo.py --quick    # far less training and fewer candidates, for tests

`validate` is also an evaluation for the command line, as in `rtsvm sweep ... --eval examples/sweep_demo.py:validate`.

Needs scikit-learn: pip install ".[demo]".
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

from r_tsvm_kernels import MergeConfig, merge_checkpoints, sweep_checkpoints

sys.path.insert(0, str(Path(__file__).resolve().parent))
from digits_demo import CONFIG, TASKS, DigitsMLP, accuracy, load, make_output_folder, save, train

METHODS = ("task_arithmetic", "tsvm")
SPLITS = {"train": 897, "validation": 400, "test": 500}  # digits, in a fixed order


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images and labels of one split, upright."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    chosen = dict(zip(SPLITS, order.split(list(SPLITS.values())), strict=True))[split]
    return (torch.tensor(data.images, dtype=torch.float32) / 8 - 1)[chosen], torch.tensor(data.target)[chosen]


def scores(model: Path, split: str) -> dict[str, float]:
    """Return the percentages of digits that a model reads correctly: the mean over the tasks, and each."""
    images, labels = digits(split)
    loaded = load(Path(model))
    found = {task: accuracy(loaded, transform(images), labels) for task, transform in TASKS.items()}
    return {"mean": sum(found.values()) / len(found), **found}


def validate(model: Path) -> dict[str, float]:
    """Evaluate a candidate of a sweep."""
    return scores(model, "validation")


def train_all(out: Path, quick: bool) -> None:
    """Train the base and the experts."""
    torch.manual_seed(0)
    images, labels = digits("train")
    base_steps, expert_steps = (80, 60) if quick else (400, 200)
    base = DigitsMLP(CONFIG)
    train(base, images, labels, base_steps)
    save(base, out / "base")
    for task, transform in TASKS.items():
        expert = load(out / "base")
        train(expert, transform(images), labels, expert_steps)
        save(expert, out / task)


def sweep(method: str, out: Path, quick: bool) -> dict[str, Path]:
    """Sweep over the parameters of a method; return the folders of the merges with the defaults and with the best."""
    config = MergeConfig(method, base_model=str(out / "base"), models=[str(out / task) for task in TASKS])
    (out / f"{method}.yaml").write_text(config.to_yaml(), encoding="utf-8")
    grids = {"alpha": "0.25:1.25:0.25", **{f"weight.{task}": "1" if quick else "0.75:1.25:0.25" for task in TASKS}}
    result = sweep_checkpoints(config, out / f"sweep_{method}", evaluate=validate, grids=grids)
    spent = sum(trial.merge_seconds for trial in result.ranked)
    print(f"{method}: {result.total} candidates, merged in {spent:.0f} s. Report: {result.page_path}")
    print(f"  best on validation digits: {result.best}")
    merge_checkpoints(config, out / method)
    return {f"{method}, defaults": out / method, f"{method}, best": result.best_path}


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the parameters of a merge on validation data.")
    parser.add_argument("--out", type=Path, default=Path("sweep_output"), help="folder for everything (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="train far less, try less, for tests")
    options = parser.parse_args()
    torch.set_num_threads(1)

    make_output_folder(options.out)
    print("Training a base and three experts ...")
    train_all(options.out, options.quick)
    print("Sweeping ...")
    rows = {"base": options.out / "base"}
    for method in METHODS:
        rows |= sweep(method, options.out, options.quick)

    table = Table(title=f"Accuracy in % on {SPLITS['test']} test digits")
    table.add_column("model")
    for column in ("mean", *TASKS, "validation: mean"):
        table.add_column(column, justify="right")
    for name, folder in rows.items():
        values = [*scores(folder, "test").values(), validate(folder)["mean"]]
        table.add_row(name, *(f"{value:.1f}" for value in values))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
