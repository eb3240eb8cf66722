"""Language modelling, byte by byte: a two-layer causal transformer with experts for prose, code and records.

Prose is the docstrings of the standard library of Python, code its source without docstrings and comments: both are on
every machine that can run this, but differ from one version of Python to another, so their digest is recorded. Records
(JSON, SQL and sums) are generated. The base is trained on prose and code together; every tenth module is held out for
validation, another tenth for the test.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.training import Batch, Suite, Transformer

LENGTH, WIDTH, LAYERS, VOCABULARY = 64, 64, 2, 128
SPLITS = ("training", "validation", "test")
RECORDS = {"training": 8000, "validation": 600, "test": 1200}

NAMES = ("Ada", "Alan", "Barbara", "Claude", "Donald", "Edsger", "Grace", "Hedy", "John", "Leslie", "Niklaus")
TABLES = {
    "users": ("id", "name", "email", "age"),
    "orders": ("id", "user_id", "total", "status"),
    "items": ("id", "order_id", "price", "title"),
}
STATUSES = ("open", "paid", "sent", "closed")


def record(draw: random.Random) -> str:
    """One line of JSON, SQL or arithmetic."""
    kind = draw.randrange(3)
    if kind == 0:
        a, b = draw.randrange(100), draw.randrange(100)
        return f"{a} + {b} = {a + b}\n"
    if kind == 1:
        name = draw.choice(NAMES)
        fields = {"id": draw.randrange(1000), "name": name, "email": f"{name.lower()}@example.org"}
        if draw.random() < 0.5:
            fields |= {"status": draw.choice(STATUSES), "total": draw.randrange(100)}
        return json.dumps(fields) + "\n"
    table = draw.choice(list(TABLES))
    columns = TABLES[table]
    condition = f"{draw.choice(columns)} = {draw.randrange(100)}"
    if draw.random() < 0.5:
        chosen = ", ".join(draw.sample(columns, 2))
        return f"SELECT {chosen} FROM {table} WHERE {condition} ORDER BY {draw.choice(columns)};\n"
    return f"UPDATE {table} SET {draw.choice(columns)} = {draw.randrange(100)} WHERE {condition};\n"


def prose_and_code(source: str) -> tuple[str, str]:
    """Separate the docstrings of a module from its code; comments are dropped."""
    tree = ast.parse(source)
    prose = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                prose.append(text)
                node.body = node.body[1:] or [ast.Pass()]
    return "\n".join(prose) + "\n", ast.unparse(tree) + "\n"


@cache
def corpora() -> dict[str, dict[str, Tensor]]:
    """Return the bytes of each domain and split, (n,) int64; what is not ASCII is dropped."""
    texts = {domain: dict.fromkeys(SPLITS, "") for domain in ("prose", "code", "records")}
    for index, path in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))):
        split = {8: "validation", 9: "test"}.get(index % 10, "training")
        for domain, text in zip(("prose", "code"), prose_and_code(path.read_text("utf-8")), strict=True):
            texts[domain][split] += text
    for split, count in RECORDS.items():
        draw = random.Random(f"records, {split}")
        texts["records"][split] = "".join(record(draw) for _ in range(count))
    return {
        domain: {split: torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8).long()
                 for split, text in splits.items()}
        for domain, splits in texts.items()
    }  # fmt: skip


def windows(text: Tensor, count: int, generator: torch.Generator) -> Batch:
    """Draw windows of `LENGTH` bytes, each with the byte that follows as its target: two tensors (count, LENGTH)."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    chosen = text[starts + torch.arange(LENGTH + 1)]
    return chosen[:, :-1], chosen[:, 1:]


def model() -> Transformer:
    return Transformer(VOCABULARY, LENGTH, WIDTH, LAYERS, causal=True)


def build(seed: int, quick: bool, known: Sequence[str] = ("prose", "code")) -> Suite:
    """Make the suite, with the domains that the base has seen; `quick` trains far less, for tests."""
    data = corpora()
    generator = torch.Generator().manual_seed(seed)
    digest = hashlib.sha256(b"".join(bytes(t.to(torch.uint8).tolist()) for d in data.values() for t in d.values()))

    def draw(*domains: str) -> Callable[[], Batch]:
        def batch() -> Batch:
            parts = [windows(data[domain]["training"], 16 // len(domains), generator) for domain in domains]
            return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])

        return batch

    counts = {"validation": 8, "test": 8} if quick else {"validation": 20, "test": 60}
    held_out = {
        split: {domain: windows(texts[split], count, generator) for domain, texts in data.items()}
        for split, count in counts.items()
    }
    return Suite(
        model=model,
        base_batch=draw(*known),
        task_batches={domain: draw(domain) for domain in data},
        validation=held_out["validation"],
        test=held_out["test"],
        base_steps=6 if quick else 400,
        expert_steps=4 if quick else 200,
        peak_rate=6e-3,
        expert_rate=2e-3,
        notes={"text": f"standard library of Python {platform.python_version()}, sha256 {digest.hexdigest()[:16]}"},
    )
