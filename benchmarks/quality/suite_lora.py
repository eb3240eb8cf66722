"""LoRA: low-rank fine-tunes of a base that has seen their domains, at a high rate, merged into dense weights.

Base, domains and scores are those of `light`. The linear layers alone are tuned, by W + B A of rank 8, with A random at
first and B zero; embeddings, biases and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.quality import suite_light
from benchmarks.quality.training import Batch, Suite, train

RANK = 8


class LowRank(nn.Module):
    """Adds a trained matrix of low rank to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """Map (m, n) to the same shape."""
        return weight + self.b @ self.a


def train_low_rank(model: nn.Module, batch: Callable[[], Batch], steps: int, peak_rate: float) -> None:
    """Train low-rank updates of the linear layers alone, and add them to the weights."""
    model.requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    train(model, batch, steps, peak_rate)
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    suite = suite_light.build(seed, quick)
    return replace(suite, expert_steps=4 if quick else 200, expert_rate=7e-3, train_expert=train_low_rank)
