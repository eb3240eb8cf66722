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


class ConvergenceError(RTsvmError, ArithmeticError):
    """A decomposition failed, or its certificate missed the tolerance on every route."""


class CheckpointError(RTsvmError, OSError):
    """A checkpoint is missing, damaged, hostile, or does not fit the others."""

    # OSError would turn two positional arguments into (errno, text); a message is all we pass.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class PickleRefused(CheckpointError):
    """A checkpoint exists only as pickle, which can run code when it is loaded."""

    exit_code = 2


class OutputExists(CheckpointError):
    """The output path is already in use."""

    exit_code = 2
