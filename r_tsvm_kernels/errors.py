"""Exceptions: one class per kind of mistake, each also an instance of the fitting built-in.

Every message says what was expected, what came, and what to do. The command line ends with ``exit_code``:
2 for a request that cannot be carried out as written, 1 for a merge that failed.
"""


class RtsvmError(Exception):
    """Base of every exception this package raises on purpose."""

    exit_code = 1


class ConfigError(RtsvmError, ValueError):
    """A recipe, an option or a combination of them is not valid."""

    exit_code = 2


class ShapeError(RtsvmError, ValueError):
    """Tensors that must have the same shape do not."""


class DTypeError(RtsvmError, TypeError):
    """A tensor has a dtype that the operation does not accept."""


class DeviceError(RtsvmError, ValueError):
    """Tensors lie on different devices, or the device asked for is not there."""

    exit_code = 2


class NonFiniteError(RtsvmError, ValueError):
    """An input holds NaN or infinity, or a merged value does not fit its dtype."""


class BackendUnavailableError(RtsvmError, RuntimeError):
    """The backend that was asked for by name cannot run here."""

    exit_code = 2


class IntegrationError(RtsvmError, ImportError):
    """A library that we plug into is not installed, too old, or not built as expected."""

    exit_code = 2


class ClusterError(RtsvmError, RuntimeError):
    """The Ray cluster cannot carry out the merge: not reachable, not alike on all machines, or it lost its workers."""


class ConvergenceError(RtsvmError, ArithmeticError):
    """A decomposition failed, or its certificate missed the tolerance on every route."""


class CheckpointError(RtsvmError, OSError):
    """A checkpoint is missing, damaged, hostile, or does not fit the others."""

    # OSError would turn two positional arguments into (errno, text); a message is all we pass.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InputChangedError(CheckpointError):
    """An input file is not what it was when the merge was planned."""


class DiskFullError(CheckpointError):
    """The disk has no room for the output."""


class PickleRefusedError(CheckpointError):
    """A checkpoint exists only as pickle, which can run code when it is loaded."""

    exit_code = 2


class QuantisedRefusedError(CheckpointError):
    """A model is quantised: its packed weights cannot be merged."""

    exit_code = 2


class AdapterRefusedError(CheckpointError):
    """A LoRA adapter does more than add a low-rank matrix to weights, or is of another type."""

    exit_code = 2


class OutputExistsError(CheckpointError):
    """The output path is already in use."""

    exit_code = 2


class OutputBusyError(CheckpointError):
    """Another merge is writing to the same output at this moment."""

    exit_code = 2


class OutputUnfinishedError(CheckpointError):
    """An earlier merge into the same output was stopped; the caller has to say whether to continue it."""

    exit_code = 2


class ResumeRefusedError(CheckpointError):
    """The merge that was stopped and the one that should continue it are not the same."""

    exit_code = 2


class JournalError(CheckpointError):
    """The journal of a merge is missing or damaged."""


class MemoryBudgetError(RtsvmError, MemoryError):
    """A memory budget is too small for the largest piece of work; the message names the smallest that works."""

    exit_code = 2
