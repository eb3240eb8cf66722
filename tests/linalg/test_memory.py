import json

import pytest
from memory import measured

from r_tsvm_kernels.linalg import fixed_rank, tsv_merge_bytes, tsv_merge_flops

CODE = """
from importlib import import_module
import r_tsvm_kernels.linalg as linalg

options = json.loads(sys.argv[1])
(m, n), ranks, itemsize, spoil = (options.pop(key) for key in ("shape", "ranks", "itemsize", "spoil"))
merging = import_module("r_tsvm_kernels.linalg.eigen_merge")
if spoil == "subspaces":  # every route to a task's subspace is given up but the last
    solving = import_module("r_tsvm_kernels.linalg.leading_right_vectors")
    solve = solving._solve
    def spoiled(matrix, rank, mode, route):
        found = solve(matrix, rank, mode, route)
        if route != solving.ROUTES[-1]:
            raise merging.ConvergenceError("spoiled")
        return found
    solving._solve = spoiled
if spoil == "merge":  # the merge is given up until its subspaces come from the last route
    require = merging.Certificate.require
    def spoiled(self):
        if self.route != merging.ROUTES[-1]:
            raise merging.ConvergenceError("spoiled")
        require(self)
    merging.Certificate.require = spoiled

generator = torch.Generator().manual_seed(0)
dtype = torch.float32 if itemsize == 4 else torch.float64
matrices = [torch.randn(m, n, generator=generator, dtype=dtype) for _ in ranks]
if spoil == "rows":  # no task touched this row
    for matrix in matrices:
        matrix[3] = 0
small = [torch.randn(300, 280) for _ in ranks]
linalg.tsv_merge(small, [20] * len(ranks), solver=options.get("solver", "eigen"))
del small
start()
merged = linalg.tsv_merge(matrices, ranks, **options)
report(route=merged.certificate.route, escalations=merged.certificate.escalations)
"""


@pytest.mark.parametrize(
    "spoil, shape, tasks, options",
    [
        ("", (768, 768), 3, {}),
        ("", (640, 640), 1, {"itemsize": 8}),
        ("", (4096, 512), 2, {"workspace": 16 << 20}),
        ("", (512, 512), 3, {"solver": "products"}),
        ("", (768, 768), 3, {"ranks": [60, 60, 60]}),
        ("rows", (16384, 256), 2, {"workspace": 16 << 20}),
        ("subspaces", (768, 768), 3, {"ranks": [60, 60, 60]}),
        ("merge", (640, 640), 1, {}),
        ("merge", (768, 768), 3, {}),
        ("merge", (512, 4096), 2, {"workspace": 16 << 20}),
    ],
    ids=str,
)
def test_measured_memory_is_below_the_bound(spoil, shape, tasks, options):
    case = {"ranks": [fixed_rank(shape, tasks)] * tasks, "itemsize": 4} | options
    found = measured(CODE, json.dumps({"shape": shape, "spoil": spoil} | case))
    bound = tsv_merge_bytes(shape, **case)
    assert bound / 4 < found["growth"] < bound
    if spoil in ("subspaces", "merge"):
        assert found["route"] == "svd-float64"


def test_bounds_grow_with_what_they_depend_on():
    assert tsv_merge_bytes((512, 256), [64, 64]) == tsv_merge_bytes((256, 512), [64, 64])
    assert tsv_merge_bytes((512, 256), [32, 32]) < tsv_merge_bytes((512, 256), [64, 64])
    assert tsv_merge_bytes((512, 256), [64, 64]) < tsv_merge_bytes((512, 256), [64, 64], itemsize=8)
    assert tsv_merge_bytes((8192, 512), [64], workspace=1 << 20) < tsv_merge_bytes((8192, 512), [64])
    assert tsv_merge_flops((1024, 512), [64, 64]) < tsv_merge_flops((1024, 512), [128, 128])
