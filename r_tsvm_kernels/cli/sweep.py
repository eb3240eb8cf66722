"""Merge with many values of parameters, evaluate each candidate, and keep the best.

  rtsvm sweep recipe.yaml OUT --eval 'python evaluate.py {model}' ...
      ... --grid alpha=0.4:1.6:0.2 --grid weight.math=0.5,1
      ... --search tpe --trials 40 --range alpha=0.2:2

The last line that the command prints is its score: a number, or a JSON object of numbers. --eval also takes a Python
function, as module:function or file.py:function. Run the same command again to go on after an interruption. OUT gets
the best merge (OUT/best), its recipe (OUT/best.yaml), the results (OUT/sweep.json) and a page (OUT/sweep.html).
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..sizes import format_size
from .progress import shown_sweep
from .recipe import add_recipe_arguments, make_config
from .resources import add_resource_arguments, chosen_backends
from .terminal import console, say

if TYPE_CHECKING:
    from ..sweep import SweepPlan, SweepResult

HELP = "find the best parameters of a merge"
USAGE = """\
rtsvm sweep [options] --grid P=VALUES --eval CMD RECIPE.yaml OUT
       rtsvm sweep [options] --grid P=VALUES --eval CMD --base B --model A OUT"""

# Rows of the table, and groups of the plan, that are printed.
_MOST_ROWS = 25
_MOST_GROUPS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("paths", metavar="[RECIPE.yaml] OUT", nargs="+", help="recipe file (if any) and output")
    group = parser.add_argument_group("what to try")
    group.add_argument(
        "--grid",
        metavar="P=VALUES",
        action="append",
        default=[],
        help="start:stop:step or a,b,c for a parameter, or for P.MODEL, that of one model; several: all combinations",
    )
    group.add_argument("--search", choices=("tpe", "cmaes"), help="search with optuna instead: TPE or CMA-ES")
    group.add_argument(
        "--range", metavar="P=LOW:HIGH", action="append", default=[], help="bounds of a search; LOW:HIGH:log; repeat"
    )
    group.add_argument("--trials", type=int, metavar="N", help="number of candidates of a search")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of a search (default 0)")
    group = parser.add_argument_group("how to evaluate")
    group.add_argument(
        "--eval",
        metavar="CMD",
        required=True,
        help="command with {model} in it, or module:function, or file.py:function",
    )
    group.add_argument(
        "--score",
        metavar="NAME",
        action="append",
        default=[],
        help="the score that decides (default: the first); NAME:min, NAME:max; repeat for further ones",
    )
    group.add_argument("--minimize", action="store_true", help="smaller scores are better")
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="evaluations at a time (default 1)")
    group.add_argument("--eval-timeout", metavar="TIME", help="stop a command that takes longer, e.g. 10m")
    group.add_argument("--time-limit", metavar="TIME", help="start no candidate after this time, e.g. 2h")
    add_recipe_arguments(parser)
    group = add_resource_arguments(parser)
    group.add_argument("--restart", action="store_true", help="forget what an earlier sweep into OUT has found")
    group.add_argument("--retry", action="store_true", help="try candidates of a grid again that failed")
    group.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan, try all candidates, and print a table of the best."""
    from ..errors import ConfigError

    if len(arguments.paths) > 2:
        raise ConfigError(f"expected [RECIPE.yaml] OUT, got {len(arguments.paths)} paths: {' '.join(arguments.paths)}")
    if len(arguments.paths) == 1 and arguments.paths[0].endswith((".yaml", ".yml")) and not arguments.model:
        raise ConfigError(
            f"no output: name a folder after the recipe, as in `rtsvm sweep ... {arguments.paths[0]} OUT`"
        )
    recipe, out = (None, *arguments.paths) if len(arguments.paths) == 1 else arguments.paths
    config = make_config(arguments, recipe)

    from ..engine import choose_device
    from ..sweep import plan_sweep, sweep_checkpoints
    from ..sweep.merger import Resources

    resources: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("device", "threads", "memory", "device_memory", "shard_size", "allow_pickle")
    }
    what: dict[str, Any] = {
        "grids": _pairs(arguments.grid, "--grid"),
        "ranges": _pairs(arguments.range, "--range"),
        "search": arguments.search,
        "trials": arguments.trials,
    }
    with chosen_backends(arguments.backend, choose_device(arguments.device)):
        if not arguments.quiet or arguments.dry_run:
            for line in plan_lines(plan_sweep(config, **what, resources=Resources(**resources))):
                say(line)
        if arguments.dry_run:
            return 0
        with shown_sweep(arguments.quiet) as show:
            result = sweep_checkpoints(
                config,
                out,
                evaluate=arguments.eval,
                **what,
                seed=arguments.seed,
                score=arguments.score,
                minimize=arguments.minimize,
                jobs=arguments.jobs,
                time_limit=arguments.time_limit,
                evaluation_timeout=arguments.eval_timeout,
                restart=arguments.restart,
                retry=arguments.retry,
                **resources,
                progress=show,
            )
    if not arguments.quiet:
        _print_result(result)
    return 0


def _pairs(items: list[str], option: str) -> dict[str, str]:
    from ..errors import ConfigError

    found = dict[str, str]()
    for item in items:
        name, equals, values = item.partition("=")
        if not (name.strip() and equals):
            raise ConfigError(f"{option} takes PARAMETER=VALUES, got {item!r}")
        if name.strip() in found:
            raise ConfigError(f"{option} {name.strip()}: given twice; write all values of a parameter in one place")
        found[name.strip()] = values
    return found


def plan_lines(plan: SweepPlan) -> list[str]:
    """Return the plan of a sweep for people."""
    labels = [axis.label for axis in plan.axes]
    sizes = " x ".join(f"{axis.label} ({len(axis.values) or 'range'})" for axis in plan.axes)
    lines = [f"{plan.config.method.pretty_name}: {plan.total} candidates: {sizes}"]
    bound = [label for label in labels if label not in plan.free]
    if plan.free:
        why = "" if plan.shares else "; but candidates of this recipe share none"
        lines.append(f"free in shared parts: {', '.join(plan.free)}; not free: {', '.join(bound) or 'nothing'}{why}")
    if plan.search is not None:
        from ..plan import total_flops

        one = _cost("a merge from the models", total_flops(plan.merge), plan.merge.bytes_read)
        return [*lines, f"search {plan.search}; {one}"]
    shared = [group for group in plan.groups if group.from_parts]
    for group in shared[:_MOST_GROUPS]:
        common = ", ".join(f"{label}={value}" for label, value in group.values.items()) or "all candidates"
        once = _cost(f"{common}: parts, once", group.flops, group.bytes_read)
        lines.append(f"  {once}, {format_size(group.bytes_of_parts)} of parts")
        lines.append(f"    {group.candidates} candidates from it, each {format_size(group.bytes_per_candidate)} read")
    if len(shared) > _MOST_GROUPS:
        lines.append(f"  and {len(shared) - _MOST_GROUPS} more groups with parts")
    if plan.merged_anew:
        alone = next(group for group in plan.groups if not group.from_parts)
        lines.append(f"  {_cost(f'{plan.merged_anew} merged from the models, each', alone.flops, alone.bytes_read)}")
    about = "" if all(group.known for group in plan.groups) else "about "
    lines.append(f"in all: {about}{plan.flops:.1e} operations, {about}{format_size(plan.bytes_read)} read")
    lines.append(f"each candidate writes {format_size(plan.merge.bytes_written)}, in place of the one before")
    return lines


def _cost(what: str, flops: float, bytes_read: int) -> str:
    return f"{what}: {flops:.1e} operations, {format_size(bytes_read)} read"


def _print_result(result: SweepResult) -> None:
    from rich import box
    from rich.table import Table

    from ..sweep.durations import format_duration
    from ..sweep.trial import described, written
    from ..text import printable

    table = Table(box=box.SIMPLE_HEAD)
    several = len(result.scores) > 1
    head = ["", *result.best.values, *result.scores, *(["front"] if several else []), "merge", "evaluation"]
    for index, title in enumerate(head):
        table.add_column(printable(title), justify="left" if index == 0 else "right")
    front = {trial.number for trial in result.front}
    shown = [*result.ranked[:_MOST_ROWS], *(t for t in result.front if t not in result.ranked[:_MOST_ROWS])]
    for place, trial in enumerate(shown, 1):
        cells = [*map(written, trial.values.values()), *(written(trial.scores[name]) for name in result.scores)]
        cells += ["*" if trial.number in front else ""] if several else []
        spent = map(format_duration, (trial.merge_seconds, trial.evaluation_seconds))
        table.add_row("best" if place == 1 else "", *map(printable, cells), *spent)
    console().print(table)
    left = len(result.ranked) - len(shown)
    if left > 0:
        say(f"{left} more are in {result.page_path}")
    for trial in result.failed[:_MOST_GROUPS]:
        say(f"failed: {described(trial.values)}: {trial.failure}")
    if len(result.failed) > _MOST_GROUPS:
        say(f"{len(result.failed) - _MOST_GROUPS} more failed: see {result.page_path}")
    if not result.complete:
        tried = len(result.ranked) + len(result.failed)
        say(f"time limit: {tried} of {result.total} candidates were tried; run the same command again to go on")
    say(f"best: {described(result.best.values)}: {described(result.best.scores)} -> {result.best_path}")
    say(f"report: {result.page_path}; its recipe: {result.path / 'best.yaml'}")
