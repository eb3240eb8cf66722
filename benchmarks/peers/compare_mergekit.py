"""Time `rtsvm merge` against `mergekit-yaml`, whole commands on the same recipes: wall time and peak memory.

    python -m benchmarks.peers.compare_mergekit [--peer-python PATH] [--size 0.8] [--rounds 5] [--minutes 5]
                                                [--methods NAME ...] [--folder DIR] [--json FILE]

A base and two fine-tunes of `--size` GB each have Llama's shapes, in bfloat16. Both commands run in interleaved rounds
with the inputs in the page cache. A method has `--rounds` rounds, or fewer: after `--minutes` minutes no further one
starts. `--size 0.8` needs 4 GB of disk.

What is right is defined in `compare_mergekit_cli`: elements for methods without chance, the norm of the update for
random masks. The other methods are compared with mergekit's output: the norm of the difference must be within what
rounding to bfloat16 explains. Nothing is compared where the two differ by design (docs/mergekit.md): `della*` rescales
by probabilities, `model_stock` stays at the base where task vectors are more than 90 degrees apart, as independent
noise is half of the time, and `arcee_fusion` takes exact quantiles.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import TASKS, gigabytes, mergekit_command, read
from benchmarks.peers.compare_mergekit_cli import (
    COMMON,
    NORMS,
    PARAMETERS,
    RANDOM,
    checked_tensors,
    environment,
    largest_error,
    update_norm,
)
from benchmarks.program import Program, Turns, finish, judged, run_measured, versions_of
from benchmarks.synthetic_checkpoints import Family, family, merge_command, warm
from r_tsvm_kernels.bench import Results, Row, row

OURS, THEIRS = "rtsvm merge", "mergekit-yaml"
# Methods of two models; the first is the base where mergekit wants one.
OF_TWO = {
    "linear": ({"weight": 0.5}, {}),
    "slerp": ({}, {"t": 0.4}),
    "nuslerp": ({"weight": 0.5}, {}),
    "multislerp": ({"weight": 0.5}, {}),
    "nearswap": ({}, {"t": 0.001}),
    "arcee_fusion": ({}, {}),
    "ram": ({}, {}),
}
WITH_BASE = {"slerp", "nearswap", "arcee_fusion"}
METHODS = (*OF_TWO, *PARAMETERS, *COMMON)
OTHER = {"arcee_fusion", "della", "della_linear", "model_stock"}
# Both sides round each element to bfloat16, and mergekit also sums some methods in it.
ROUNDING = 3 * 2**-8


def write_recipe(models: Family, method: str) -> Path:
    """Write a recipe that both commands read."""
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    own, shared = OF_TWO.get(method, (PARAMETERS.get(method, {}), COMMON.get(method, {})))
    recipe["models"] = [{"model": str(model)} | ({"parameters": own} if own else {}) for model in models.tuned]
    recipe |= {"parameters": shared} if shared else {}
    if method in WITH_BASE:
        recipe["base_model"] = str(models.tuned[0])
    elif method not in (*OF_TWO, "karcher") or method == "ram":
        recipe["base_model"] = str(models.base)
    file = models.base.parent / f"{method}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


def difference(models: Family, one: Path, other: Path) -> float:
    """Return the norm of the difference of two merged models, relative to one of them."""
    apart = sum((read(one, name) - read(other, name)).square().sum() for name in checked_tensors(models))
    size = sum(read(one, name).square().sum() for name in checked_tensors(models))
    return float(apart / size) ** 0.5


def compare(models: Family, method: str, python: Path, rounds: int, minutes: float) -> list[Row]:
    """Run both sides in turn."""
    recipe, outs = write_recipe(models, method), {side: models.base.parent / side for side in (OURS, THEIRS)}
    commands = {
        OURS: merge_command(recipe, outs[OURS]),
        THEIRS: mergekit_command(python, recipe, outs[THEIRS]),
    }
    turns, start, checks = Turns(), time.perf_counter(), list[Row]()
    case: dict[str, Any] = {
        "dtype": "bfloat16", "options": {"checkpoint": gigabytes(models.checkpoint_bytes), "tasks": len(models.tuned)}
    }  # fmt: skip
    for round_ in range(rounds):
        for side, command in commands.items():
            shutil.rmtree(outs[side], ignore_errors=True)
            warm(models.files)
            run = run_measured(command, environment())
            turns.add(side, run.seconds, run.peak_bytes)
        if round_ == 0:
            checks = check(models, method, outs, case)
        if time.perf_counter() - start > 60 * minutes:
            break
    for out in outs.values():
        shutil.rmtree(out)
    print(f"{method}: {[{side: turns.seconds(side) for side in commands}]}", file=sys.stderr)
    return [*turns.rows(method, [THEIRS], [OURS], **case), *checks]


def check(models: Family, method: str, outs: dict[str, Path], case: dict[str, Any]) -> list[Row]:
    """Judge what both sides have written; nothing where they differ by design."""
    if method in OTHER:
        return []
    if method in OF_TWO:
        found = difference(models, outs[THEIRS], outs[OURS])
        apart = row(method, OURS, "checked", found, unit="of the merged model", role="ours", **case)
        return [judged(apart, found <= ROUNDING)]
    if method in RANDOM:
        unit, (ours, theirs) = "norm of the update", (update_norm(models, outs[side]) for side in (OURS, THEIRS))
    else:
        unit = "of the allowed rounding"
        ours, theirs = (largest_error(models, method, outs[side]) for side in (OURS, THEIRS))
    good = abs(ours / theirs - 1) <= NORMS if method in RANDOM else ours <= 1
    return [
        judged(row(method, OURS, "checked", ours, unit=unit, role="ours", **case), good),
        row(method, THEIRS, "checked", theirs, unit=unit, role="peer", **case),
    ]


def main() -> int:
    program = Program(__doc__, "mergekit.json", "mergekit", rounds=5)
    parser = program.parser
    parser.add_argument("--size", type=float, default=0.8, metavar="GB", help="per model (%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the models (%(default)s)")
    parser.add_argument("--minutes", type=float, default=5, help="after which a method has no further round")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    args = program.arguments()
    results = Results(args.json, ("safetensors",), replace=True)
    results.circumstances["versions"] |= versions_of(args.peer_python, "mergekit")
    for command in ([sys.executable, "-m", "r_tsvm_kernels"], [args.peer_python.with_name("mergekit-yaml")]):
        run_measured([*map(str, command), "--help"], environment())  # Python compiles
    with family(args.folder, args.size, TASKS, args.hidden) as models:
        for method in args.methods:
            results.add(compare(models, method, args.peer_python, args.rounds, args.minutes))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
