"""Which versions of the libraries we plug into are installed, and which were tested."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from ..errors import IntegrationError


@cache
def check_version(package: str, tested: tuple[str, ...]) -> str:
    """Return the installed version of a package; warn once if it was never tested.

    Args:
        package: its name on PyPI.
        tested: the versions that were, oldest first.

    Raises:
        IntegrationError: it is not installed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        raise IntegrationError(
            f"{package} is not installed in this environment; run: pip install {package}=={tested[-1]}"
        ) from None
    if found not in tested:
        warnings.warn(
            f"{package} {found} was never tested with r_tsvm_kernels; tested: {', '.join(tested)}",
            RuntimeWarning,
            stacklevel=3,
        )
    return found
