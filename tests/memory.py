"""Peak memory of a piece of Python, measured in a process of its own; and of tensors, counted in this one."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Peak of resident memory since `start()`, in bytes. What was freed before is given back first, and not counted twice.
PROLOGUE = """
import ctypes, json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)

def _status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def start():
    global before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")

def growth():
    return _status("VmHWM") - before

def report(**facts):
    print(json.dumps({"growth": growth(), **facts}))
"""


def measured(code, *arguments):
    """Run code that calls `start()` and `report(...)`; return what it reported, with its `growth` in bytes.

    Code that measures several times prints JSON itself, with `growth()` after each `start()`.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not let a process reset its peak memory (/proc/self/clear_refs)")
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]))
    ran = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code, *arguments],
        # A fixed threshold: glibc's own moves, and then freed blocks stay in the heap and are counted as in use.
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return, while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._living = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._living:
                storage = tensor.untyped_storage()
                self._living.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key, nbytes):
        self._living.discard(key)
        self.now -= nbytes
