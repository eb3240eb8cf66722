"""Classification of table rows: a residual MLP, a base trained on six tables and experts for four other ones.

Each table has its own centre, around which its rows are scattered in 32 features. Its own random network gives the ten
classes; the outputs are standardised, so that classes are about equally frequent. All data are generated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.quality.training import Batch, Suite
from examples.digits_demo import DigitsMLP

FEATURES, CLASSES, SOURCES, TASKS = 32, 10, 6, 4
CONFIG: dict[str, str | int] = {
    "num_pixels": FEATURES,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_labels": CLASSES,
}


def make_table(generator: torch.Generator) -> Callable[[int, torch.Generator], Batch]:
    """Make a table at random; it returns as many rows and labels as it is asked for."""
    centre = 2 * torch.randn(FEATURES, generator=generator)
    first = torch.randn(FEATURES, 8, generator=generator) / FEATURES**0.5
    second = torch.randn(8, CLASSES, generator=generator)

    def outputs(rows: Tensor) -> Tensor:
        return torch.tanh(2 * rows @ first) @ second

    usual = outputs(torch.randn(4000, FEATURES, generator=generator))

    def draw(count: int, stream: torch.Generator) -> Batch:
        rows = torch.randn(count, FEATURES, generator=stream)
        labels = ((outputs(rows) - usual.mean(0)) / usual.std(0)).argmax(1)
        return centre + rows, labels

    return draw


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    generators = [torch.Generator().manual_seed(1000 * seed + stream) for stream in range(4)]
    sources = [make_table(generators[0]) for _ in range(SOURCES)]
    tasks = {f"table {index + 1}": make_table(generators[0]) for index in range(TASKS)}

    def base_batch() -> Batch:
        parts = [table(24, generators[1]) for table in sources]
        return torch.cat([rows for rows, _ in parts]), torch.cat([labels for _, labels in parts])

    return Suite(
        model=lambda: DigitsMLP(CONFIG),
        base_batch=base_batch,
        task_batches={name: lambda table=table: table(64, generators[1]) for name, table in tasks.items()},
        validation={name: table(300, generators[2]) for name, table in tasks.items()},
        test={name: table(1000, generators[3]) for name, table in tasks.items()},
        base_steps=60 if quick else 600,
        expert_steps=40 if quick else 300,
        peak_rate=3e-3,
        expert_rate=2e-3,
    )
