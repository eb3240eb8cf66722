"""Run `rtsvm` with the dispatch order that `dispatch_order.py` has suggested, without changing the package.

python benchmarks/with_order.py dispatch_order.json merge recipe.yaml OUT --device cuda
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.dispatch import ORDER

if __name__ == "__main__":
    suggested = json.loads(Path(sys.argv[1]).read_text())
    for op, order in suggested["order"].items():
        ORDER[op][suggested["device"]] = tuple(order)
    sys.exit(main(sys.argv[2:]))
