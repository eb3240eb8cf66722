"""Our methods and kernels inside mergekit: `install`, then use mergekit as before.

mergekit is imported, never copied (LGPL-3.0). It has no plug-in mechanism: methods exist only in the process that
registered them. `rtsvm mergekit yaml` installs ours and then runs mergekit's own command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..installation import Installation

if TYPE_CHECKING:
    from .patches import Patches

__all__ = ["INSTALLATION", "calls", "install", "uninstall"]


def _patch(accelerate: bool) -> Patches:
    from .patches import Patches

    return Patches(accelerate)


INSTALLATION = Installation("mergekit", ["0.1.5"], _patch)


def install(accelerate: bool = True) -> None:
    """Register our merge methods with mergekit, and make many of its own methods use our kernels.

    Registers the methods that mergekit lacks (`rtsvm`, `tsvm`, ...), with the parameters of our recipes except
    `exclude_keys`. These methods of mergekit use our kernels: its sparsifiers, task arithmetic and the methods made of
    the two (TIES, DARE, DELLA, Breadcrumbs), SCE, Model Stock, Karcher, SLERP, NuSLERP of whole tensors, Multi-SLERP,
    and the decomposition in its LoRA extraction.

    Methods of mergekit keep their names, parameters, thresholds and fallbacks. Their results stay the same up to
    rounding, with two exceptions: of equal magnitudes the first are kept, and random masks follow torch's seed but
    differ from mergekit's. mergekit itself handles tensors that require gradients, that are not finite, or whose dtype
    or device our kernels do not support.

    Calling it again changes `accelerate`. Warns once if the version of mergekit was never tested.

    Raises:
        IntegrationError: mergekit is not installed, too old, or not built as expected.
    """
    INSTALLATION.install(accelerate)


def uninstall() -> None:
    """Undo `install`. Does nothing if nothing is installed."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many times mergekit called each of our kernels and methods in this process."""
    return INSTALLATION.calls()
