import json

import pytest
from memory import measured

from r_tsvm_kernels.linalg import weighted_merge_bytes, weighted_merge_flops

CODE = """
from contextlib import ExitStack
from importlib import import_module
from unittest.mock import patch
import r_tsvm_kernels.linalg as linalg

merging = import_module("r_tsvm_kernels.linalg.weighted_eigen")
solving = import_module("r_tsvm_kernels.linalg.leading_right_vectors")
roots = import_module("r_tsvm_kernels.linalg.weighted_tasks")
solve = solving._solve

def spoiled_solve(matrix, rank, mode, route):  # every route to a task's subspace is given up but the last
    found = solve(matrix, rank, mode, route)
    if route != solving.ROUTES[-1]:
        raise merging.ConvergenceError("spoiled")
    return found

def spoiled_root(gram):  # squaring loses a singular value
    raise merging.ConvergenceError("spoiled")

def run(shape, tasks, spoil, options):
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator) for _ in range(tasks)]
    if spoil == "rows":  # no task touched this row
        for matrix in matrices:
            matrix[3] = 0
    weights = [1.0 + t for t in range(tasks)]
    for size in ((60, 50), (260, 50)):
        linalg.weighted_merge([torch.randn(size) for _ in range(2)], [1.0, 2.0])
    with ExitStack() as stack:
        if spoil == "all":
            stack.enter_context(patch.object(solving, "_solve", spoiled_solve))
            stack.enter_context(patch.object(roots, "root_of_gram", spoiled_root))
        start()
        linalg.weighted_merge(matrices, weights, **options)
        return growth()

print(json.dumps([run(*case) for case in json.loads(sys.argv[1])]))
"""

CASES = [
    ((640, 640), 3, "", {}),
    ((640, 640), 3, "all", {"power": 0.5}),
    ((480, 480), 8, "rows", {"power": 0.5}),
    ((700, 512), 3, "all", {}),
    ((2048, 512), 3, "rows", {}),
    ((512, 4096), 2, "all", {"power": 0.5}),
    ((4096, 256), 16, "rows", {}),
    ((4096, 512), 3, "", {"workspace": 16 << 20}),
    ((2048, 512), 3, "", {"ranks": 100}),
    ((320, 320), 6, "", {"solver": "products"}),
    ((320, 1024), 3, "rows", {"solver": "products"}),
]


@pytest.fixture(scope="module")
def found():
    """What each case needs, measured one after the other in one process."""
    return dict(zip(map(str, CASES), measured(CODE, json.dumps(CASES)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_measured_memory_is_below_the_bound(found, case):
    shape, tasks, _, options = case
    given = {name: options[name] for name in ("power", "workspace", "solver") if name in options}
    bound = weighted_merge_bytes(shape, tasks, limited="ranks" in options, **given)
    assert bound / 3.5 < found[str(case)] < bound


def test_operations_grow_with_the_matrix_and_the_tasks():
    for power in (0.5, 1.0):
        for shape in ((512, 512), (2048, 512)):
            few, many = (weighted_merge_flops(shape, tasks, power=power) for tasks in (2, 8))
            double = weighted_merge_flops((2 * shape[0], 2 * shape[1]), 2, power=power)
            assert few < many < 4 * few
            assert double == pytest.approx(8 * few)
