"""Replace functions of another library, the host, by ours, and restore them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any, Protocol

from ..errors import IntegrationError, NonFiniteError, RtsvmError


class Patches(Protocol):
    """The changes that an installation makes in the host. Creating it makes all of them, or none."""

    def undo(self) -> None:
        """Restore the host as it was."""


class Installation:
    """The installation of our functions in one host, in this process. At most one set of patches is active at a time.

    Args:
        host: name of the host as pip knows it.
        tested: versions of the host that were tested, the newest last.
        patch: imports the host, changes it and returns the patches. It may raise ImportError, AttributeError or
            TypeError if the host is not built as expected.
    """

    def __init__(self, host: str, tested: Sequence[str], patch: Callable[..., Patches] | None = None) -> None:
        self.host = host
        self.tested = tuple(tested)
        self.patches: Any = None
        self._patch = patch
        self._arguments: tuple[object, ...] = ()
        self._counts: Counter[str] = Counter()
        self._lock = Lock()  # hosts merge in several threads

    def install(self, *arguments: object) -> None:
        """Patch the host. Calling it again with the same arguments changes nothing.

        Args:
            arguments: for `patch`.

        Raises:
            IntegrationError: the host is not installed, too old, or not built as expected.
        """
        self.check_version()
        if self.patches is not None and self._arguments == arguments:
            return
        self.uninstall()
        assert self._patch is not None
        try:
            self.patches, self._arguments = self._patch(*arguments), arguments
        except (ImportError, AttributeError, TypeError) as error:
            raise self.does_not_fit(error) from error

    def uninstall(self) -> None:
        """Undo `install`. Does nothing if nothing is installed."""
        if self.patches is not None:
            self.patches.undo()
            self.patches = None

    def count(self, name: str) -> None:
        """Count one call of a kernel or method."""
        with self._lock:
            self._counts[name] += 1

    def calls(self) -> dict[str, int]:
        """Return how many times the host called each of our kernels and methods in this process."""
        with self._lock:
            return dict(self._counts)

    def check_version(self) -> None:
        """Warn, once, if the installed version of the host was never tested.

        Raises:
            IntegrationError: the host is not installed.
        """
        found = self.version()
        if found not in self.tested:
            _warn_once(self.host, found, self.tested)

    def version(self) -> str:
        """Return the version of the host that is installed.

        Raises:
            IntegrationError: the host is not installed.
        """
        try:
            return version(self.host)
        except PackageNotFoundError:
            raise IntegrationError(f"{self.host} is not installed in this environment; {self._advice}") from None

    def does_not_fit(self, reason: object) -> IntegrationError:
        """Make the error for a host that lacks a function that we replace or use."""
        return IntegrationError(
            f"{self.host} {self.version()} is not built as expected ({reason}); tested: {', '.join(self.tested)}; "
            f"{self._advice}"
        )

    @property
    def _advice(self) -> str:
        return f"run: pip install {self.host}=={self.tested[-1]}"


@cache
def _warn_once(host: str, found: str, tested: tuple[str, ...]) -> None:
    warnings.warn(
        f"{host} {found} was never tested with r_tsvm_kernels; tested: {', '.join(tested)}",
        RuntimeWarning,
        stacklevel=5,
    )


class Replacements:
    """Attributes of the host that are replaced.

    Args:
        replacements: triples of an owner (module, class or object), the name of its attribute, and a function that
            takes the original and returns the replacement. All originals are looked up before any is replaced.

    Raises:
        AttributeError: an owner has no such attribute; nothing is replaced.
    """

    def __init__(self, replacements: Sequence[tuple[Any, str, Callable[[Any], Any]]]) -> None:
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
        for (owner, name, original), (_, _, replace) in zip(self._originals, replacements, strict=True):
            setattr(owner, name, replace(original))

    def undo(self) -> None:
        """Put the originals back."""
        for owner, name, original in self._originals:
            setattr(owner, name, original)


def falling_back(
    ours: Callable[..., Any],
    errors: tuple[type[RtsvmError], ...] = (NonFiniteError,),
    left: Callable[[], object] = lambda: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a replacement that calls the host's original for inputs that we do not handle.

    Args:
        ours: has the signature of the original; returns None for inputs that the original should handle.
        errors: exceptions of `ours` after which the original is called too: hosts accept values that are not finite.
        left: called whenever the original is called.

    Returns:
        A function from the original to its replacement.
    """

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                result = ours(*args, **kwargs)
            except errors:
                result = None
            if result is None:
                left()
                return original(*args, **kwargs)
            return result

        return run

    return replace
