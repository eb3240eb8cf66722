"""`sweep_checkpoints`: merge and evaluate candidates, and write the best."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import MergeConfig
from ..engine import Progress, choose_device
from ..engine.fingerprint import fingerprint
from ..errors import ConfigError, ConvergenceError, NonFiniteError, RtsvmError
from ..ops._checks import whole
from .candidates import Candidate
from .durations import parse_duration
from .evaluation import Evaluate, Evaluation, Outcome, make_evaluation
from .folder import JOURNAL, opened_folder
from .journal import SweepJournal
from .merger import Merger, Resources, notes_once
from .plan import Grids, Ranges, SweepPlan, plan_sweep
from .results import SweepResult, write_best, write_results
from .scores import Objective
from .search import Study, versions
from .sources import GridSource, SearchSource, Source
from .trial import Trial


@dataclass(frozen=True)
class SweepProgress:
    """State of a running sweep, passed to the `progress` callback.

    Attributes:
        done: number of candidates that have scores or have failed.
        total: number of all candidates.
        trial: the candidate that was just finished; None while a candidate is merged.
        values: values of the candidate that is merged, or was finished.
        merge: state of the merge; None if a candidate was finished.
    """

    done: int
    total: int
    values: dict[str, Any]
    trial: Trial | None = None
    merge: Progress | None = None


def sweep_checkpoints(
    config: MergeConfig | str | Path,
    out: str | Path,
    *,
    evaluate: Evaluate,
    grids: Grids | None = None,
    ranges: Ranges | None = None,
    search: str | None = None,
    trials: int | None = None,
    seed: int = 0,
    score: str | Sequence[str] | None = None,
    minimize: bool = False,
    jobs: int = 1,
    time_limit: str | float | None = None,
    evaluation_timeout: str | float | None = None,
    restart: bool = False,
    retry: bool = False,
    device: str = "auto",
    threads: int | None = None,
    memory: str | int | None = None,
    device_memory: str | int | None = None,
    shard_size: str | int = "5GB",
    allow_pickle: bool = False,
    progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Merge a recipe with many values of its parameters, evaluate each, and keep the best.

    Each candidate is merged into a folder that the next one uses again. What became of it is on disk before the next
    one starts: after an interruption of any kind, the same call goes on, and tries no candidate again.

    Args:
        config: recipe, or the path of its YAML file.
        out: a folder that does not exist, is empty, or holds the same sweep, which is continued.
        evaluate: a command with ``{model}`` in it, the last line of whose output is a number or a JSON object of
            numbers; the name of a function, ``module:function``, which is called in a process of its own; or a
            function, which is called in this process with the path of the model and returns a number or a mapping.
        grids: values by parameter, as text (``0.4:1.6:0.2``, ``0.5,1``) or as a sequence. The parameter of one model is
            ``weight.MODEL``. All combinations are tried.
        ranges: for a search, bounds by parameter: ``0.2:2``, ``0.01:1:log`` or a pair.
        search: ``tpe`` or ``cmaes``, from optuna; it chooses from `ranges`, and TPE also from `grids`.
        trials: number of candidates of a search, those of earlier runs included.
        seed: of the search.
        score: the score that decides, if the evaluation gives several; by default the first. More names, and
            ``NAME:min`` or ``NAME:max``, are for the table of candidates that no other beats.
        minimize: whether smaller scores are better, unless `score` says otherwise.
        jobs: evaluations at a time, each with a folder for its model.
        time_limit: no candidate starts after this time, in seconds or as ``2h``; the best so far is written.
        evaluation_timeout: a command that takes longer is stopped, and its candidate has failed.
        restart: forget what an earlier sweep in `out` found.
        retry: try candidates again that failed.
        device: as for `merge_checkpoints`, as are the next five.
        threads: see there.
        memory: see there.
        device_memory: see there.
        shard_size: see there.
        allow_pickle: see there.
        progress: called in the calling thread after each candidate, and while merging after each tensor.

    Returns:
        SweepResult with all trials and the best one, which is merged into ``OUT/best`` as `merge_checkpoints` does.

    Raises:
        ConfigError: the request is invalid.
        IntegrationError: the search is not installed.
        EvaluationError: no candidate has a score.
        OutputExistsError: `out` holds something else.
        OutputBusyError: another sweep into `out` is running.
        ResumeRefusedError, JournalError: the earlier sweep cannot be continued; the message says what changed.
        CheckpointError, ShapeError, DTypeError, MemoryBudgetError, InputChangedError, DiskFullError: as
            `merge_checkpoints`. A merge that overflows, or does not converge, is a candidate that failed.

    Examples:
        >>> import torch
        >>> from safetensors.torch import load_file, save_file
        >>> for name, value in (("base", 0.0), ("math", 1.0), ("code", 3.0)):
        ...     save_file({"w": torch.full((2, 2), value)}, f"{name}.safetensors")
        >>> config = MergeConfig("task_arithmetic", base_model="base.safetensors",
        ...                      models=["math.safetensors", "code.safetensors"])
        >>> def distance(model):
        ...     return abs(load_file(model / "base.safetensors")["w"].mean().item() - 2)
        >>> result = sweep_checkpoints(config, "sweep", evaluate=distance, minimize=True, grids={"alpha": "0.1:1:0.1"})
        >>> result.best.values, result.best.scores
        ({'alpha': 0.5}, {'score': 0.0})
    """
    start = time.monotonic()
    config, out = config if isinstance(config, MergeConfig) else MergeConfig.from_yaml(config), Path(out)
    resources = Resources(device, threads, memory, device_memory, shard_size, allow_pickle)
    objective = Objective.parse(score, minimize)
    deadline = None if time_limit is None else start + parse_duration(time_limit)
    timeout = None if evaluation_timeout is None else parse_duration(evaluation_timeout)
    if whole(jobs, "jobs") < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    if retry and search is not None:
        raise ConfigError("retry is for grids: a search has gone on from what failed")
    plan = plan_sweep(config, grids=grids, ranges=ranges, search=search, trials=trials, resources=resources)
    evaluation = make_evaluation(evaluate, timeout)
    study = None if search is None else Study(search, plan.axes, seed)
    settings = _settings(plan, evaluation, choose_device(device))
    if search is not None:
        # A grid can be judged again by another score; a search has followed the one that it was given.
        aim = {"score": next(iter(objective.names), ""), "minimize": objective.direction(*objective.names[:1] or [""])}
        settings["search"] = {"name": search, "seed": seed, "jobs": jobs, **versions(search), **aim}
    with notes_once(), opened_folder(out, restart) as work:
        journal = SweepJournal(out / JOURNAL, settings, restart=restart, retry=retry)
        with closing(journal):
            for trial in journal.trials.values():
                if trial.scores:
                    objective.check(trial.scores)
            source: Source
            if study is None:
                source = GridSource(plan.candidates, journal)
            else:
                source = SearchSource(plan, study, journal, objective)
            sweep = _Sweep(source, journal, evaluation, objective, work, resources, jobs, progress)
            complete = sweep.run(deadline)
            seconds = time.monotonic() - start
            result = write_results(out, plan, list(journal.trials.values()), objective, settings, complete, seconds)
            write_best(result, plan, resources, sweep.merging)
            if complete:
                shutil.rmtree(work, ignore_errors=True)
            return result


class _Sweep:
    """The loop over candidates. This thread merges and keeps the journal; commands are awaited by threads."""

    def __init__(
        self,
        source: Source,
        journal: SweepJournal,
        evaluation: Evaluation,
        objective: Objective,
        work: Path,
        resources: Resources,
        jobs: int,
        progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self._source, self._journal, self._evaluation, self._objective = source, journal, evaluation, objective
        self._progress = progress
        self._merger = Merger(work, resources, self.merging)
        self._slots = [work / f"job-{index}" for index in range(jobs)]
        self._running: dict[Future[Outcome], tuple[Candidate, Path, float, bool]] = {}
        self._merged: dict[str, Any] = {}

    def run(self, deadline: float | None) -> bool:
        """Try candidates until there are none, or until the deadline; return whether all were tried."""
        try:
            with ThreadPoolExecutor(len(self._slots)) as pool:
                try:
                    return self._try_all(pool, deadline)
                except BaseException:
                    self._evaluation.stop()
                    raise
        except BaseException as error:
            if isinstance(error, RtsvmError) or not isinstance(error, Exception):
                done = f"{len(self._journal.trials)} of {self._source.total} candidates are done"
                hint = f"{done}: run the same command again to go on"
                error.args = (f"{error}; {hint}" if str(error) else hint,)
            raise

    def _try_all(self, pool: ThreadPoolExecutor, deadline: float | None) -> bool:
        while True:
            self._collect()
            over, candidate = deadline is not None and time.monotonic() >= deadline, None
            if len(self._running) < len(self._slots) and not over:
                candidate = self._source.next()
            if candidate is not None:
                self._start(candidate, pool)
            elif self._running:
                wait(self._running, return_when=FIRST_COMPLETED)
            else:
                return not over or len(self._journal.trials) == self._source.total

    def _start(self, candidate: Candidate, pool: ThreadPoolExecutor) -> None:
        """Merge a candidate, and evaluate it: in this thread if there is only one job."""
        busy = {slot for _, slot, _, _ in self._running.values()}
        slot = next(slot for slot in self._slots if slot not in busy)
        slot.mkdir(parents=True, exist_ok=True)
        start, self._merged = time.monotonic(), candidate.values
        try:
            from_parts = self._merger.merge(candidate, slot / "model")
        except (NonFiniteError, ConvergenceError) as error:
            outcome = Outcome(0.0, failure=f"merge: {error}")
            self._record(candidate, outcome, time.monotonic() - start, candidate.from_parts)
            return
        if not self._source.still_in(candidate.group):
            self._merger.forget(candidate.group)
        seconds = time.monotonic() - start
        if len(self._slots) == 1:
            try:
                outcome = self._evaluation(slot / "model", slot)
            except BaseException:
                self._evaluation.stop()
                raise
            self._record(candidate, outcome, seconds, from_parts)
        else:
            future = pool.submit(self._evaluation, slot / "model", slot)
            self._running[future] = candidate, slot, seconds, from_parts

    def _collect(self) -> None:
        """Record the evaluations that have ended."""
        for future in [future for future in self._running if future.done()]:
            candidate, _, seconds, from_parts = self._running.pop(future)
            self._record(candidate, future.result(), seconds, from_parts)

    def _record(self, candidate: Candidate, outcome: Outcome, merge_seconds: float, from_parts: bool) -> None:
        expected = next((set(trial.scores) for trial in self._journal.trials.values() if trial.scores), None)
        scores, failure = outcome.scores, outcome.failure
        if scores and expected not in (None, set(scores)):
            failure = f"other scores than before: expected {', '.join(sorted(expected or ()))}, got {', '.join(scores)}"
            scores = {}
        trial = Trial(
            candidate.number,
            candidate.values,
            scores,
            failure,
            outcome.exit_status,
            outcome.stderr,
            round(merge_seconds, 6),
            round(outcome.seconds, 6),
            from_parts,
        )
        self._journal.add(trial)
        if scores:
            self._objective.check(scores)
        self._source.told(trial)
        if self._progress:
            done = len(self._journal.trials)
            self._progress(SweepProgress(done, self._source.total, trial.values, trial))

    def merging(self, state: Progress) -> None:
        """Take note of a merge that goes on, and of the evaluations that have ended meanwhile."""
        self._collect()
        if self._progress:
            done = len(self._journal.trials)
            self._progress(SweepProgress(done, self._source.total, self._merged, merge=state))


def _settings(plan: SweepPlan, evaluation: Evaluation, device: Any) -> dict[str, Any]:
    """Return everything that scores depend on, as JSON."""
    found = fingerprint(plan.merge, device)
    del found["shards"]
    found["recipe"] = plan.config.model_dump(mode="json")
    found["evaluation"] = evaluation.name
    found["varied"] = {axis.label: list(axis.values) if axis.range is None else repr(axis.range) for axis in plan.axes}
    return found
