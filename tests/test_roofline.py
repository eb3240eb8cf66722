"""The floors that are predicted for a GPU follow from counts."""

import pytest

from benchmarks import RESULTS
from benchmarks.roofline import of_layers, of_ops
from r_tsvm_kernels.bench import REGISTRY, read_rows


def by_case(rows):
    found = {}
    for row in rows:
        found.setdefault(row["name"], {})[row["metric"]] = row["median"]
    return found


def test_floors_of_ops():
    found = by_case(of_ops())
    assert found.keys() == {name for name, entry in REGISTRY.items() if entry.group == "ops"}
    # Base in bfloat16 and update in float32 are read, the sum is written in float32.
    assert found["add_update"] == {"bytes": 10 * 4096**2, "floor": pytest.approx(10 * 4096**2 / 4.8e12)}
    assert found["symm_square"]["fp16"] == 3 * 4096**3
    assert found["gemm3"]["floor"] == pytest.approx(6 * 4096**3 / 989e12)


def test_floors_of_a_layer():
    found = by_case(of_layers())
    one = {(row["name"], *row["shape"], row["metric"]): row["median"]
           for row in read_rows(RESULTS / "gpu_work.json") if row["options"]["spectrum"] == "flat"}  # fmt: skip
    layer = {
        metric: sum(
            count * one[("tsv_merge", *shape, metric)]
            for shape, count in {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 3}.items()
        )
        for metric in ("fp16", "float64")
    }
    got = found["tsv_merge of a layer, spectrum flat"]
    assert {metric: got[metric] for metric in layer} == layer
    assert got["floor"] == pytest.approx(layer["fp16"] / 989e12 + layer["float64"] / 67e12)
