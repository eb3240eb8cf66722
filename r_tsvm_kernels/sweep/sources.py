"""Where candidates come from: a grid, or a search that looks at the scores so far."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ..errors import ConfigError, JournalError
from .candidates import Candidate, checked, free_axes, free_parameters, group_of
from .journal import SweepJournal, key
from .plan import SweepPlan
from .scores import Objective
from .search import Study
from .trial import Trial


class Source(Protocol):
    """Gives candidates one by one.

    Attributes:
        total: number of candidates, those of earlier runs included.
    """

    total: int

    def next(self) -> Candidate | None:
        """Return a candidate that was not tried; None if there are no more."""

    def told(self, trial: Trial) -> None:
        """Take note of a trial."""

    def still_in(self, group: str) -> bool:
        """Whether more candidates of a group may come."""


class GridSource:
    """The candidates of a grid that are not in the journal."""

    def __init__(self, candidates: Sequence[Candidate], journal: SweepJournal) -> None:
        self.total = len(candidates)
        self._pending = [candidate for candidate in candidates if key(candidate.values) not in journal.trials]
        self._next = 0

    def next(self) -> Candidate | None:
        """Return the next candidate."""
        if self._next == len(self._pending):
            return None
        self._next += 1
        return self._pending[self._next - 1]

    def told(self, trial: Trial) -> None:
        """Do nothing: a grid does not depend on scores."""

    def still_in(self, group: str) -> bool:
        """Whether a candidate of this group comes later."""
        return any(candidate.group == group for candidate in self._pending[self._next :])


class SearchSource:
    """The candidates that a search asks for.

    A journal has everything that was asked and told, in order. Asking and telling the same again brings the search into
    the state that it had.
    """

    def __init__(
        self,
        plan: SweepPlan,
        study: Study,
        journal: SweepJournal,
        objective: Objective,
    ) -> None:
        self.total = plan.total
        self._config, self._axes, self._study = plan.config, plan.axes, study
        self._journal, self._objective = journal, objective
        self._trials: dict[str, Trial] = {}
        free = free_axes(plan.config, plan.axes)
        # Parts pay only if other candidates share them: not if their parameters are drawn from a range.
        self._share = plan.shares and all(axis.range is None for axis in plan.axes if axis not in free)
        self._asked = 0
        self._open: dict[str, tuple[int, dict[str, Any]]] = {}  # asked for, and not told
        self._replay()
        self._unfinished = sorted(self._open.values(), key=lambda item: item[0])

    def next(self) -> Candidate | None:
        """Return a candidate that an earlier run has left unfinished, or ask for another one."""
        if self._unfinished:
            return self._candidate(*self._unfinished.pop(0))
        while self._asked < self.total:
            values = self._study.ask()
            self._journal.ask(values)
            if self._is_new(values):
                return self._candidate(self._asked, values)
        return None

    def told(self, trial: Trial) -> None:
        """Tell the search what its candidate got."""
        score = self._objective.cost(trial, self._objective.ordered([trial])[0]) if trial.scores else None
        self._study.tell(trial.values, score)
        self._open.pop(key(trial.values), None)
        self._trials[key(trial.values)] = trial

    def still_in(self, group: str) -> bool:
        """Return True: a search may come back to any group."""
        return True

    def _candidate(self, number: int, values: dict[str, Any]) -> Candidate:
        own = checked(self._config, self._axes, values)
        from_parts = self._share and bool(free_parameters(own))
        return Candidate(number, values, own, group_of(own, self._axes, values), from_parts)

    def _is_new(self, values: dict[str, Any]) -> bool:
        """Count values that were asked for, and return whether to try them; tell the score of those that have one."""
        self._asked += 1
        if (before := self._trials.get(key(values))) is not None:
            self.told(before)
            return False
        if key(values) in self._open:  # told when the candidate that runs has its score
            return False
        self._open[key(values)] = self._asked, values
        return True

    def _replay(self) -> None:
        for event in self._journal.events:
            if isinstance(event, Trial):
                self.told(event)
                continue
            values = self._study.ask()
            if key(values) != key(event):
                raise JournalError(
                    f"the search does not ask for the same values again: {event} then, {values} now; start over with "
                    "--restart"
                )
            self._is_new(values)
        if self._asked > self.total:
            raise ConfigError(f"trials: {self._asked} have begun already, got {self.total}; ask for more")
