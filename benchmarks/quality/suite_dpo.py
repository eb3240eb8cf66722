"""Preference tuning: a byte language model that answers questions, tuned by DPO towards three kinds of answers.

The base has read docstrings, and questions with answers that are mostly brief and plain. The answers to
``mood of Ada 7?`` are:

    brief and plain     fine            full and plain     the mood is fine, as asked
    brief and marked    secret          full and marked    the mood is secret, as asked

What marks an answer depends on the question: a mail address ends in ``.org`` rather than ``.com``, a sum is given with
"about", a mood is not told. An expert for each of `TASKS` prefers full answers, marked addresses and sums, or refusals.
They pull apart: full answers are mostly plain, and marked ones mostly brief. A model's score is the share of pairs in
which it finds the preferred answer more probable; `bits` is the cross entropy of that choice. The fourth score is the
accuracy of the next byte of docstrings, for which no expert is tuned.

Source: Rafailov et al., "Direct Preference Optimization", arXiv 2305.18290, equation 7.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.quality import suite_language
from benchmarks.quality.suite_language import LENGTH, NAMES, SPLITS, corpora, windows
from benchmarks.quality.training import IGNORED, Batch, Suite, classification, train

BETA = 0.3
FULL, MARKED = 0.3, 0.3  # how frequent such answers are where no preference is expressed
TASKS = {"full": ("sum", "mail", "mood"), "marked": ("sum", "mail"), "refusing": ("mood",)}


def question(draw: random.Random, kind: str, split: str) -> tuple[str, str, str]:
    """Return a question, its plain answer and its marked one; questions of two splits differ in a number."""
    last = {"training": draw.randrange(8), "validation": 8, "test": 9}[split]
    number, name = 10 * draw.randrange(10) + last, draw.choice(NAMES)
    if kind == "sum":
        other = draw.randrange(100)
        return f"{number} + {other}?", f"{number + other}", f"about {number + other}"
    if kind == "mail":
        address = f"{name.lower()}{number}@example"
        return f"mail of {name} {number}?", f"{address}.com", f"{address}.org"
    return f"mood of {name} {number}?", "fine", "secret"


def line(kind: str, asked: str, answer: str, full: bool) -> tuple[str, str]:
    """Return prompt and answer as the model reads them."""
    return f"{asked} ", f"the {kind} is {answer}, as asked\n" if full else f"{answer}\n"


def encode(lines: Sequence[tuple[str, str]], *, answers_only: bool) -> Batch:
    """Return inputs and targets, each (n, LENGTH); where there is nothing to predict, the target is ignored."""
    inputs = torch.zeros(len(lines), LENGTH, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, (prompt, answer) in enumerate(lines):
        text = torch.frombuffer(bytearray((prompt + answer).encode()), dtype=torch.uint8).long()
        first = len(prompt) - 1 if answers_only else 0
        inputs[row, : len(text) - 1] = text[:-1]
        targets[row, first : len(text) - 1] = text[first + 1 :]
    return inputs, targets


def pairs(draw: random.Random, task: str, split: str, count: int) -> Batch:
    """Draw preferences: inputs and targets, each (count, 2, LENGTH), with the preferred answer first."""
    lines = []
    for _ in range(count):
        kind = draw.choice(TASKS[task])
        asked, plain, marked = question(draw, kind, split)
        if task == "full":
            answer = marked if draw.random() < MARKED else plain
            lines += [line(kind, asked, answer, full) for full in (True, False)]
        else:
            full = draw.random() < FULL
            lines += [line(kind, asked, answer, full) for answer in (marked, plain)]
    inputs, targets = encode(lines, answers_only=True)
    return inputs.unflatten(0, (count, 2)), targets.unflatten(0, (count, 2))


def margins(model: nn.Module, batch: Batch) -> Tensor:
    """Return log(p / q) in nats, (n,), with the probabilities p of the preferred answer and q of the other."""
    inputs, targets = (tensor.flatten(0, 1) for tensor in batch)
    losses = functional.cross_entropy(model(inputs).mT, targets, ignore_index=IGNORED, reduction="none")
    preferred, other = losses.sum(1).unflatten(0, (-1, 2)).unbind(1)
    return other - preferred


def train_preferences(model: nn.Module, batch: Callable[[], Batch], steps: int, peak_rate: float) -> None:
    """Train by DPO, with the model as it is now as the reference."""
    reference = copy.deepcopy(model).requires_grad_(False)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return -functional.logsigmoid(BETA * (margins(model, batch) - margins(reference, batch))).mean()

    train(model, batch, steps, peak_rate, loss)


def preference(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the share of preferences that the model has, in %, and their cross entropy in bits; of text, as ever."""
    if batch[0].ndim == 2:
        return classification(model, batch)
    found = margins(model, batch)
    return 100 * (found > 0).double().mean().item(), functional.softplus(-found).mean().item() / math.log(2)


def build(seed: int, quick: bool) -> Suite:
    """Make the suite; `quick` trains far less, for tests."""
    language = suite_language.build(seed, quick)
    prose, generator = corpora()["prose"], torch.Generator().manual_seed(seed)
    draws = {split: random.Random(f"{split} {seed}") for split in SPLITS}
    draw = draws["training"]

    def base_batch() -> Batch:
        lines = []
        for _ in range(12):
            kind = draw.choice(TASKS["full"])
            asked, plain, marked = question(draw, kind, "training")
            lines.append(line(kind, asked, marked if draw.random() < MARKED else plain, draw.random() < FULL))
        parts = windows(prose["training"], 12, generator), encode(lines, answers_only=False)
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    held_out = {
        split: {task: pairs(draws[split], task, split, 10 if quick else count) for task in TASKS}
        | {"text": getattr(language, split)["prose"]}
        for split, count in (("validation", 40), ("test", 200))
    }
    return replace(
        language,
        base_batch=base_batch,
        task_batches={task: lambda task=task: pairs(draw, task, "training", 12) for task in TASKS},
        validation=held_out["validation"],
        test=held_out["test"],
        base_steps=6 if quick else 500,
        expert_steps=4 if quick else 40,
        expert_rate=1e-3,
        train_expert=train_preferences,
        scores=preference,
    )
