"""The journal of a sweep: its settings, and what became of each candidate, on disk before the next one starts.

The first of its lines has the settings. Every other one is a `Trial`; or, of a search, the values that it asked for, so
that its state can be made again by asking in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..engine.fingerprint import difference
from ..engine.lines import Lines, read_lines
from ..errors import JournalError, ResumeRefusedError
from .trial import Trial

_TRIAL = TypeAdapter(Trial)
_ASKED = TypeAdapter(dict[str, Any])


class SweepJournal:
    """A journal that is open for more trials.

    Attributes:
        events: what happened, in order: trials, and values that a search asked for.
        trials: the last trial of each candidate, by `key`.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any], *, restart: bool = False, retry: bool = False) -> None:
        """Open the journal of a sweep, or start one.

        Args:
            file: of the journal.
            settings: everything that scores depend on.
            restart: forget what an earlier sweep found.
            retry: forget the candidates that failed.

        Raises:
            ResumeRefusedError: the journal has other settings.
            JournalError: the journal is damaged.
        """
        objects, end = ([], 0) if restart else read_lines(file)
        if objects:
            what = difference(objects[0], dict(settings))
            if what is not None:
                raise ResumeRefusedError(
                    f"{file.parent}: the sweep there has other settings ({what}); undo the change, or start over with "
                    "--restart (restart=True)"
                )
        self.events = [_event(file, entry) for entry in objects[1:]]
        self.trials = {key(event.values): event for event in self.events if isinstance(event, Trial)}
        if retry:
            self.trials = {own: trial for own, trial in self.trials.items() if trial.scores}
        self._lines = Lines(file, end)
        if not objects:
            self._lines.append([settings])

    def add(self, trial: Trial) -> None:
        """Add a trial; it is on disk on return."""
        self._lines.append([{"trial": asdict(trial)}])
        self.trials[key(trial.values)] = trial

    def ask(self, values: Mapping[str, Any]) -> None:
        """Add values that a search asked for; they are on disk on return."""
        self._lines.append([{"asked": dict(values)}])

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def key(values: Mapping[str, Any]) -> str:
    """Return a text that is the same for the same values."""
    return json.dumps(dict(values), sort_keys=True)


def _event(file: Path, entry: dict[str, Any]) -> Trial | dict[str, Any]:
    try:
        if entry.keys() == {"trial"}:
            return _TRIAL.validate_python(entry["trial"])
        if entry.keys() == {"asked"}:
            return _ASKED.validate_python(entry["asked"])
    except ValidationError as error:
        wrong = error.errors()[0]
        reason = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
    else:
        reason = f"keys {', '.join(entry)}"
    raise JournalError(f"{file}: not the journal of a sweep by this version ({reason}); start over with --restart")
