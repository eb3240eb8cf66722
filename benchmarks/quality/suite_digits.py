"""Image classification: the handwritten digits of scikit-learn, each task seeing them transformed in its own way.

Model, base and tasks are those of examples/digits_demo.py: a residual MLP trained on upright digits, and experts for
rotated, mirrored and negative ones. The 1797 images are split anew for each seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.quality.training import Batch, Suite
from examples.digits_demo import CONFIG, TASKS, DigitsMLP

VALIDATION, TEST = 300, 500  # of 1797


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    validation, test, training = order.split([VALIDATION, TEST, len(images) - VALIDATION - TEST])

    def draw(transform: Callable[[Tensor], Tensor]) -> Callable[[], Batch]:
        def batch() -> Batch:
            chosen = training[torch.randint(len(training), (64,), generator=generator)]
            return transform(images[chosen]), labels[chosen]

        return batch

    return Suite(
        model=lambda: DigitsMLP(CONFIG),
        base_batch=draw(lambda upright: upright),
        task_batches={task: draw(transform) for task, transform in TASKS.items()},
        validation={task: (transform(images[validation]), labels[validation]) for task, transform in TASKS.items()},
        test={task: (transform(images[test]), labels[test]) for task, transform in TASKS.items()},
        base_steps=60 if quick else 400,
        expert_steps=40 if quick else 200,
        peak_rate=2e-3,
        expert_rate=2e-3,
    )
