"""The process in which kernels are checked, see `verdicts.children`: reads JSON from stdin, prints lines of JSON.

Stdin has the device and the backends of each op.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from .check import check_op


def main() -> None:
    """Check what stdin asks for."""
    asked = json.load(sys.stdin)
    # What compilers and libraries print goes to stderr.
    with os.fdopen(os.dup(1), "w", buffering=1) as lines:
        os.dup2(2, 1)
        device = torch.device(asked["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for op, kernels in asked["kernels"].items():
            for line in check_op(op, kernels, device):
                lines.write(json.dumps(line) + "\n")
                if device.type == "cuda":
                    torch.cuda.synchronize()  # after some errors every later call fails: this process then ends here


if __name__ == "__main__":
    main()
