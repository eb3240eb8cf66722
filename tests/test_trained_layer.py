"""The benchmark of a trained layer, on a small instance without the peer; the committed one keeps its bounds."""

import pytest
import torch

from benchmarks import RESULTS
from benchmarks.trained_layer import OURS, PEER, RECTANGLES, SQUARES, Layer, compare, decaying, trained
from r_tsvm_kernels.bench import published, read_rows
from r_tsvm_kernels.linalg import fixed_rank


class StandIn:
    """FusionBench's function as we have it."""

    def load(self, matrices):
        self.matrices = matrices

    def seconds(self):
        shape = tuple(self.matrices[0].shape)
        self.merged = published.tsv_merge(self.matrices, [fixed_rank(shape, len(self.matrices))] * len(self.matrices))
        return 1.0

    def result(self):
        return self.merged


def test_a_byte_is_predicted_from_those_before_it():
    layer = Layer(256)
    text = torch.randint(128, (2, 20))
    changed = text.clone()
    changed[:, 12] = (text[:, 12] + 1) % 128
    before, after = layer(text), layer(changed)
    assert before.shape == (2, 20, 128)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-5)


@pytest.mark.parametrize("kind", ["trained", "power 0.5"])
def test_rows_of_a_small_layer(kind):
    base, tuned = trained(128, steps=0.03) if kind == "trained" else decaying(128)
    names = [*SQUARES, *RECTANGLES] if kind == "trained" else ["q_proj", "gate_proj"]
    assert list(base) == names and len(tuned) == 3
    assert {tuple(base[name].shape) for name in names} <= {(128, 128), (352, 128), (128, 352)}
    assert all(not torch.equal(model[name], base[name]) for model in tuned for name in names)
    rows = [row for rows in compare(StandIn(), kind, base, tuned, 2) for row in rows]
    layer = [row for row in rows if row["options"]["matrix"] == "the layer"]
    times = {row["provider"]: row["median"] for row in layer if row["metric"] == "time"}
    assert times.keys() == {PEER, *OURS} and times[PEER] == 7.0
    errors = {row["provider"]: row["median"] for row in rows if row["metric"] == "error"}
    assert errors.keys() == {"tsvm", PEER} and max(errors.values()) < 1e-3


@pytest.mark.parametrize("deltas", ["trained", "power 0.5"])
def test_the_layer_is_merged_faster_than_by_the_peer_and_as_exactly(deltas):
    rows = [row for row in read_rows(RESULTS / "trained_layer.json") if row["options"]["deltas"] == deltas]
    layer = {
        row["provider"]: row["median"]
        for row in rows
        if row["metric"] == "speed-up" and row["options"]["matrix"] == "the layer"
    }
    assert layer["tsvm"] > 1.8 and layer["rtsvm"] > 1.8
    errors = {row["provider"]: row["median"] for row in rows if row["metric"] == "error"}
    assert errors["tsvm"] <= 2 * errors[PEER]
    assert {row["options"]["matrix"] for row in rows if row["shape"]} == (
        {*SQUARES, *RECTANGLES} if deltas == "trained" else {"q_proj", "gate_proj"}
    )
