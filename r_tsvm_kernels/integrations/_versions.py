"""Which versions of the libraries we plug into were tested; errors and warnings about the others."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from ..errors import IntegrationError


@dataclass(frozen=True)
class Library:
    """A library that we plug into.

    Attributes:
        name: under which pip knows it.
        tested: versions, the newest last.
    """

    name: str
    tested: tuple[str, ...]

    @property
    def advice(self) -> str:
        """How to install the newest tested version."""
        return f"run: pip install {self.name}=={self.tested[-1]}"

    def found(self) -> str:
        """Return the version that is installed.

        Raises:
            IntegrationError: there is none.
        """
        try:
            return version(self.name)
        except PackageNotFoundError:
            raise IntegrationError(f"{self.name} is not installed in this environment; {self.advice}") from None

    def does_not_fit(self, reason: object) -> IntegrationError:
        """Make the error for a library that lacks what we replace or build upon."""
        return IntegrationError(
            f"{self.name} {self.found()} is not built as expected ({reason}); tested: {', '.join(self.tested)}; "
            f"{self.advice}"
        )


@cache
def check_version(library: Library) -> None:
    """Warn, once, if the installed version of the library was never tested.

    Raises:
        IntegrationError: it is not installed.
    """
    found = library.found()
    if found not in library.tested:
        warnings.warn(
            f"{library.name} {found} was never tested with r_tsvm_kernels; tested: {', '.join(library.tested)}",
            RuntimeWarning,
            stacklevel=3,
        )
