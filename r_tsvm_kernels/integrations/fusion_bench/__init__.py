"""Our methods as algorithms of FusionBench, and our solvers inside FusionBench's own algorithms.

`MergeAlgorithm` runs any of our methods as an algorithm of FusionBench, `PartsAlgorithm` merges from parts. `install`
makes FusionBench's TSVM, Iso-C, Iso-CTS and TIES use our solvers and kernels. FusionBench's command finds our
configurations on the search path

    fusion_bench hydra.searchpath=[pkg://r_tsvm_kernels.integrations.fusion_bench.conf] method=rtsvm/rtsvm ...

which ``rtsvm fusion-bench`` sets by itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..installation import Installation

if TYPE_CHECKING:
    from .algorithm import MergeAlgorithm
    from .kernels import Patches
    from .parts import PartsAlgorithm

SEARCH_PATH = f"pkg://{__name__}.conf"
_ALGORITHMS = {"MergeAlgorithm": ".algorithm", "PartsAlgorithm": ".parts"}

__all__ = ["INSTALLATION", "SEARCH_PATH", "MergeAlgorithm", "PartsAlgorithm", "calls", "install", "uninstall"]


def _patch() -> Patches:
    from .kernels import Patches

    return Patches()


INSTALLATION = Installation("fusion-bench", ["0.2.33"], _patch)


def install() -> None:
    """Make FusionBench's TSVM, Iso-C, Iso-CTS and TIES use our solvers and kernels, in this process.

    Names and parameters stay FusionBench's, and results agree with FusionBench's to its float32 rounding. FusionBench
    itself merges float64 and integer tensors, values that are not finite, TSVM with ``return_single_task_models`` and
    TIES with ``merge_func: max``. One result changes: if the task vectors of a matrix do not have full rank,
    FusionBench completes a basis with arbitrary directions, and we leave these out.

    Calling it again changes nothing. Warns once if the version of FusionBench was never tested.

    Raises:
        IntegrationError: FusionBench is not installed, too old, or not built as expected.
    """
    INSTALLATION.install()


def uninstall() -> None:
    """Undo `install`. Does nothing if nothing is installed."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many times FusionBench called each of our kernels and methods in this process."""
    return INSTALLATION.calls()


def __getattr__(name: str) -> Any:
    if name not in _ALGORITHMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    INSTALLATION.check_version()
    try:
        return getattr(import_module(_ALGORITHMS[name], __name__), name)
    except ImportError as error:
        raise INSTALLATION.does_not_fit(error) from error
