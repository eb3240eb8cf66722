"""Our methods inside FusionBench, as algorithms of its own, and our solvers inside FusionBench's own algorithms.

`MergeAlgorithm` is any of our methods as an algorithm of FusionBench. `accelerate` puts FusionBench's TSVM, Iso-C,
Iso-CTS and TIES on our solvers and kernels. Its command finds our configurations on the search path

    fusion_bench hydra.searchpath=[pkg://r_tsvm_kernels.integrations.fusion_bench.conf] method=rtsvm/rtsvm ...

which ``rtsvm fusion-bench`` sets by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._versions import Library, check_version

if TYPE_CHECKING:
    from .algorithm import MergeAlgorithm
    from .kernels import Patches

LIBRARY = Library("fusion-bench", tested=("0.2.33",))
SEARCH_PATH = f"pkg://{__name__}.conf"

__all__ = ["LIBRARY", "SEARCH_PATH", "MergeAlgorithm", "accelerate", "calls", "restore"]

_installed: Patches | None = None


def accelerate() -> None:
    """Put FusionBench's TSVM, Iso-C, Iso-CTS and TIES on our solvers and kernels, in this process.

    Names, parameters and results stay FusionBench's, to the error of its own float32. Left to FusionBench are float64
    and integer tensors, values that are not finite, TSVM with ``return_single_task_models`` and TIES with
    ``merge_func: max``. One thing changes: where the task vectors of a matrix do not have full rank, FusionBench
    completes a basis with arbitrary directions, and we leave these out.

    Calling it again changes nothing. Warns once if the version of FusionBench was never tested.

    Raises:
        IntegrationError: FusionBench is not installed, too old, or not built as expected.
    """
    global _installed
    check_version(LIBRARY)
    try:
        from .kernels import Patches

        _installed = _installed or Patches()
    except (ImportError, AttributeError) as error:
        raise LIBRARY.does_not_fit(error) from error


def restore() -> None:
    """Restore FusionBench as it was; nothing happens if it was not accelerated."""
    global _installed
    if _installed is not None:
        _installed.undo()
        _installed = None


def calls() -> dict[str, int]:
    """Return how many times FusionBench came to each of our kernels and methods in this process."""
    from .counting import counts

    return dict(counts)


def __getattr__(name: str) -> Any:
    if name != "MergeAlgorithm":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version(LIBRARY)
    try:
        from .algorithm import MergeAlgorithm
    except ImportError as error:
        raise LIBRARY.does_not_fit(error) from error
    return MergeAlgorithm
