"""Scores of candidates: what an evaluation gave, which candidate is best, and which ones no other beats."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from ..methods import did_you_mean
from ..text import shortened
from .trial import Trial

# Name of the score of an evaluation that gives one number.
ONLY = "score"

Direction = Literal["max", "min"]


def as_scores(value: Any) -> dict[str, float]:
    """Return scores by name: a number, which gets the name ``score``, or a mapping of names to numbers.

    Raises:
        ValueError: it is neither, or a number is not finite.
    """
    named = value if isinstance(value, Mapping) else {ONLY: value}
    if not named:
        raise ValueError("no score: an empty object")
    found = {}
    for name, number in named.items():
        try:
            if isinstance(number, str | bool) or not isinstance(name, str):
                raise TypeError
            found[name] = float(number)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"the score {shortened(name)} is no number: {shortened(number)}") from None
        if not math.isfinite(found[name]):
            raise ValueError(f"the score {shortened(name)} is not finite: {number}")
    return found


def parse_scores(output: str) -> dict[str, float]:
    r"""Return the scores in the last line of a command's output, a number or a JSON object of numbers.

    Raises:
        ValueError: there are none.

    Examples:
        >>> parse_scores("loading\n0.75\n"), parse_scores('{"math": 0.5, "code": 0.25}')
        ({'score': 0.75}, {'math': 0.5, 'code': 0.25})
    """
    line = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    try:
        value = json.loads(line)
        if not isinstance(value, dict | int | float):
            raise ValueError
    except (ValueError, RecursionError):
        raise ValueError(
            "expected a number, or a JSON object of numbers, as the last line of stdout, got "
            + (shortened(line) if line else "no output")
        ) from None
    return as_scores(value)


@dataclass(frozen=True)
class Objective:
    """What is better.

    Attributes:
        names: the scores that were named, the deciding one first; empty: the first score of the evaluation decides.
        directions: of scores that were named with one.
        default: of all others.
    """

    names: tuple[str, ...] = ()
    directions: Mapping[str, Direction] | None = None
    default: Direction = "max"

    @classmethod
    def parse(cls, texts: str | Sequence[str] | None, minimize: bool = False) -> Objective:
        """Read names of scores, each alone or as ``NAME:min`` or ``NAME:max``.

        Examples:
            >>> Objective.parse(["accuracy", "seconds:min"]).direction("seconds")
            'min'
        """
        names, directions = list[str](), dict[str, Direction]()
        for text in [texts] if isinstance(texts, str) else texts or ():
            name, colon, end = text.rpartition(":")
            directed = bool(colon) and end in ("min", "max")
            names.append(name if directed else text)
            if directed:
                directions[name] = "min" if end == "min" else "max"
        if len(set(names)) < len(names) or "" in names:
            raise ConfigError(f"score: expected names of scores, each once, got {', '.join(map(repr, names))}")
        return cls(tuple(names), directions, "min" if minimize else "max")

    def direction(self, name: str) -> Direction:
        """Return whether more or less of a score is better."""
        return (self.directions or {}).get(name, self.default)

    def check(self, scores: Mapping[str, float]) -> None:
        """Require that an evaluation gave the scores that were named.

        Raises:
            ConfigError: it did not; the message has the nearest.
        """
        for name in self.names:
            if name not in scores:
                hint = did_you_mean(name, scores, f"the evaluation gave {', '.join(scores)}")
                raise ConfigError(f"score: no score {name!r}; {hint}; run again with another name: nothing is lost")

    def ordered(self, trials: Iterable[Trial]) -> list[str]:
        """Return the names of all scores, the deciding one first."""
        given = next((list(trial.scores) for trial in sorted(trials, key=lambda t: t.number) if trial.scores), [])
        return list(dict.fromkeys((*self.names, *given)))

    def cost(self, trial: Trial, name: str) -> float:
        """Return a number that is smaller for better scores."""
        return trial.scores[name] if self.direction(name) == "min" else -trial.scores[name]

    def ranked(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that have scores, the best first.

        Where the first score is equal, the next one decides; where all are, the one that was tried first comes first.
        """
        names = self.ordered(trials)
        return sorted((t for t in trials if t.scores), key=lambda t: ([self.cost(t, n) for n in names], t.number))

    def front(self, trials: Sequence[Trial]) -> set[int]:
        """Return the numbers of the trials that no other beats: as good in all scores, and better in one."""
        names = self.ordered(trials)
        costs = {t.number: tuple(self.cost(t, name) for name in names) for t in trials if t.scores}
        found = dict[int, tuple[float, ...]]()
        for number, own in sorted(costs.items(), key=lambda item: item[1]):
            # In this order no later one beats an earlier one.
            if not any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in found.values()
            ):
                found[number] = own
        return set(found)
