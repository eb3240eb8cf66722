"""CUDA graphs of loops of many small launches, recorded once for given shapes and then launched as a whole.

The loops of `purification` and `polar_express` launch some twenty kernels per product and never wait for the device.
For small products (up to one or two thousand columns) the launches take longer than the computation; a graph is a
single launch. Nothing here has run on a GPU yet, so a recording proves itself: its first results must have the bits of
the function's, or no graph is used any more.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError

_LOG = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# The recorded kernels depend on the backends of these ops.
PRODUCTS = ("split_planes", "symm_gram", "symm_square", "purify_step", "gemm3")

# Number of remembered shapes; their memory has a separate bound.
SHAPES = 64
LIMIT = 2 << 30

# A process can record one graph at a time.
_recording_now = threading.Lock()


@dataclass
class Recording:
    """A recorded call that can run again on other values.

    Attributes:
        graph: the recorded graph; it works in memory of its own.
        inputs: copies of the arguments, which the graph reads.
        outputs: return value of the function, which the graph writes.
        nbytes: memory of all of them.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Any
    outputs: Any
    nbytes: int

    def __call__(self, arguments: Any) -> Any:
        """Copy `arguments` into the inputs of the graph, launch it, and return a copy of its outputs."""
        for own, given in zip(tensors_in(self.inputs), tensors_in(arguments), strict=True):
            own.copy_(given)
        self.graph.replay()
        return map_tensors(torch.clone, self.outputs)


def record(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Recording:
    """Record `function` for the shapes of `arguments`.

    The function must not wait for the device, nor depend on anything but its arguments. Temporary tensors come from the
    graph's own pool, which is freed with the graph.
    """
    device = next(tensors_in(arguments)).device
    # Tensors made in inference mode cannot be written outside of it.
    with _recording_now, torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        inputs = map_tensors(torch.clone, arguments)
        current = torch.cuda.current_stream(device)
        side = _recording_stream(device, current.cuda_stream)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function(*inputs)  # set up and compile before the recording
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # as `torch.cuda.graph` does, so that only the memory of the graph is counted
        before = torch.cuda.memory_reserved(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        pool = torch.cuda.memory_reserved(device) - before
    return Recording(graph, inputs, outputs, pool + sum(tensor.nbytes for tensor in tensors_in(inputs)))


@cache
def _recording_stream(device: torch.device, replayed_on: int) -> torch.cuda.Stream:
    """Return the stream on which graphs for the stream of that address are recorded.

    cuBLAS keeps a workspace (32 MiB on Hopper) for each stream until the process ends, and a graph uses the one of the
    stream it was recorded on. Graphs that run one after the other share it; graphs that may run concurrently must not.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Graphs:
    """Graphs by function and shapes; the least recently used one is dropped first.

    The first call for given shapes runs without a graph, because many shapes occur only once. The second is recorded,
    and compared with the function itself. If they differ, or recording fails, all later calls run without graphs.

    Attributes:
        limit: bytes of memory that the graphs may hold.
        failed: why there are no graphs any more; None if there may be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.failed: str | None = None
        self._known: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._too_large: set[Hashable] = set()

    @property
    def nbytes(self) -> int:
        """Memory of the graphs in bytes."""
        return sum(recording.nbytes for recording in self._known.values() if recording)

    def call(self, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
        """Return ``function(*arguments)``, from a graph if these shapes were seen before."""
        if self.failed is not None:
            return function(*arguments)
        key = (function, signature(arguments), self._circumstances(arguments))
        if key not in self._known or key in self._too_large:
            self._known.setdefault(key, None)
            self._drop()
            return function(*arguments)
        recording = self._known[key]
        if recording is None:
            expected = function(*arguments)
            recording = self._checked(function, arguments, expected)
            if recording is None:
                self._too_large.add(key)
                return expected
            self._known[key] = recording
            result: Any = expected
        else:
            result = recording(arguments)
        self._known.move_to_end(key)
        if recording.nbytes > self.limit:
            _wait(recording)
            self._too_large.add(key)
            self._known[key] = None
        self._drop()
        return cast(R, result)

    def _checked(self, function: Callable[..., Any], arguments: tuple[Any, ...], expected: Any) -> Recording | None:
        """Record a call that has the expected bits; None if there is no memory, or no graph can be trusted."""
        try:
            recording = record(function, arguments)
            found = recording(arguments)
        except torch.cuda.OutOfMemoryError:
            return None
        except RuntimeError as error:
            self.failed = str(error).partition("\n")[0]
        else:
            pairs = zip(tensors_in(found), tensors_in(expected), strict=True)
            if all(bool(torch.equal(one, other) or _both_nan(one, other)) for one, other in pairs):
                return recording
            _wait(recording)
            self.failed = "it gave other results"
        self.clear()
        _LOG.warning("%s as a CUDA graph: %s; merging goes on without graphs", function.__name__, self.failed)
        return None

    def clear(self) -> None:
        """Free all memory."""
        for recording in self._known.values():
            _wait(recording)
        self._known.clear()
        self._too_large.clear()

    def _drop(self) -> None:
        while len(self._known) > SHAPES or self.nbytes > self.limit:
            key, recording = self._known.popitem(last=False)
            _wait(recording)
            self._too_large.discard(key)

    @staticmethod
    def _circumstances(arguments: tuple[Any, ...]) -> Hashable:
        """Return what else a graph depends on: the chosen kernels, and the stream of its buffers."""
        device = next(tensors_in(arguments)).device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        return stream, tuple(dispatch.chosen(op, device.type) for op in PRODUCTS)


_active: ContextVar[Graphs | None] = ContextVar("cuda_graphs", default=None)


@contextmanager
def use_cuda_graphs(limit: int = LIMIT) -> Iterator[Graphs]:
    """Launch the loops of solver ``products`` as CUDA graphs inside a ``with`` block; on a CPU nothing changes.

    It saves time in merges of many layers of the same few shapes: the second layer of a shape is recorded, later ones
    are single launches. The results are the same bits. It applies to the thread that opens the block. It has not run on
    a GPU yet: each recording is checked once, see `Graphs`.

    Args:
        limit: bytes of GPU memory that graphs may hold between calls, beside the memory of `tsv_merge`; the end of the
            block frees all of it. A single graph above the limit is dropped after its first use.

    Yields:
        The graphs; their `nbytes` is the memory they hold.

    Raises:
        ConfigError: `limit` is negative.

    Examples:
        >>> with use_cuda_graphs(limit=1 << 30) as graphs:
        ...     graphs.nbytes
        0
    """
    if limit < 0:
        raise ConfigError(f"use_cuda_graphs: limit must be a number of bytes, got {limit}")
    graphs = Graphs(limit)
    token = _active.set(graphs)
    try:
        yield graphs
    finally:
        _active.reset(token)
        graphs.clear()


def replayed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return ``function(*args)``; inside `use_cuda_graphs`, and for tensors on a GPU, by a graph.

    Args:
        function: at module level, waits for no device, and depends on its arguments alone.
        args: tensors, dataclasses and sequences of them, and hashable values.
        kwargs: a call with keywords is not recorded.
    """
    graphs = _active.get()
    if graphs is None or kwargs or not _recordable(next(tensors_in(args))):
        return function(*args, **kwargs)
    return graphs.call(function, args)


def _recordable(tensor: Tensor) -> bool:
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _both_nan(one: Tensor, other: Tensor) -> bool:
    """Whether tensors have the same values, NaN in the same places."""
    return (
        bool(one.isnan().any())
        and torch.equal(one.isnan(), other.isnan())
        and torch.equal(one.nan_to_num(0.0), other.nan_to_num(0.0))
    )


def _wait(recording: Recording | None) -> None:
    """Wait for the graph, which may still run, before its memory is freed."""
    for device in {tensor.device for tensor in tensors_in(recording and recording.inputs) if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dataclasses and sequences."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from tensors_in(part)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from tensors_in(getattr(tree, field.name))


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply `function` to each tensor of nested dataclasses and sequences."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, part) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tensors(function, getattr(tree, f.name)) for f in fields(tree)})
    return tree


def signature(tree: Any) -> Hashable:
    """Return a key of `tree`: everything except the values of its tensors."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device
    if isinstance(tree, (tuple, list)):
        return tuple(signature(part) for part in tree)
    if is_dataclass(tree):
        return type(tree), tuple(signature(getattr(tree, field.name)) for field in fields(tree))
    return cast(Hashable, tree)
