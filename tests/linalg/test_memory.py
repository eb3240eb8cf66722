import json

import pytest
from memory import measured

from r_tsvm_kernels.linalg import fixed_rank, tsv_merge_bytes, tsv_merge_flops

CODE = """
from contextlib import ExitStack
from importlib import import_module
from unittest.mock import patch
import r_tsvm_kernels.linalg as linalg

merging = import_module("r_tsvm_kernels.linalg.eigen_merge")
solving = import_module("r_tsvm_kernels.linalg.leading_right_vectors")
solve, require = solving._solve, merging.Certificate.require

def spoiled_solve(matrix, rank, mode, route):  # every route to a task's subspace is given up but the last
    found = solve(matrix, rank, mode, route)
    if route != solving.ROUTES[-1]:
        raise merging.ConvergenceError("spoiled")
    return found

def spoiled_require(self):  # the merge is given up until its subspaces come from the last route
    if self.route != merging.ROUTES[-1]:
        raise merging.ConvergenceError("spoiled")
    require(self)

def run(shape, ranks, itemsize, spoil, **options):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if itemsize == 4 else torch.float64
    matrices = [torch.randn(*shape, generator=generator, dtype=dtype) for _ in ranks]
    if spoil == "rows":  # no task touched this row
        for matrix in matrices:
            matrix[3] = 0
    small = [torch.randn(300, 280) for _ in ranks]
    with ExitStack() as stack:
        if spoil == "subspaces":
            stack.enter_context(patch.object(solving, "_solve", spoiled_solve))
        if spoil == "merge":
            stack.enter_context(patch.object(merging.Certificate, "require", spoiled_require))
        linalg.tsv_merge(small, [20] * len(ranks), solver=options.get("solver", "eigen"))
        del small
        start()
        certificate = linalg.tsv_merge(matrices, ranks, **options).certificate
        return {"growth": growth(), "route": certificate.route}

print(json.dumps([run(**case) for case in json.loads(sys.argv[1])]))
"""


CASES = [
    ("", (768, 768), 3, {}),
    ("", (640, 640), 1, {"itemsize": 8}),
    ("rows", (4096, 512), 2, {"workspace": 16 << 20}),
    ("", (512, 512), 3, {"solver": "products"}),
    ("", (768, 768), 3, {"ranks": [60, 60, 60]}),
    ("rows", (16384, 256), 2, {"workspace": 16 << 20}),
    ("subspaces", (768, 768), 3, {"ranks": [60, 60, 60]}),
    ("merge", (640, 640), 1, {}),
    ("merge", (768, 768), 3, {}),
    ("merge", (512, 4096), 2, {"workspace": 16 << 20}),
]


@pytest.fixture(scope="module")
def found():
    """What each case needs, measured one after the other in one process."""
    return dict(zip(map(str, CASES), measured(CODE, json.dumps([arguments(*case) for case in CASES])), strict=True))


def arguments(spoil, shape, tasks, options):
    return {"shape": shape, "spoil": spoil, "ranks": [fixed_rank(shape, tasks)] * tasks, "itemsize": 4} | options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_measured_memory_is_below_the_bound(found, case):
    given = arguments(*case)
    spoil, shape = given.pop("spoil"), given.pop("shape")
    bound, got = tsv_merge_bytes(shape, **given), found[str(case)]
    assert bound / 4 < got["growth"] < bound
    if spoil in ("subspaces", "merge"):
        assert got["route"] == "svd-float64"


def test_bounds_grow_with_what_they_depend_on():
    assert tsv_merge_bytes((512, 256), [64, 64]) == tsv_merge_bytes((256, 512), [64, 64])
    assert tsv_merge_bytes((512, 256), [32, 32]) < tsv_merge_bytes((512, 256), [64, 64])
    assert tsv_merge_bytes((512, 256), [64, 64]) < tsv_merge_bytes((512, 256), [64, 64], itemsize=8)
    assert tsv_merge_bytes((8192, 512), [64], workspace=1 << 20) < tsv_merge_bytes((8192, 512), [64])
    assert tsv_merge_flops((1024, 512), [64, 64]) < tsv_merge_flops((1024, 512), [128, 128])
