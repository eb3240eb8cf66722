"""Exceptions: one class per kind of mistake, each also an instance of the fitting built-in.

Every message says what was expected, what came, and what to do. The command line ends with ``exit_code``:
2 for a request that cannot be carried out as written, 1 for a merge that failed.
"""


class RTsvmError(Exception):
    """Base of every exception this package raises on purpose."""

    exit_code = 1


class ConfigError(RTsvmError, ValueError):
    """A recipe, an option or a combination of them is not valid."""

    exit_code = 2


class ShapeError(RTsvmError, ValueError):
    """Tensors that must have the same shape do not."""


class DTypeError(RTsvmError, TypeError):
    """A tensor has a dtype that the operation does not accept."""


class DeviceError(RTsvmError, ValueError):
    """Tensors lie on different devices, or the device asked for is not there."""

    exit_code = 2


class NonFiniteError(RTsvmError, ValueError):
    """An input holds NaN or infinity, or a merged value does not fit its dtype."""


class BackendUnavailable(RTsvmError, RuntimeError):
    """The backend that was asked for by name cannot run here."""

    exit_code = 2


class IntegrationError(RTsvmError, ImportError):
    """A library that we plug into is not installed, too old, or not built as expected."""

    exit_code = 2


class ClusterError(RTsvmError, RuntimeError):
    """The Ray cluster cannot carry out the merge: not reachable, not alike on all machines, or it lost its workers."""


class ConvergenceError(RTsvmError, ArithmeticError):
    """A decomposition failed, or its certificate missed the tolerance on every route."""


class CheckpointError(RTsvmError, OSError):
    """A checkpoint is missing, damaged, hostile, or does not fit the others."""

    # OSError would turn two positional arguments into (errno, text); a message is all we pass.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InputChanged(CheckpointError):
    """An input file is not what it was when the merge was planned."""


class DiskFull(CheckpointError):
    """The disk has no room for the output."""


class PickleRefused(CheckpointError):
    """A checkpoint exists only as pickle, which can run code when it is loaded."""

    exit_code = 2


class QuantisedRefused(CheckpointError):
    """A model is quantised: its packed weights cannot be merged."""

    exit_code = 2


class AdapterRefused(CheckpointError):
    """A LoRA adapter does more than add a low-rank matrix to weights, or is of another type."""

    exit_code = 2


class OutputExists(CheckpointError):
    """The output path is already in use."""

    exit_code = 2


class OutputBusy(CheckpointError):
    """Another merge is writing to the same output at this moment."""

    exit_code = 2


class OutputUnfinished(CheckpointError):
    """An earlier merge into the same output was stopped; the caller has to say whether to continue it."""

    exit_code = 2


class ResumeRefused(CheckpointError):
    """The merge that was stopped and the one that should continue it are not the same."""

    exit_code = 2


class JournalError(CheckpointError):
    """The journal of a merge is missing or damaged."""


class MemoryBudgetError(RTsvmError, MemoryError):
    """A memory budget is too small for the largest piece of work; the message names the smallest that works."""

    exit_code = 2
