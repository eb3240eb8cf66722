"""Our methods and kernels inside mergekit: `install`, then use mergekit as before.

mergekit is imported, never copied (LGPL-3.0). It has no plug-in mechanism: methods exist in the process in which they
were registered. `rtsvm mergekit yaml` installs ours and then runs mergekit's own command.
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
    """Register our merge methods with mergekit and put much of what it computes itself on our kernels.

    Registered are the methods that mergekit lacks (`rtsvm`, `tsvm`, ...), with the parameters they have in our
    recipes; `exclude_keys` alone has no form there. On our kernels run its sparsifiers, task arithmetic and all that
    is made of the two (TIES, DARE, DELLA, Breadcrumbs), SCE, Model Stock, Karcher, SLERP, NuSLERP of whole tensors and
    Multi-SLERP, and the decomposition of its LoRA extraction.

    What mergekit has keeps its name, parameters and results, thresholds and fallbacks of its own included: to
    rounding, with the first of equal magnitudes kept, and random masks that follow torch's seed but are other draws
    than mergekit's. Tensors that require gradients, that are not finite or of a dtype or device our kernels do not
    take are left to mergekit.

    Calling it again changes `accelerate`. Warns once if the version of mergekit was never tested.

    Raises:
        IntegrationError: mergekit is not installed, too old, or not built as expected.
    """
    INSTALLATION.install(accelerate)


def uninstall() -> None:
    """Restore mergekit as it was. Without an installation nothing happens."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many times mergekit called each of our kernels and methods in this process."""
    return INSTALLATION.calls()
