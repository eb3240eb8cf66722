"""Check the native module of an installed wheel, without torch: it loads, and computes with several threads."""

import ctypes
import sys
from pathlib import Path

from r_tsvm_kernels import _cpu

ELEMENTS, TASKS, THREADS, FLOAT32 = 1 << 18, 2, 4, 1


def main() -> None:
    """Exit with a message if something is wrong."""
    # The first published vector of Philox4x32-10 (Random123).
    if _cpu.philox((0, 0, 0, 0), 0) != (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8):
        sys.exit("random numbers are wrong")
    tuned = [(ctypes.c_float * ELEMENTS)(*[float(task + 1)] * ELEMENTS) for task in range(TASKS)]
    views = [(ctypes.addressof(values), 1, ELEMENTS, ELEMENTS, FLOAT32) for values in tuned]
    gram = (ctypes.c_double * TASKS**2)()
    _cpu.task_gram(views, None, 0, ctypes.addressof(gram), THREADS)
    if list(gram) != [ELEMENTS, 2.0 * ELEMENTS, 2.0 * ELEMENTS, 4.0 * ELEMENTS]:
        sys.exit(f"products are wrong: {list(gram)}")
    if "torch" in sys.modules:
        sys.exit("the native module loads torch")
    print(f"{Path(_cpu.__file__).name} works")


if __name__ == "__main__":
    main()
