"""Suites: their models, the training, and the scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]  # inputs, and targets, each a class; suites with their own scores give them a meaning
StateDict = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

IGNORED = -100  # a target that neither the loss nor a score counts


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over the targets, in nats."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def train(
    model: nn.Module, batch: Callable[[], Batch], steps: int, peak_rate: float, loss: Loss = cross_entropy
) -> None:
    """Train in place; parameters that require no gradient stay as they are."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    for _ in range(steps):
        value = loss(model, batch())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()


def classification(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the accuracy in %, and the cross entropy in bits per target (per byte, for text)."""
    inputs, targets = batch
    hits = (model(inputs).argmax(-1) == targets)[targets != IGNORED]
    return 100 * hits.double().mean().item(), cross_entropy(model, batch).item() / math.log(2)


@dataclass(frozen=True)
class Suite:
    """A base, one fine-tune per task, and held-out data.

    Attributes:
        model: makes an untrained model.
        base_batch: draws a batch for the base.
        task_batches: draw a batch for the expert of each task.
        validation: for each task, the data on which alpha and density are tuned and defaults are chosen. Tasks without
            an expert, which a merge should keep, come last.
        test: for each task, the data of the tables; disjoint from the others.
        base_steps: of training the base.
        expert_steps: of training each expert.
        peak_rate: of learning, for the base; experts take `expert_rate`.
        train_expert: trains a copy of the base in place, as `train` does, and keeps the names of its weights.
        scores: returns accuracy and bits of a model on the data of one task.
        notes: facts that belong to the results, e.g. a digest of the data.
    """

    model: Callable[[], nn.Module]
    base_batch: Callable[[], Batch]
    task_batches: Mapping[str, Callable[[], Batch]]
    validation: Mapping[str, Batch]
    test: Mapping[str, Batch]
    base_steps: int
    expert_steps: int
    peak_rate: float
    expert_rate: float
    train_expert: Callable[[nn.Module, Callable[[], Batch], int, float], None] = train
    scores: Callable[[nn.Module, Batch], tuple[float, float]] = classification
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Of one model, task by task: accuracy in %, and cross entropy in bits."""

    accuracy: list[float]
    bits: list[float]


def train_family(suite: Suite) -> tuple[StateDict, list[StateDict]]:
    """Train the base, and from it one expert per task."""
    base = suite.model()
    train(base, suite.base_batch, suite.base_steps, suite.peak_rate)
    experts = []
    for batch in suite.task_batches.values():
        expert = copy.deepcopy(base)
        suite.train_expert(expert, batch, suite.expert_steps, suite.expert_rate)
        experts.append(expert.state_dict())
    return base.state_dict(), experts


@torch.no_grad()
def score(suite: Suite, model: nn.Module, data: Mapping[str, Batch]) -> Scores:
    accuracy, bits = zip(*(suite.scores(model, batch) for batch in data.values()), strict=True)
    return Scores(list(accuracy), list(bits))


class Attention(nn.Module):
    """Self-attention with separate projections, as in most checkpoints that people merge."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape."""
        parts = [part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention, then an MLP, each on normalised inputs and added to them."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x))))


class Transformer(nn.Module):
    """A small transformer from tokens to logits at every position."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, causal: bool) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (n, length) to logits (n, length, vocabulary)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))
