"""Search with optuna: TPE, or CMA-ES."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, IntegrationError
from .axes import Axis
from .journal import key

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial as Asked

SEARCHES = ("tpe", "cmaes")


def check_search(search: str, axes: Sequence[Axis]) -> None:
    """Require that a search can vary what it is given; optuna need not be installed.

    Raises:
        ConfigError: an unknown search, or one that cannot choose among values.

    Examples:
        >>> check_search("tpe", [Axis("alpha", "alpha", "alpha", None, values=(0.5, 1.0))])
    """
    if search not in SEARCHES:
        raise ConfigError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    listed = [axis.label for axis in axes if axis.range is None]
    if search == "cmaes" and (listed or len(axes) < 2):
        wrong = f"{', '.join(listed)}: a list of values" if listed else "a single range"
        raise ConfigError(f"search cmaes takes two or more ranges of numbers, got {wrong}; use tpe")


class Study:
    """A search for the smallest cost, which asks for values and is told their costs.

    Equal calls in equal order give equal values.
    """

    def __init__(self, search: str, axes: Sequence[Axis], seed: int) -> None:
        """Begin a search.

        Raises:
            ConfigError: an unknown search, or one that cannot choose among values.
            IntegrationError: optuna, or cmaes, is not installed.
        """
        check_search(search, axes)
        optuna = _optuna(search)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(direction="minimize", sampler=_sampler(optuna, search, seed))
        self._failed = optuna.trial.TrialState.FAIL
        self._axes = axes
        self._open: dict[str, list[Asked]] = defaultdict(list)

    def ask(self) -> dict[str, Any]:
        """Return the next values to try, by label."""
        asked = self._study.ask()
        values = {axis.label: _suggested(asked, axis) for axis in self._axes}
        self._open[key(values)].append(asked)
        return values

    def tell(self, values: Mapping[str, Any], cost: float | None) -> None:
        """Tell the cost of values that were asked for; None: they failed."""
        for asked in self._open.pop(key(values), ()):
            self._study.tell(asked, cost, state=None if cost is not None else self._failed)


def versions(search: str) -> dict[str, str]:
    """Return the versions of the libraries that a search depends on.

    Raises:
        IntegrationError: as `Study`.
    """
    found = {"optuna": _optuna(search).__version__}
    if search == "cmaes":
        import cmaes

        found["cmaes"] = cmaes.__version__
    return found


def _suggested(asked: Asked, axis: Axis) -> Any:
    span = axis.range
    if span is None:
        # Any value, in an order: optuna's own choices are only plain values.
        return axis.values[asked.suggest_categorical(axis.label, range(len(axis.values)))]
    if span.whole:
        return asked.suggest_int(axis.label, int(span.low), int(span.high), log=span.log)
    return asked.suggest_float(axis.label, span.low, span.high, log=span.log)


def _sampler(optuna: Any, search: str, seed: int) -> BaseSampler:
    sampler: BaseSampler
    if search == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True)
    else:
        sampler = optuna.samplers.CmaEsSampler(seed=seed)
    return sampler


def _optuna(search: str) -> Any:
    try:
        import optuna

        if search == "cmaes":
            import cmaes  # noqa: F401
    except ImportError as error:
        raise IntegrationError(
            f"the search {search} needs {error.name}, which is not installed: pip install 'r_tsvm_kernels[search]'"
        ) from error
    return optuna
