"""How many task matrices solver products must solve twice.

    python -m benchmarks.second_solves [--suites digits ..] [--steps 300] [--sizes 512 ..] [--json FILE]

A few Lanczos steps foresee which spectra must be compressed. Where they did not, but the estimated error is then too
large, the matrix is solved again. Counted at rank r // T, for

* trained task matrices: those of the quality study's suites, and of the digits demo's model four times as wide, whose
  matrices have a short side of 512;
* matrices with known spectra, T = 3: noise, noise with a few large directions, and singular values that decay like a
  power or exponentially.

Spectra of matrices below 256 columns are foreseen here, too; merges leave that out, because a second solve costs less.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from unittest.mock import patch

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks.program import Program, finish
from benchmarks.quality.training import train_family
from examples import digits_demo
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.linalg.products import subspaces
from r_tsvm_kernels.linalg.products.merge import products_tsv_merge
from tests.spectra import spectrum

# Narrower matrices are merged by an SVD.
NARROWEST = 64
WIDTH = 4  # of the demo's model
SPECTRA = ("flat", "low rank + noise", "power 0.1", "power 0.3", "power 0.5", "power 0.7", "power 1.0", "power 1.5",
           "exponential 3", "exponential 6", "exponential 9")  # fmt: skip


def decaying(kind: str, n: int, seed: int) -> Tensor:
    """Return a matrix (n, n) with a spectrum of that kind; ``exponential p`` falls by a factor of ``e^p`` in all."""
    if not kind.startswith("exponential"):
        return spectrum(kind, n, n, seed)
    U, s, Vh = torch.linalg.svd(spectrum("flat", n, n, seed).double())
    falling = float(kind.split()[1]) / n * torch.arange(n, dtype=s.dtype)
    return (U @ torch.diag(torch.exp(-falling)) @ Vh).float()


def differences(base: dict[str, Tensor], models: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Yield the task matrices (T, m, n) of each weight that is a matrix."""
    for name, weight in base.items():
        if weight.ndim == 2 and min(weight.shape) >= NARROWEST:
            stack = torch.stack([model[name].float() - weight.float() for model in models])
            rows, columns = (stack.abs().sum((0, side)) > 0 for side in (2, 1))
            support = stack[:, rows][:, :, columns]
            if min(support.shape[1:]) >= NARROWEST:
                yield support


def demo_family(steps: int) -> Iterator[Tensor]:
    """Train the demo's model, wider, and yield its task matrices."""
    wide = {name: value * WIDTH if name.endswith("_size") else value for name, value in digits_demo.CONFIG.items()}
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 8, 8) / 8 - 1
    classes = torch.from_numpy(labels).long()
    base = digits_demo.DigitsMLP(wide)
    digits_demo.train(base, pixels, classes, steps)
    models = []
    for change in digits_demo.TASKS.values():
        model = digits_demo.DigitsMLP(wide)
        model.load_state_dict(base.state_dict())
        digits_demo.train(model, change(pixels), classes, steps)
        models.append(dict(model.state_dict()))
    yield from differences(dict(base.state_dict()), models)


def suite_family(name: str) -> Iterator[Tensor]:
    """Train the models of a suite of the quality study, and yield their task matrices."""
    base, experts = train_family(import_module(f"benchmarks.quality.suite_{name}").build(0, False))
    yield from differences(dict(base), [dict(expert) for expert in experts])


def counted(name: str, layers: Iterator[Tensor]) -> list[Row]:
    """Merge layers (T, m, n), and count the matrices that were compressed, solved twice, and not accurate enough."""
    solves: list[bool] = []
    solve = subspaces.products_subspaces

    def noted(matrices: Tensor, *rest: object) -> object:
        solves.extend([len(rest) > 2 and rest[2] is not None] * len(matrices))
        return solve(matrices, *rest)  # type: ignore[arg-type]

    total = compressed = inaccurate = merges = 0
    shapes: list[tuple[int, ...]] = []
    with patch.object(subspaces, "products_subspaces", noted), patch.object(subspaces, "FORESEEN_FROM", NARROWEST):
        for layer in layers:
            rank = min(layer.shape[1:]) // len(layer)
            merge = products_tsv_merge(layer, [rank] * len(layer))
            total, merges = total + len(layer), merges + 1
            compressed += sum(part.compressed for part in merge.parts)
            inaccurate += not merge.error < 1e-4
            shapes.append(tuple(layer.shape[1:]))
    counts = {"matrices": total, "compressed": compressed, "solved twice": len(solves) - total}
    case = {"matrices": name}
    rows = [row("second solve", "products", metric, count, unit="matrices", role="ours", options=case)
            for metric, count in counts.items()]  # fmt: skip
    notes = {"merges": merges, "largest": max(shapes)}
    rows.append(row("second solve", "products", "other solver", inaccurate, unit="merges", role="ours",
                    options=case, notes=notes))  # fmt: skip
    return rows


def main() -> int:
    program = Program(__doc__, "second_solves.json")
    program.parser.add_argument("--suites", nargs="*", default=["digits", "tables", "light"])
    program.parser.add_argument("--steps", type=int, default=300, help="of training the demo's model; 0 leaves it out")
    program.parser.add_argument("--sizes", type=int, nargs="*", default=[512])
    args = program.arguments()
    results = Results(args.json, ("scikit-learn",), replace=True)
    for name in args.suites:
        torch.manual_seed(0)
        results.add(counted(f"trained, suite {name}", suite_family(name)))
    if args.steps:
        torch.manual_seed(0)
        results.add(counted("trained, demo", demo_family(args.steps)))
    for n in args.sizes:
        for kind in SPECTRA:
            layer = torch.stack([decaying(kind, n, seed) for seed in range(3)])
            results.add(counted(f"{kind}, n {n}", iter([layer])))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
