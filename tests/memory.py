"""Peak memory of a piece of Python, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
