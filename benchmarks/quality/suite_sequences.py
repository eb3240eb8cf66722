"""Sequence tagging: a bidirectional GRU, a base trained on four generated languages and experts for four other ones.

A language is a hidden Markov model: each position has one of six tags; each tag has a few likely successors and prefers
some of the 24 symbols. The model sees the symbols and names the tags. Symbols are ambiguous, so it needs the context.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.quality.training import Batch, Suite

SYMBOLS, TAGS, LENGTH, WIDTH, LAYERS = 24, 6, 24, 64, 2
SOURCES, TASKS = 4, 4


class Tagger(nn.Module):
    """A bidirectional GRU from symbols to logits of the tags at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.recurrent = nn.GRU(WIDTH, WIDTH // 2, LAYERS, batch_first=True, bidirectional=True)
        self.head = nn.Linear(WIDTH, TAGS)

    def forward(self, symbols: Tensor) -> Tensor:
        """Map symbols (n, length) to logits (n, length, TAGS)."""
        return self.head(self.recurrent(self.embedding(symbols))[0])


def make_language(generator: torch.Generator) -> Callable[[int, torch.Generator], Batch]:
    """Make a language at random; it returns as many sequences, with their tags, as it is asked for."""
    successors = torch.softmax(2.5 * torch.randn(TAGS, TAGS, generator=generator), 1)
    emissions = torch.softmax(2.5 * torch.randn(TAGS, SYMBOLS, generator=generator), 1)

    def draw(count: int, stream: torch.Generator) -> Batch:
        tags = [torch.randint(TAGS, (count,), generator=stream)]
        while len(tags) < LENGTH:
            tags.append(torch.multinomial(successors[tags[-1]], 1, generator=stream)[:, 0])
        targets = torch.stack(tags, 1)
        return torch.multinomial(emissions[targets.flatten()], 1, generator=stream).reshape(count, LENGTH), targets

    return draw


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    making, training, validation, test = (torch.Generator().manual_seed(1000 * seed + stream) for stream in range(4))
    sources = [make_language(making) for _ in range(SOURCES)]
    tasks = {f"language {index + 1}": make_language(making) for index in range(TASKS)}

    def base_batch() -> Batch:
        parts = [language(12, training) for language in sources]
        return torch.cat([symbols for symbols, _ in parts]), torch.cat([tags for _, tags in parts])

    return Suite(
        model=Tagger,
        base_batch=base_batch,
        task_batches={name: lambda language=language: language(32, training) for name, language in tasks.items()},
        validation={name: language(10 if quick else 50, validation) for name, language in tasks.items()},
        test={name: language(10 if quick else 200, test) for name, language in tasks.items()},
        base_steps=6 if quick else 500,
        expert_steps=4 if quick else 200,
        peak_rate=5e-3,
        expert_rate=2e-3,
    )
