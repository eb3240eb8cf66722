"""Time mergekit's commands with and without our backend: wall time and peak memory side by side.

    python benchmarks/peers/compare_mergekit_cli.py [--peer-python PATH] [--size 0.25] [--rounds 3] [--folder DIR]
                                                    [--out DIR] [--cases NAME ...]

`mergekit-yaml` and `rtsvm mergekit-yaml` run in the peer's environment on the same recipe (dtype bfloat16), base and
two fine-tunes of `--size` GB each, in turn, with the inputs in the page cache; `mergekit-extract-lora` runs on a pair
of small models, as full SVDs take long. The time is that of the whole command. Our backend must be built for the Python
of that environment. `--size 0.25` wants 2 GB of free disk.

A deterministic case is right when every element of our result is the merge in float64 rounded to bfloat16, but for the
last place of float32 sums; elements tied at a threshold are left out, as mergekit keeps any of them. Where masks are
random, other ones on the two sides, the norms of both updates must agree within a percent. An adapter is right when it
is as near to the change as the best one of its rank, but for a thousandth, as its factors are in bfloat16.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from compare_engine import ROUNDING, SUMMING, TASKS, peer_command, peer_versions, read
from compare_ties import DENSITY, GAMMA, METHODS, tied, truth
from comparing import Program, Turns, spread, verdict, wide_console, write
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import run_measured
from models import Family, family, warm
from record import ROOT, provenance

RANDOM = {"dare_ties", "dare_linear", "della", "della_linear"}
SELECTED = 0.5
PARAMETERS = {name: parameters for name, (parameters, _, _) in METHODS.items()} | {
    "task_arithmetic": {"weight": 1.0},
    "della": {"weight": 1.0, "density": DENSITY, "epsilon": 0.1},
    "della_linear": {"weight": 1.0, "density": DENSITY, "epsilon": 0.1},
}
# Parameters for all models, in methods that have none for each.
COMMON = {"sce": {"select_topk": SELECTED}, "model_stock": {}, "karcher": {}}
EXTRACTION = "extract-lora"
CASES = (*PARAMETERS, *COMMON, EXTRACTION)
# One of each kind.
DEFAULT_CASES = ("ties", "dare_ties", "della", "breadcrumbs", *COMMON, EXTRACTION)
CHECKED = "layers.0."  # all layers hold the same values
NORMS = 0.01
RANK_SHARE, EXCESS = 16, 1e-3  # of the adapters: their rank is a 16th of the width

Check = Callable[[Path], float]


def write_recipe(models: Family, method: str) -> Path:
    own = PARAMETERS.get(method, {})
    recipe = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": own} for model in models.tuned],
        "parameters": COMMON.get(method, {}),
        "dtype": "bfloat16",
    }
    if method != "karcher":
        recipe["base_model"] = str(models.base)
    file = models.base.parent / f"{method}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


def checked_tensors(models: Family) -> list[str]:
    names = json.loads((models.base / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if CHECKED in name and "norm" not in name]


# --- what is right ---------------------------------------------------------------------------------------------------


def expected(method: str, base: Tensor, tuned: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the merge of two fine-tunes in float64, and the elements that are tied at a threshold."""
    deltas = torch.stack([weight - base for weight in tuned])
    if method == "task_arithmetic":
        return base + deltas.sum(0), None
    if method == "model_stock":
        cosine = (deltas[0] * deltas[1]).sum() / (deltas[0].norm() * deltas[1].norm())
        return base + 2 * cosine / (1 + cosine) * deltas.mean(0), None
    if method == "karcher":
        norms = [weight.norm() for weight in tuned]
        middle = sum(weight / norm for weight, norm in zip(tuned, norms, strict=True))
        return sum(norms) / len(norms) * middle / middle.norm(), None
    if method == "sce":
        return expected_sce(base, deltas)
    return base + truth(method, base, list(tuned)), tied(method, base, list(tuned))


def expected_sce(base: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    variance = deltas.var(0, unbiased=False)
    count = int(variance.count_nonzero() * SELECTED)
    # Of equal variances we keep the first; the weights depend on it.
    order = variance.flatten().argsort(descending=True, stable=True)[:count]
    chosen = deltas * torch.zeros_like(variance).flatten().index_fill(0, order, 1).view_as(variance)
    threshold = variance.flatten()[order[-1]]
    squares = chosen.square().flatten(1).mean(1)
    signs = torch.where(chosen.sum(0) >= 0, 1, -1)
    weights = (chosen.sign() == signs) * (squares / squares.sum())[:, None, None]
    divisor = weights.sum(0)
    mean = (weights * chosen).sum(0) / torch.where(divisor == 0, 1, divisor)
    return base + mean, (variance - threshold).abs() <= 1e-9 * threshold


def largest_error(models: Family, method: str, merged: Path) -> float:
    """Largest error of an element, as a multiple of what is allowed."""
    largest = 0.0
    for name in checked_tensors(models):
        base, tuned = read(models.base, name), [read(model, name) for model in models.tuned]
        right, ties = expected(method, base, tuned)
        allowed = ROUNDING * right.abs() + SUMMING * (base.abs() + sum(weight.abs() for weight in tuned))
        gap = (read(merged, name) - right).abs() / allowed.clamp_min(1e-300)
        largest = max(largest, float(gap.max() if ties is None else gap.masked_fill(ties, 0).max()))
    return largest


def update_norm(models: Family, merged: Path) -> float:
    squares = [(read(merged, name) - read(models.base, name)).square().sum() for name in checked_tensors(models)]
    return float(sum(squares)) ** 0.5


def excess_error(models: Family, adapter: Path, rank: int) -> float:
    """Largest error of a module's update, as a multiple of the least that its rank allows and of what is allowed."""
    largest = 0.0
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in checked_tensors(models):
            change = read(models.tuned[0], name) - read(models.base, name)
            module = f"base_model.model.{name.removesuffix('.weight')}"
            A, B = (file.get_tensor(f"{module}.lora_{side}.weight").double() for side in "AB")
            best = torch.linalg.svdvals(change)[rank:].norm()
            largest = max(largest, float((B @ A - change).norm() / best))
    return largest / (1 + EXCESS)


# --- running ---------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def both_sides(python: Path, peer: list[str]) -> dict[str, list[str]]:
    """Return the commands: the peer's own, and ours that runs it."""
    return {"with": [str(python), "-m", "r_tsvm_kernels", Path(peer[0]).name, *peer[1:]], "without": peer}


def compile_python(python: Path, *names: str) -> None:
    """Let Python compile the files of both sides, and the system read them, before anything is timed."""
    for command in names:
        for call in both_sides(python, [str(python.with_name(command)), "--help"]).values():
            subprocess.run(call, check=True, env=environment(), capture_output=True)


def compare(models: Family, commands: dict[str, list[str]], out: Path, check: Check, rounds: int) -> dict[str, Any]:
    """Run both sides in turn; check what the first round gave."""
    turns = Turns(list(commands))
    found: dict[str, float] = {}
    for round_ in range(rounds):
        for side, command in commands.items():
            warm(models.files)
            run = run_measured(command, environment())
            turns.add(side, run.seconds, run.peak_bytes)
            if round_ == 0:
                found[side] = check(out)
            shutil.rmtree(out)
    return {"checked": found, **turns.summary("without", "with")}


def compare_merge(models: Family, method: str, python: Path, rounds: int) -> dict[str, Any]:
    out = models.base.parent / "out"
    commands = both_sides(python, peer_command(python, write_recipe(models, method), out))
    random = method in RANDOM

    def check(merged: Path) -> float:
        return update_norm(models, merged) if random else largest_error(models, method, merged)

    row = compare(models, commands, out, check, rounds)
    ours, theirs = (row["checked"][side] for side in ("with", "without"))
    return row | {"right": abs(ours / theirs - 1) <= NORMS if random else ours <= 1}


def compare_extraction(models: Family, python: Path, rounds: int, rank: int) -> dict[str, Any]:
    out = models.base.parent / "out"
    arguments = ["--base-model", str(models.base), "--model", str(models.tuned[0]), "--out-path", str(out)]
    arguments += ["--max-rank", str(rank), "--no-cuda", "--quiet"]
    commands = both_sides(python, [str(python.with_name("mergekit-extract-lora")), *arguments])
    row = compare(models, commands, out, lambda adapter: excess_error(models, adapter, rank), rounds)
    return row | {"right": row["checked"]["with"] <= 1}


def print_table(rows: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    table = Table("case", "verdict", "with", "without", "ratio", "quartiles", "peak with", "without", title=title)
    for case, row in rows.items():
        table.add_row(
            case,
            verdict(row["right"]),
            *(f"{row['seconds'][side]['median']:.1f} s" for side in ("with", "without")),
            *spread(row["ratio"]),
            *(f"{row['peak_bytes'][side] / 1e6:.0f} MB" for side in ("with", "without")),
        )
    console.print(table)


def main() -> int:
    program = Program(__doc__, "mergekit", rounds=3)
    parser = program.parser
    parser.add_argument("--size", type=float, default=0.25, metavar="GB", help="per model (default 0.25)")
    parser.add_argument("--extracted-size", type=float, default=0.08, metavar="GB", help="of the small models")
    parser.add_argument("--hidden", type=int, default=1024, help="width (default 1024, as of the small models)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    args = program.arguments()

    results: dict[str, dict[str, Any]] = {}
    methods = [case for case in args.cases if case != EXTRACTION]
    sizes: dict[str, int] = {}
    if methods:
        compile_python(args.peer_python, "mergekit-yaml")
        with family(args.folder, args.size, TASKS, args.hidden) as models:
            results = {method: compare_merge(models, method, args.peer_python, args.rounds) for method in methods}
            sizes["merged"] = models.checkpoint_bytes
    width = args.hidden
    if EXTRACTION in args.cases:
        compile_python(args.peer_python, "mergekit-extract-lora")
        with family(args.folder, args.extracted_size, 1, width) as models:
            results[EXTRACTION] = compare_extraction(models, args.peer_python, args.rounds, width // RANK_SHARE)
            sizes["extracted"] = models.checkpoint_bytes
    console = wide_console(120)
    described = ", ".join(f"{what}: {size / 1e9:.2f} GB each" for what, size in sizes.items())
    print_table(results, f"mergekit's commands, base and fine-tunes in bfloat16; {described}", console)

    report = provenance("safetensors") | {
        "peer_versions": peer_versions(args.peer_python),
        "tasks": TASKS,
        "hidden": args.hidden,
        "checkpoint_bytes": sizes,
        "density": DENSITY,
        "gamma": GAMMA,
        "select_topk": SELECTED,
        "rank": width // RANK_SHARE,
        "limits": {"element_rounding": ROUNDING, "element_summing": SUMMING, "norms": NORMS, "adapter": EXCESS},
        "cases": results,
    }
    write(report, args.out / "mergekit_cli.json", console)
    return 0 if all(row["right"] for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
