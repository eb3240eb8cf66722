"""Time mergekit's commands with and without our backend: wall time and peak memory.

    python -m benchmarks.peers.compare_mergekit_cli [--peer-python PATH] [--size 0.25] [--rounds 5] [--folder DIR]
                                                    [--json FILE] [--cases NAME ...]

`mergekit-yaml` and `rtsvm mergekit yaml` run in the peer's environment on the same recipe (dtype bfloat16), base and
two fine-tunes of `--size` GB each, in interleaved rounds, with the inputs in the page cache; `mergekit-extract-lora`
runs on a pair of small models, because full SVDs take long. The time is that of the whole command. Our backend must be
built for the Python of that environment. `--size 0.25` needs 2 GB of disk.

A deterministic case is right when every element of our result is the merge in float64 rounded to bfloat16, except for
the last place of float32 sums; elements tied at a threshold are left out, because mergekit keeps any of them. Random
masks differ on the two sides, so the norms of both updates must agree within a percent. An adapter is right when it is
as close to the change as the best one of its rank, except for a thousandth, because its factors are in bfloat16.
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
from safetensors import safe_open
from torch import Tensor

from benchmarks import ROOT
from benchmarks.engine import TASKS, allowed_error, gigabytes, mergekit_command, read, tensor_names
from benchmarks.program import Program, Turns, finish, judged, run_measured, versions_of
from benchmarks.synthetic_checkpoints import Family, family, warm
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.ops import MagnitudeSelection, Sparsifier, elect_and_sum, magnitude_select

WITH, WITHOUT = "mergekit on our kernels", "mergekit"
DENSITY, GAMMA = 0.3, 0.01
# mergekit's name: its parameters, then our election and whether we normalize.
SHARED = {"weight": 1.0, "density": DENSITY}
METHODS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "ties": (SHARED, "sum", True),
    "breadcrumbs_ties": (SHARED | {"gamma": GAMMA}, "sum", False),
    "breadcrumbs": (SHARED | {"gamma": GAMMA}, "none", False),
    "dare_ties": (SHARED, "sum", False),
    "dare_linear": (SHARED, "none", False),
}
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
    return [name for name in tensor_names(models, CHECKED) if "norm" not in name]


# --- what is right ---------------------------------------------------------------------------------------------------


def sparsifiers(method: str, base: Tensor, tuned: list[Tensor]) -> list[Sparsifier]:
    # As many elements as mergekit keeps: it rounds down.
    kept, dropped = int(DENSITY * base.numel()), int(GAMMA * base.numel())
    if method.startswith("dare"):
        return [Sparsifier(keep_probability=DENSITY, rescale=1 / DENSITY, substream=t) for t in range(len(tuned))]
    if method == "ties":
        return [Sparsifier(largest=magnitude_select(weight, kept, base=base)) for weight in tuned]
    return [
        Sparsifier(
            largest=magnitude_select(weight, kept + dropped, base=base),
            outliers=magnitude_select(weight, dropped, base=base),
        )
        for weight in tuned
    ]


def truth(method: str, base: Tensor, tuned: list[Tensor]) -> Tensor:
    """Return the update of a float64 merge, by our references."""
    _, election, normalize = METHODS[method]
    with use_backend(magnitude_select="torch", elect_and_sum="torch"):
        keep = sparsifiers(method, base, tuned)
        return (
            elect_and_sum(base, tuned, [1.0] * len(tuned), elect=election, normalize=normalize, sparsifiers=keep) - base
        )


def tied(method: str, base: Tensor, tuned: list[Tensor]) -> Tensor:
    """Mask of the elements whose magnitude equals a threshold of a task."""
    mask = torch.zeros(base.shape, dtype=torch.bool)
    for weight, keep in zip(tuned, sparsifiers(method, base, tuned), strict=True):
        for selection in (keep.largest, keep.outliers):
            if isinstance(selection, MagnitudeSelection):
                mask |= (weight - base).abs() == selection.threshold
    return mask


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
    """Return the largest error of an element, as a multiple of what is allowed."""
    largest = 0.0
    for name in checked_tensors(models):
        base, tuned = read(models.base, name), [read(model, name) for model in models.tuned]
        right, ties = expected(method, base, tuned)
        gap = (read(merged, name) - right).abs() / allowed_error(right, base, tuned)
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
    return {WITH: [str(python), "-m", "r_tsvm_kernels", *Path(peer[0]).name.split("-", 1), *peer[1:]], WITHOUT: peer}


def compile_python(python: Path, *names: str) -> None:
    """Let Python compile the files of both sides, and the system read them, before anything is timed."""
    for command in names:
        for call in both_sides(python, [str(python.with_name(command)), "--help"]).values():
            subprocess.run(call, check=True, env=environment(), capture_output=True)


def compare(
    models: Family, name: str, commands: dict[str, list[str]], out: Path, check: Check, unit: str, rounds: int
) -> list[Row]:
    """Run both sides in turn; check what the first round gave. The last two rows are what was checked."""
    turns, found = Turns(), {}
    for round_ in range(rounds):
        for side, command in commands.items():
            warm(models.files)
            run = run_measured(command, environment())
            turns.add(side, run.seconds, run.peak_bytes)
            if round_ == 0:
                found[side] = check(out)
            shutil.rmtree(out)
    case: dict[str, Any] = {
        "dtype": "bfloat16", "options": {"checkpoint": gigabytes(models.checkpoint_bytes), "tasks": len(models.tuned)}
    }  # fmt: skip
    rows = turns.rows(name, [WITHOUT], [WITH], **case)
    roles = {WITH: "ours", WITHOUT: "peer"}
    return rows + [row(name, side, "checked", found[side], unit=unit, role=roles[side], **case) for side in roles]


def compare_merge(models: Family, method: str, python: Path, rounds: int) -> list[Row]:
    out = models.base.parent / "out"
    commands = both_sides(python, mergekit_command(python, write_recipe(models, method), out))
    if method in RANDOM:
        unit = "norm of the update"
        *rows, ours, theirs = compare(
            models, method, commands, out, lambda merged: update_norm(models, merged), unit, rounds
        )
        return [*rows, judged(ours, abs(ours["median"] / theirs["median"] - 1) <= NORMS), theirs]
    unit = "of the allowed rounding"
    *rows, ours, theirs = compare(
        models, method, commands, out, lambda merged: largest_error(models, method, merged), unit, rounds
    )
    return [*rows, judged(ours, ours["median"] <= 1), theirs]


def compare_extraction(models: Family, python: Path, rounds: int, rank: int) -> list[Row]:
    out = models.base.parent / "out"
    arguments = ["--base-model", str(models.base), "--model", str(models.tuned[0]), "--out-path", str(out)]
    arguments += ["--max-rank", str(rank), "--no-cuda", "--quiet"]
    commands = both_sides(python, [str(python.with_name("mergekit-extract-lora")), *arguments])
    *rows, ours, theirs = compare(
        models, EXTRACTION, commands, out, lambda adapter: excess_error(models, adapter, rank), "of the least error",
        rounds,
    )  # fmt: skip
    return [*rows, judged(ours, ours["median"] <= 1), theirs]


def main() -> int:
    program = Program(__doc__, "mergekit_cli.json", "mergekit", rounds=5)
    parser = program.parser
    parser.add_argument("--size", type=float, default=0.25, metavar="GB", help="per model (default 0.25)")
    parser.add_argument("--extracted-size", type=float, default=0.08, metavar="GB", help="of the small models")
    parser.add_argument("--hidden", type=int, default=1024, help="width (default 1024)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    args = program.arguments()

    results = Results(args.json, ("safetensors",), replace=True)
    results.circumstances["versions"] |= versions_of(args.peer_python, "mergekit")
    methods = [case for case in args.cases if case != EXTRACTION]
    if methods:
        compile_python(args.peer_python, "mergekit-yaml")
        with family(args.folder, args.size, TASKS, args.hidden) as models:
            for method in methods:
                results.add(compare_merge(models, method, args.peer_python, args.rounds))
    if EXTRACTION in args.cases:
        compile_python(args.peer_python, "mergekit-extract-lora")
        with family(args.folder, args.extracted_size, 1, args.hidden) as models:
            results.add(compare_extraction(models, args.peer_python, args.rounds, args.hidden // RANK_SHARE))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
