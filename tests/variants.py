"""What the tests of every op vary: backends, dtypes, shapes, layouts in memory, kinds of values, threads."""

import math
from contextlib import contextmanager

import emulated_cuda
import pytest
import torch
from hypothesis import strategies as st

from r_tsvm_kernels import backends
from r_tsvm_kernels.ops import _cases

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def every_backend(op, *, reference=True):
    """Parametrise `backend` over all ways to run the op, each skipped with its reason where it cannot.

    "triton interpreted" runs the kernels in Triton's interpreter, with blocks as small as `op.small` says. "cuda
    forward" and "cuda reverse" run the CUDA sources in the emulator, threads and blocks in either order. "cublas
    simulated" takes products of the CPU for those of cuBLAS. "device" needs a GPU; there torch makes new tensors on it.
    Without `reference`, the reference is left out.
    """
    ways = ["torch"] * reference
    if "cpu" in op.backends:
        ways.append("cpu")
    if "triton" in op.backends:
        ways += ["triton interpreted", "triton device"]
    if "cuda" in op.backends:
        ways += [*(f"cuda {order}" for order in emulated_cuda.ORDERS), "cuda device"]
    if "cublas" in op.backends:
        ways += ["cublas simulated", "cublas device"]
    return some_backends(op, *ways)


def some_backends(op, *ways):
    """Parametrise `backend` over these ways to run the op: see `every_backend`."""
    return pytest.mark.parametrize("backend", ways_to_run(op, *ways), indirect=True)


def ways_to_run(op, *ways):
    """Return the parameters of the fixture `backend` for these ways to run the op: see `every_backend`."""
    return [pytest.param((op, way), id=way, marks=_marks(way)) for way in ways]


def on_devices(op):
    """Parametrise `backend` over the kernels of the op on a GPU."""
    return some_backends(op, *(f"{name} device" for name in ("triton", "cuda", "cublas") if name in op.backends))


def simulated(backend):
    """Whether an interpreter or an emulator runs this backend: it is slow, so tensors must be small."""
    return backend in ("triton", "cuda") and torch.get_default_device().type == "cpu"


def shapes(backend):
    """Shapes for a backend: around its blocks, and few elements where it is simulated."""
    if not simulated(backend):
        return SHAPES
    sizes = {"triton": [127, 128, 129, 257, 400], "cuda": [1023, 1024, 1025, 2048, 4099, 9001]}[backend]
    return st.one_of(
        st.one_of(st.integers(0, 70), st.sampled_from(sizes)).map(lambda n: (n,)),
        st.lists(st.integers(1, 15), min_size=2, max_size=3).filter(lambda s: math.prod(s) < 400).map(tuple),
    )


# For tests on a GPU. More than 2^31 elements take tens of GB: one after the other.
every_model_shape = pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (129, 1031), (4096, 4096), (14336, 4096)], ids=str
)
BEYOND_32_BITS = 2**31 + 5003
large = pytest.mark.xdist_group("large")


def _marks(way):
    name, _, where = way.partition(" ")
    if where == "interpreted":
        reason = backends.triton_interpreter_state()
    elif where in emulated_cuda.ORDERS:
        reason = backends.READY if emulated_cuda.CXX else "builds CUDA sources for the CPU: no C++ compiler on PATH"
    elif where == "simulated":
        reason = backends.READY
    elif where == "device" and not torch.cuda.is_available():
        reason = "needs a CUDA device"
    else:
        reason = backends.state(name)
    skip = pytest.mark.skipif(reason != backends.READY, reason=f"{way}: {reason}")
    if where == "reverse":  # repeats "forward"
        return [skip, pytest.mark.exhaustive]
    return [skip, pytest.mark.gpu] if where == "device" else [skip]


# How a tensor can be stored: each takes a tensor and returns one with the same values.
LAYOUTS = {"contiguous": lambda t: t, **_cases.LAYOUTS}
layout_names = st.sampled_from(sorted(LAYOUTS))

# Around blocks (512, 2048) and the chunk (32768) of the kernels, and on both sides of the size from which they sample.
SIZES = st.one_of(st.integers(0, 70), st.sampled_from([511, 513, 2047, 2048, 2049, 4097, 32767, 32769, 65535, 70001]))
SHAPES = st.one_of(SIZES.map(lambda n: (n,)), st.lists(st.integers(1, 40), min_size=2, max_size=3).map(tuple))


# Differences from a base: a generator of the values, given the shape.
VALUES = {
    "gaussian": lambda shape: 0.01 * torch.randn(shape),
    "all zero": torch.zeros,
    "all equal": lambda shape: torch.full(shape, 0.25) * (1 - 2 * torch.randint(0, 2, shape)),
    "two values": lambda shape: 0.25 * torch.randint(1, 3, shape),
    "ties": lambda shape: torch.randint(-4, 5, shape) / 64,
    "mostly zero": lambda shape: torch.randn(shape) * (torch.rand(shape) < 0.1),
    "heavy-tailed": lambda shape: torch.randn(shape).clamp(-4, 4) ** 7,
    "subnormal": lambda shape: torch.randint(-300, 300, shape) * 1.4e-45,
    "float16 subnormal": lambda shape: torch.randint(-300, 300, shape) * 2.0**-24,
    "ordered": lambda shape: torch.arange(torch.Size(shape).numel()).reshape(shape) / 4096,
    "one per row": lambda shape: torch.randn(shape[:1]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone(),
}


def group(shape, dtypes):
    """Return a base and one fine-tuned tensor near it for each further dtype."""
    origin = torch.randn(shape)
    return origin.to(dtypes[0]), [(origin + 0.1 * torch.randn(shape)).to(dtype) for dtype in dtypes[1:]]


@st.composite
def laid_out_groups(draw, shape=(9, 33), most=6):
    """Draw a base and fine-tuned tensors, `most` in all, of any dtypes and layouts."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=2, max_size=most))
    torch.manual_seed(draw(st.integers(0, 1000)))
    base, tuned = group(shape, dtypes)
    base, *tuned = (LAYOUTS[draw(layout_names)](tensor) for tensor in (base, *tuned))
    return base, tuned


@contextmanager
def torch_threads(count):
    """Run with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
