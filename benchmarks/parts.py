"""Time merges from parts against merging anew.

    python -m benchmarks.parts [--layers 3] [--shrink 2] [--rounds 5] [--folder DIR]

A base and three fine-tunes have the shapes of Mistral-7B, divided by `--shrink`, in bfloat16; the task vectors are
white noise. All sides merge with `tsvm` at k = r // T, embedding and head by mean, with other weights in each round:
anew, from parts in factors, and from dense parts. Each kind of parts is made once before, and a first round, which is
not timed, compares what is merged from them with the direct merge. Times are those of `merge_checkpoints` with files in
the page cache.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.program import Program, Turns, finish, judged
from benchmarks.synthetic_checkpoints import Family, family_of_shapes, mistral_shapes
from r_tsvm_kernels import MergeConfig, decompose_checkpoints, merge_checkpoints
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.checkpoint import Checkpoint
from r_tsvm_kernels.parts import from_parts

NAME, TASKS = "merges from parts", 3
# Ten times what the roundings of the output to bfloat16 may differ by, relative to the update.
ALLOWED = 1e-2


def measure(models: Family, folder: Path, rounds: int, case: dict[str, Any]) -> list[Row]:
    """Decompose once for each kind of parts, then merge in interleaved rounds."""
    own = {"base_model": models.base, "models": models.tuned, "exclude_keys": ["*embed_tokens*", "lm_head*"]}

    def recipe(number: int) -> MergeConfig:
        return MergeConfig("tsvm", alpha=0.8, weight=[1.0, 0.5 + number / 10, -0.25], **own)

    rows, turns = list[Row](), Turns()
    sides: dict[str, Callable[[int], MergeConfig]] = {"anew": recipe}
    for kind, dense in (("factors", False), ("dense", True)):
        parts, start = folder / kind, time.perf_counter()
        decompose_checkpoints(recipe(0), parts, dense_above=0 if dense else None)
        seconds, size = time.perf_counter() - start, sum(file.stat().st_size for file in parts.glob("*.safetensors"))
        rows.append(row(NAME, f"decompose, {kind}", "time", seconds, role="ours", **case))
        rows.append(row(NAME, f"decompose, {kind}", "size", size, role="ours", unit="B", **case))
        sides[f"from {kind}"] = lambda number, parts=parts: from_parts(recipe(number), parts)  # type: ignore[misc]
    for number in range(rounds + 1):
        for side, config in sides.items():
            out, start = folder / side, time.perf_counter()
            merge_checkpoints(config(number), out, measure_norms=False)
            if number:
                turns.add(side, time.perf_counter() - start)
        for side in list(sides)[1:]:
            if number == 0:
                error = difference(models.base, folder / "anew", folder / side)
                rows.append(judged(row(NAME, side, "error", error, **case), error <= ALLOWED))
        for side in sides:
            shutil.rmtree(folder / side)
    return [*turns.rows(NAME, ["anew"], list(sides)[1:], **case), *rows]


def difference(base: Path, direct: Path, other: Path) -> float:
    """Return the norm of the difference of two merged models, relative to that of the change of the base."""
    opened = [Checkpoint(folder) for folder in (base, direct, other)]
    apart, changed = 0.0, 0.0
    for name in opened[0].tensors:
        start, one, two = (model.load(name).double() for model in opened)
        apart += float((one - two).square().sum())
        changed += float((one - start).square().sum())
    return math.sqrt(apart / changed)


def main() -> int:
    program = Program(__doc__, "parts.json", rounds=5)
    program.parser.add_argument("--layers", type=int, default=3)
    program.parser.add_argument("--shrink", type=int, default=2, help="divides all sizes")
    program.parser.add_argument("--folder", type=Path, default=None, help="where the models are written")
    args = program.arguments()
    folder = args.folder or Path(tempfile.gettempdir())
    shapes = mistral_shapes(args.shrink)
    results = Results(args.json, (), replace=True)
    with family_of_shapes(folder, shapes, args.layers, TASKS, outputs=20) as models:
        case = {"options": {"tasks": TASKS, "GB": round(models.checkpoint_bytes / 1e9, 2)}, "dtype": "bfloat16"}
        with tempfile.TemporaryDirectory(prefix="rtsvm-parts-", dir=folder) as out:
            results.add(measure(models, Path(out), args.rounds, case))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
