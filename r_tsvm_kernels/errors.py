"""Exceptions: one class per kind of mistake, each also an instance of a built-in exception.

Messages say what was expected, what was given, and what to do. The command line exits with ``exit_code``: 2 for a
request that cannot be carried out as written, 1 for a merge that failed. All classes can be imported from
`r_tsvm_kernels`.
"""


class RtsvmError(Exception):
    """Base of every exception this package raises on purpose."""

    exit_code = 1


class ConfigError(RtsvmError, ValueError):
    """A recipe, an option or a combination of them is not valid."""

    exit_code = 2


class ShapeError(RtsvmError, ValueError):
    """Tensors have different shapes where equal ones are needed."""


class DTypeError(RtsvmError, TypeError):
    """A tensor has a dtype that the operation does not accept."""


class DeviceError(RtsvmError, ValueError):
    """Tensors are on different devices, or the requested device does not exist."""

    exit_code = 2


class NonFiniteError(RtsvmError, ValueError):
    """An input has NaN or infinity, or a merged value overflows its dtype."""


class BackendUnavailableError(RtsvmError, RuntimeError):
    """A backend that was requested by name cannot run here."""

    exit_code = 2


class IntegrationError(RtsvmError, ImportError):
    """A library that an integration needs is not installed, too old, or not built as expected."""

    exit_code = 2


class ClusterError(RtsvmError, RuntimeError):
    """The Ray cluster cannot run the merge: it is unreachable, its machines differ, or it lost its workers."""


class ConvergenceError(RtsvmError, ArithmeticError):
    """A decomposition failed, or its certificate missed the tolerance on every route."""


class EvaluationError(RtsvmError, RuntimeError):
    """No candidate of a sweep could be evaluated."""


class CheckpointError(RtsvmError, OSError):
    """A checkpoint is missing, damaged or malicious, or does not match the others."""

    # OSError would show two arguments as (errno, text); all of ours have one, the message.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InputChangedError(CheckpointError):
    """An input file has changed since the merge was planned."""


class DiskFullError(CheckpointError):
    """The disk is too full for the output."""


class PickleRefusedError(CheckpointError):
    """A checkpoint exists only as pickle, which can run code when loaded."""

    exit_code = 2


class QuantisedRefusedError(CheckpointError):
    """A model is quantised: its packed weights cannot be merged."""

    exit_code = 2


class AdapterRefusedError(CheckpointError):
    """An adapter is not LoRA, or does more than add low-rank matrices to weights."""

    exit_code = 2


class OutputExistsError(CheckpointError):
    """The output path is already in use."""

    exit_code = 2


class OutputBusyError(CheckpointError):
    """Another merge is writing to the same output now."""

    exit_code = 2


class OutputUnfinishedError(CheckpointError):
    """An earlier merge into the same output was stopped: choose whether to resume or restart it."""

    exit_code = 2


class ResumeRefusedError(CheckpointError):
    """The merge that should be resumed differs from the one that was stopped."""

    exit_code = 2


class JournalError(CheckpointError):
    """The journal of a merge is missing or damaged."""


class MemoryBudgetError(RtsvmError, MemoryError):
    """A memory limit is too small for the largest piece of work; the message names the smallest that works."""

    exit_code = 2
