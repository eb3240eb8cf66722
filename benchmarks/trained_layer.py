"""Time TSV-Merge and R-TSVM on the seven matrices of a Llama layer against FusionBench's function.

    python -m benchmarks.trained_layer [--rounds 5] [--width 2048] [--peer-python PATH] [--json FILE]

The layer has the shapes of a Llama model of width 2048 with 5632 hidden units. Two sets of task matrices, T = 3:

* trained: a language model of this one layer, byte by byte, is trained on prose and code, and fine-tuned on prose, on
  code and on records (the texts of the quality study); five minutes on two cores;
* power 0.5: matrices with singular values i^-0.5. One square stands for four, and one rectangle for three.

`tsvm` and `rtsvm` are whole methods with their defaults. All sides take turns on each matrix; the time of the layer in
a round is the sum over its matrices. Errors are those of `q_proj`, relative to float64 SVDs.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.program import Program, Turns, finish
from benchmarks.quality.suite_language import LENGTH, VOCABULARY, corpora, windows
from benchmarks.quality.training import Batch, train
from benchmarks.spectral import PEER, FusionBench
from r_tsvm_kernels import merge_tensors
from r_tsvm_kernels.bench import Results, Row, published, row
from r_tsvm_kernels.linalg import fixed_rank
from tests.spectra import spectrum

DOMAINS = ("prose", "code", "records")
TASKS, HEAD, BASE_STEPS, EXPERT_STEPS, BATCH, RATE = len(DOMAINS), 128, 80, 50, 16, 3e-4
OURS = ("tsvm", "rtsvm")
SQUARES, RECTANGLES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class Layer(nn.Module):
    """A language model of one layer of Llama: attention, then SwiGLU, both after RMSNorm; positions are learned."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width * 11 // 4
        self.embedding, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))
        sizes = dict.fromkeys(SQUARES, (width, width)) | dict.fromkeys(RECTANGLES, (width, hidden))
        sizes["down_proj"] = (hidden, width)
        self.parts = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, text: Tensor) -> Tensor:
        """Return the logits (B, n, 128) of the bytes that follow each of `text` (B, n)."""
        x = self.embedding(text) + self.positions(torch.arange(text.shape[1]))
        y = self.norms[0](x)
        heads = (self.parts[name](y).unflatten(-1, (-1, min(HEAD, y.shape[-1]))) for name in SQUARES[:3])
        q, k, v = (head.transpose(1, 2) for head in heads)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.parts["o_proj"](attended.transpose(1, 2).flatten(2))
        y = self.norms[1](x)
        x = x + self.parts["down_proj"](functional.silu(self.parts["gate_proj"](y)) * self.parts["up_proj"](y))
        logits: Tensor = self.norms[2](x) @ self.embedding.weight.mT
        return logits


def trained(width: int, steps: float = 1.0) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return the seven matrices of a trained base and of its fine-tunes; `steps` scales the training."""
    data, generator = corpora(), torch.Generator().manual_seed(0)

    def draw(*domains: str) -> Callable[[], Batch]:
        def batch() -> Batch:
            parts = [windows(data[domain]["training"], BATCH // len(domains), generator) for domain in domains]
            return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])

        return batch

    torch.manual_seed(0)
    base = Layer(width)
    nn.init.normal_(base.embedding.weight, std=0.02)
    train(base, draw("prose", "code"), max(2, int(steps * BASE_STEPS)), RATE)
    experts = []
    for domain in DOMAINS:
        expert = copy.deepcopy(base)
        train(expert, draw(domain), max(2, int(steps * EXPERT_STEPS)), RATE / 3)
        experts.append(expert)
    first, *others = ({name: part.weight.detach() for name, part in model.parts.items()} for model in (base, *experts))
    return first, others


def decaying(width: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Return a base and fine-tunes whose task matrices have singular values i^-0.5: a square and a rectangle."""
    shapes = {"q_proj": (width, width), "gate_proj": (width * 11 // 4, width)}
    base = {name: spectrum("flat", *shape, 99) / max(shape) ** 0.5 for name, shape in shapes.items()}
    return base, [
        {name: weight + 1e-2 * spectrum("power 0.5", *weight.shape, seed) for name, weight in base.items()}
        for seed in range(TASKS)
    ]


def compare(
    peer: FusionBench, deltas: str, base: dict[str, Tensor], tuned: list[dict[str, Tensor]], rounds: int
) -> Iterator[list[Row]]:
    """Yield the rows of each matrix, then those of the layer."""
    layer = [dict.fromkeys((PEER, *OURS), 0.0) for _ in range(rounds)]
    like = {"q_proj": len(SQUARES), "gate_proj": len(RECTANGLES)} if len(base) == 2 else {}
    for name, weight in base.items():
        models, turns, results = [model[name] for model in tuned], Turns(), {}
        peer.load([model - weight for model in models])
        for number in range(rounds):
            seconds = {PEER: peer.seconds()}
            for method in OURS:
                start = time.perf_counter()
                results[method] = merge_tensors(weight, models, method).weight
                seconds[method] = time.perf_counter() - start
            for side, value in seconds.items():
                turns.add(side, value)
                layer[number][side] += like.get(name, 1) * value
        case: dict[str, Any] = {"shape": tuple(weight.shape), "options": {"deltas": deltas, "matrix": name}}
        yield turns.rows("trained_layer", [PEER], OURS, **case)
        if name == "q_proj":
            yield errors(peer, weight, models, results["tsvm"], case)
    whole = Turns()
    for seconds in layer:
        for side, value in seconds.items():
            whole.add(side, value)
    yield whole.rows("trained_layer", [PEER], OURS, options={"deltas": deltas, "matrix": "the layer"})


def errors(peer: FusionBench, base: Tensor, models: list[Tensor], merged: Tensor, case: dict[str, Any]) -> list[Row]:
    """Compare the updates of `tsvm` and of FusionBench with float64 SVDs."""
    matrices = [(model - base).double() for model in models]
    exact = published.tsv_merge(matrices, [fixed_rank((len(base), base.shape[1]), len(models))] * len(models))
    found = {"tsvm": merged.double() - base.double(), PEER: peer.result().double()}
    return [
        row("trained_layer", side, "error", float((update - exact).norm() / exact.norm()), **case)
        for side, update in found.items()
    ]


def main() -> int:
    program = Program(__doc__, "trained_layer.json", "fusion-bench", rounds=5)
    program.parser.add_argument("--width", type=int, default=2048, help="of the layer (%(default)s)")
    program.parser.add_argument("--steps", type=float, default=1.0, help="scale of the training (%(default)s)")
    args = program.arguments()
    results = Results(args.json, ("numpy", "safetensors"), replace=True)
    with tempfile.TemporaryDirectory() as folder:
        sets = {"trained": trained(args.width, args.steps), "power 0.5": decaying(args.width)}
        peer = FusionBench(args.peer_python, Path(folder))
        results.circumstances["versions"] |= {"fusion-bench": peer.server.versions["fusion_bench"]}
        for deltas, (base, tuned) in sets.items():
            for rows in compare(peer, deltas, base, tuned, args.rounds):
                results.add(rows)
        peer.server.close()
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
