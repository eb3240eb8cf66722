"""Write an adapter one module at a time, with its report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..engine import Progress
from ..engine.output import is_single_file, locked_stage, writing
from ..errors import ConfigError, OutputUnfinishedError
from ..files import write_json
from ..linalg import Certificate
from ..lora import Adapter, AdapterWriter, common_base_layers
from ..lora.adapter import WEIGHTS_FILE
from ..lora.adapter_config import CONFIG_FILE

REPORT = "lora_report.json"


@dataclass(frozen=True)
class ModuleReport:
    """One module of the adapter.

    Attributes:
        shape: of the weight for an extraction, else of ``B @ A``.
        rank: of the update in the adapter; 0 for an update of zero, whose module is not in the adapter.
        norm: Frobenius norm of the update before it was cut to that rank.
        captured_energy: share of the squared norm that the rank retains.
        certificate: accuracy of the spectral solve; None if QR and a small SVD sufficed.
        ranks: for a TSV-Merge, the rank kept of each adapter that has the module.
        energies: for a TSV-Merge, the captured energy of each.
    """

    shape: tuple[int, int]
    rank: int
    norm: float
    captured_energy: float
    certificate: Certificate | None = None
    ranks: tuple[int, ...] = ()
    energies: tuple[float, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A tensor that is left out of an adapter: LoRA cannot express its change, or the request excludes it.

    Attributes:
        reason: why it is left out.
        norm: Frobenius norm of its change; 0.0 if it did not change, or is excluded and cannot be compared.
    """

    reason: str
    norm: float


@dataclass(frozen=True, repr=False)
class AdapterResult:
    """A finished adapter.

    Attributes:
        path: folder of the adapter.
        report_path: the JSON report in that folder.
        modules: by name.
        left_out: tensors that are left out, by name; only an extraction has any.
        seconds: wall time.
    """

    path: Path
    report_path: Path
    modules: dict[str, ModuleReport]
    left_out: dict[str, LeftOut]
    seconds: float

    @property
    def captured_energy(self) -> float:
        """Share of the squared norm of the whole change, left-out tensors included, that the adapter retains."""
        return _energies(self.modules, self.left_out)["captured_energy"]

    @property
    def least_captured_energy(self) -> float:
        """Share of the squared norm of its change that the worst module retains."""
        return _energies(self.modules, self.left_out)["least_captured_energy"]

    @property
    def left_out_energy(self) -> float:
        """Share of the squared norm of the whole change in tensors that are left out."""
        return _energies(self.modules, self.left_out)["left_out_energy"]

    def __repr__(self) -> str:
        held = f"{len(self.modules)} modules, {100 * self.captured_energy:.4g} % of the energy"
        return f"AdapterResult({held}, {self.path}, {self.seconds:.3g} s)"


@dataclass
class AdapterOutput:
    """An adapter that is being written: the writer, bytes to read per tensor or module, entries of the report."""

    writer: AdapterWriter
    sizes: dict[str, int]
    progress: Callable[[Progress], None] | None
    modules: dict[str, ModuleReport] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    _bytes_done: int = 0

    def done(self, name: str) -> None:
        """Report progress after a tensor or module."""
        self._bytes_done += self.sizes[name]
        if self.progress:
            done = len(self.modules) + len(self.left_out)
            self.progress(Progress(name, done, len(self.sizes), self._bytes_done, sum(self.sizes.values())))


@contextmanager
def adapter_output(
    out: str | Path, dtype: torch.dtype, sizes: dict[str, int], progress: Callable[[Progress], None] | None
) -> Iterator[AdapterOutput]:
    """Yield an adapter that is written beside `out` and moved there at the end; a failure leaves nothing."""
    out = Path(out)
    if is_single_file(out):
        raise ConfigError(f"{out}: an adapter is a folder; choose a name that does not end in .safetensors")
    with locked_stage(out) as stage:
        if stage.journal.exists():
            raise OutputUnfinishedError(f"{out}: holds a stopped merge; resume that, or choose another output")
        stage.refuse_foreign((WEIGHTS_FILE, CONFIG_FILE, REPORT))
        stage.remove()
        try:
            with writing(out):
                stage.folder.mkdir()
                with AdapterWriter(stage.folder, dtype) as writer:
                    yield AdapterOutput(writer, sizes, progress)
                stage.publish()
        finally:
            stage.remove()


def finish_like(output: AdapterOutput, sources: Sequence[Adapter]) -> None:
    """Check the sources for changes and write the adapter with the settings of the first one.

    Raises:
        InputChangedError: a source has changed.
        CheckpointError: the sources store different base weights, so they do not belong to one base.
    """
    for name, weight in common_base_layers(sources):
        output.writer.add_base_layer(name, weight)
    for source in sources:
        source.check_unchanged()
    config = sources[0].config
    output.writer.finish(
        base=config.base_model_name_or_path, task_type=config.task_type, fan_in_fan_out=config.fan_in_fan_out
    )


def finish(output: AdapterOutput, out: Path, command: str, request: dict[str, Any], start: float) -> AdapterResult:
    """Write the report and return the result of a command.

    Args:
        output: the finished adapter.
        out: its final place.
        command: name of the command.
        request: arguments of the command, for the report.
        start: `time.perf_counter` at the start.
    """
    seconds = time.perf_counter() - start
    report = {
        "command": command,
        **request,
        "versions": {
            "r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "seconds": seconds,
        **_energies(output.modules, output.left_out),
        "modules": {name: asdict(module) for name, module in output.modules.items()},
        "left_out": {name: asdict(tensor) for name, tensor in output.left_out.items()},
    }  # fmt: skip
    write_json(output.writer.folder / REPORT, report)
    return AdapterResult(out, out / REPORT, output.modules, output.left_out, seconds)


def _energies(modules: dict[str, ModuleReport], left_out: dict[str, LeftOut]) -> dict[str, float]:
    """Return the properties of `AdapterResult` of these names."""
    lost = sum(tensor.norm**2 for tensor in left_out.values())
    whole = sum(module.norm**2 for module in modules.values()) + lost
    captured = sum(module.captured_energy * module.norm**2 for module in modules.values())
    return {
        "captured_energy": captured / whole if whole else 1.0,
        "least_captured_energy": min((module.captured_energy for module in modules.values()), default=1.0),
        "left_out_energy": lost / whole if whole else 0.0,
    }
