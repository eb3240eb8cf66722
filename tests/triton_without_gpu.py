"""Triton's own launches, up to the driver, for a GPU that is not there: kernels are specialised and compiled."""

from contextlib import contextmanager
from types import SimpleNamespace

import triton
from triton.backends.compiler import GPUTarget


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
def launches(architecture):
    """Launch kernels on tensors of the CPU; yield the list of recorded launches: (name, compiled kernel)."""
    driver, found = Driver(architecture), []
    run = triton.runtime.jit.JITFunction.run

    def noted(self, *arguments, **options):
        kernel = run(self, *arguments, **options)
        found.append((self.fn.__name__, kernel))
        return kernel

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    triton.runtime.jit.JITFunction.run = noted
    try:
        yield found
    finally:
        triton.runtime.jit.JITFunction.run = run
        triton.runtime.driver._active = before
