"""Triton's own launches, up to the driver, for a GPU that is not there: kernels are specialised and compiled."""

from contextlib import contextmanager
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget

BEYOND_32_BITS = 2**32


class Driver:
    """Stands in for the driver of a GPU: launches are recorded and do nothing."""

    def __init__(self, architecture):
        amd = str(architecture).startswith("gfx")
        self.target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture), 32)
        self.launched = []  # (name, compiled kernel)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132},
            load_binary=lambda name, binary, shared, device: (0, 0, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None

    def is_active(self):
        return True


@contextmanager
def launches(architecture, *, once=False):
    """Launch kernels on tensors of the CPU; yield the list of recorded launches: (name, compiled kernel, aligned).

    `aligned` says whether sizes are divisible by 16, so that accesses can be wide. On sm_90 each launch is compiled for
    more than 2^32 elements as well, for others the first launch of each kernel. With `once`, only the first launch of
    each kernel is compiled, as it is; for others the compiled kernel is None.
    """
    driver, found, known = Driver(architecture), [], set()
    run = triton.runtime.jit.JITFunction.run

    def noted(self, *arguments, **options):
        name, values = self.fn.__name__, dict(zip(self.arg_names, arguments, strict=False))
        first, aligned = self not in known, all(values.get(size, 0) % 16 == 0 for size in ("numel", "cols"))
        known.add(self)
        if once and not first:
            found.append((name, None, aligned))
            return
        variants = [values]
        if "numel" in values and not once and (first or architecture == "90"):
            variants.append({**values, "numel": values["numel"] + BEYOND_32_BITS})
        found.extend((name, run(self, *variant.values(), **options), aligned) for variant in variants)

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    triton.runtime.jit.JITFunction.run = noted
    try:
        yield found
    finally:
        triton.runtime.jit.JITFunction.run = run
        triton.runtime.driver._active = before
