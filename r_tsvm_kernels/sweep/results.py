"""The results of a sweep: sweep.json, the page, and the best candidate as a merge that stands alone."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..config import MergeConfig
from ..engine import Progress, choose_device, merge_checkpoints, verify_output
from ..engine.fingerprint import difference, fingerprint
from ..engine.journal import read_journal
from ..engine.output import journal_path, report_path, writing
from ..errors import EvaluationError
from ..files import write_json, write_text
from ..plan import make_plan
from ..report import plain, short_name
from ..sizes import parse_size
from .axes import with_values
from .folder import discard
from .merger import Resources
from .page import sweep_page
from .plan import SweepPlan
from .scores import Objective
from .trial import Trial, described

REPORT, PAGE, RECIPE, BEST = "sweep.json", "sweep.html", "best.yaml", "best"


@dataclass(frozen=True, repr=False)
class SweepResult:
    """A sweep.

    Attributes:
        path: its folder.
        best: the best trial; it is merged in ``PATH/best``.
        ranked: the trials that have scores, the best first.
        failed: the trials that have none.
        front: the trials that no other beats in all scores.
        scores: names of the scores, the deciding one first.
        complete: whether all candidates were tried; otherwise the time limit came first.
        total: number of candidates.
    """

    path: Path
    best: Trial
    ranked: tuple[Trial, ...]
    failed: tuple[Trial, ...]
    front: tuple[Trial, ...]
    scores: tuple[str, ...]
    complete: bool
    total: int

    def __repr__(self) -> str:
        tried = f"{len(self.ranked) + len(self.failed)} of {self.total} candidates, {len(self.failed)} failed"
        return f"SweepResult({tried}, best {described(self.best.values)}: {described(self.best.scores)}, {self.path})"

    @property
    def report_path(self) -> Path:
        """The JSON report."""
        return self.path / REPORT

    @property
    def page_path(self) -> Path:
        """The page for people."""
        return self.path / PAGE

    @property
    def best_path(self) -> Path:
        """The folder of the best merge."""
        return self.path / BEST


def write_results(
    out: Path,
    plan: SweepPlan,
    trials: Sequence[Trial],
    objective: Objective,
    settings: Mapping[str, Any],
    complete: bool,
    seconds: float,
) -> SweepResult:
    """Write the report of a sweep, as JSON and as a page, and return its result.

    Raises:
        EvaluationError: no candidate has a score.
        DiskFullError, CheckpointError: writing failed.
    """
    trials = sorted(trials, key=lambda trial: trial.number)
    ranked, names, front = objective.ranked(trials), objective.ordered(trials), objective.front(trials)
    report = plain(_report(plan, trials, objective, settings, ranked, names, front, complete, seconds))
    with writing(out):
        write_json(out / REPORT, report)
        write_text(out / PAGE, sweep_page(report))
    failed = tuple(trial for trial in trials if not trial.scores)
    if not ranked:
        why = f"all of {len(failed)} failed, the first one: {failed[0].failure}" if failed else "none was tried in time"
        on = "" if complete else f"; {plan.total - len(failed)} are left: run the same command again to go on"
        again = "--retry tries them again" if plan.search is None else "--restart starts the search over"
        raise EvaluationError(
            f"{out}: no candidate has a score: {why}; see {out / PAGE}{f'; {again}' if failed else ''}{on}"
        )
    ahead = tuple(trial for trial in ranked if trial.number in front)
    return SweepResult(out, ranked[0], tuple(ranked), failed, ahead, tuple(names), complete, plan.total)


def write_best(
    result: SweepResult, plan: SweepPlan, resources: Resources, progress: Callable[[Progress], None] | None
) -> None:
    """Write the recipe of the best candidate, and merge it from the models, unless that is done already.

    Raises:
        RtsvmError: as `merge_checkpoints`.
    """
    config = with_values(plan.config, plan.axes, result.best.values)
    with writing(result.path):
        write_text(result.path / RECIPE, config.to_yaml())
    if _is_merged(config, result.best_path, resources):
        return
    with writing(result.path):
        discard(result.best_path)
    merge_checkpoints(config, result.best_path, restart=True, progress=progress, **resources.keywords())


def _is_merged(config: MergeConfig, out: Path, resources: Resources) -> bool:
    """Whether a folder has the finished merge of a recipe, of the models as they are now, and undamaged."""
    if not (report_path(out).is_file() and journal_path(out).is_file()):
        return False
    plan = make_plan(config, parse_size(resources.shard_size), allow_pickle=resources.allow_pickle)
    try:
        before, _ = read_journal(journal_path(out))
        same = difference(before, fingerprint(plan, choose_device(resources.device))) is None
        return same and verify_output(out).ok
    except OSError:  # a damaged file, or a missing one
        return False


def _report(
    plan: SweepPlan,
    trials: Sequence[Trial],
    objective: Objective,
    settings: Mapping[str, Any],
    ranked: Sequence[Trial],
    names: Sequence[str],
    front: set[int],
    complete: bool,
    seconds: float,
) -> dict[str, Any]:
    config = plan.config
    models = [short_name(str(entry.model)) for entry in config.models]
    rank = {trial.number: place for place, trial in enumerate(ranked, 1)}
    return {
        "name": f"Sweep of {config.method.pretty_name} of {', '.join(dict.fromkeys(models))}",
        "method": {"name": config.merge_method, "pretty_name": config.method.pretty_name},
        "evaluation": settings["evaluation"],
        "search": settings.get("search"),
        "scores": [{"name": name, "better": objective.direction(name)} for name in names],
        "varied": [
            {"label": axis.label, "parameter": axis.parameter, "free": axis.label in plan.free,
             "model": None if axis.model is None else str(config.models[axis.model].model),
             "values": list(axis.values), "range": axis.range and asdict(axis.range)}
            for axis in plan.axes
        ],
        "total": plan.total,
        "complete": complete,
        "best": ranked[0].number if ranked else None,
        "candidates": [
            {**asdict(trial), "rank": rank.get(trial.number), "front": trial.number in front} for trial in trials
        ],
        "recipe": {"merge_method": config.merge_method, **config.model_dump(mode="json", exclude_defaults=True)},
        "recipe_yaml": config.to_yaml(),
        "best_yaml": with_values(config, plan.axes, ranked[0].values).to_yaml() if ranked else None,
        "versions": {**settings["versions"], "python": platform.python_version()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": settings["device"],
        "seconds": seconds,
    }  # fmt: skip
