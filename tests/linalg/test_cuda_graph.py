"""The bookkeeping of CUDA graphs, and that the loops can be graphs: on the CPU, from a tape of torch's operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg import use_cuda_graphs
from r_tsvm_kernels.linalg.products import cuda_graph, purification
from r_tsvm_kernels.linalg.products.cuda_graph import Graphs, map_tensors, tensors_in
from r_tsvm_kernels.linalg.products.merge import products_tsv_merge
from r_tsvm_kernels.linalg.products.number_formats import arithmetic
from r_tsvm_kernels.linalg.products.polar_express import coefficients, compose


class Tape(TorchDispatchMode):
    """As a CUDA graph: the same operations again, in the same memory, without the Python between them."""

    nbytes = 100

    def __init__(self, function, arguments):
        super().__init__()
        self.steps = []
        self.inputs = map_tensors(torch.clone, arguments)
        with self:
            self.outputs = function(*self.inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host asks for a value"
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def __call__(self, arguments):
        for own, given in zip(tensors_in(self.inputs), tensors_in(arguments), strict=True):
            own.copy_(given)
        for func, args, kwargs, result in self.steps:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if new is not old:
                    old.copy_(new)
        return map_tensors(torch.clone, self.outputs)


@pytest.fixture
def tapes(monkeypatch):
    """Tapes instead of graphs, and tensors on the CPU treated as if they lay on a GPU."""
    made = []

    def record(function, arguments):
        made.append(Tape(function, arguments))
        return made[-1]

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(cuda_graph, "_recordable", lambda tensor: True)
    monkeypatch.setattr(purification, "_all", lambda done: False)
    return made


def purify_arguments(seed, precision, n=40):
    """What `leading_eigenspaces` calls `purify` with, but fewer steps."""
    numbers = arithmetic(precision)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(2, n, n, generator=generator, dtype=torch.float64)).Q
    gram = (Q * torch.rand(2, 1, n, generator=generator, dtype=torch.float64)) @ Q.mT
    start = numbers.measured(numbers.load((gram + gram.mT) / 2))
    rank = torch.tensor([7.0, 20.0 + seed])
    return start, rank, [(torch.full_like(rank, 0.5), torch.full_like(rank, 1e-3))], 2, numbers, 25


def polar_arguments(seed, precision):
    numbers = arithmetic(precision)
    matrix = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loaded = numbers.load(matrix / 16)
    return loaded, numbers.gram(loaded), coefficients(1e-3, 1e-7), numbers


def assert_same(got, expected):
    for one, other in zip(tensors_in(got), tensors_in(expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "float32"])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(purification.purify, purify_arguments), (compose, polar_arguments)],
    ids=["sp2", "polar"],
)
def test_a_loop_replayed_on_other_values_gives_the_same_bits(tapes, function, arguments, precision):
    graphs = Graphs(1000)
    for seed in range(4):
        given = arguments(seed, precision)
        assert_same(graphs.call(function, given), function(*given))
        assert len(tapes) == min(seed, 1)  # the second call is recorded
    assert graphs.nbytes == Tape.nbytes


def test_a_merge_from_graphs_gives_the_same_bits(tapes, monkeypatch):
    monkeypatch.setattr(purification, "STEPS", dict.fromkeys(purification.STEPS, 40))
    layers = torch.randn(3, 3, 50, 40)
    expected = [products_tsv_merge(layer, [13, 12, 11]) for layer in layers]
    with use_cuda_graphs() as graphs:
        got = [products_tsv_merge(layer, [13, 12, 11]) for layer in layers]
        # Bounds of the spectra of tasks and bases, both levels of the purification, both polar factors.
        assert len(tapes) == 6 and graphs.nbytes == 600
    assert graphs.nbytes == 0
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.matrix, other.matrix)
        assert [part.outer_steps for part in one.parts] == [part.outer_steps for part in other.parts]


def double(x, factor=2.0):
    return [x * factor]


def test_results_stay_when_the_graph_runs_again(tapes):
    graphs = Graphs(1000)
    results = [graphs.call(double, (torch.full((2,), float(i)),))[0] for i in range(4)]
    assert [float(x[0]) for x in results] == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    "other",
    [(torch.zeros(3),), (torch.zeros(2, dtype=torch.float64),), (torch.zeros(2, 2)[:, 0],), (torch.zeros(2), 3.0)],
    ids=["shape", "dtype", "stride", "value"],
)
def test_what_differs_is_recorded_separately(tapes, other):
    graphs = Graphs(1000)
    for _ in range(2):
        graphs.call(double, (torch.zeros(2),))
    graphs.call(double, other)
    assert len(tapes) == 1
    graphs.call(double, other)
    assert len(tapes) == 2


def test_another_backend_is_recorded_separately(tapes):
    graphs = Graphs(1000)
    for _ in range(2):
        graphs.call(double, (torch.zeros(2),))
    with use_backend(gemm3="triton"):
        graphs.call(double, (torch.zeros(2),))
    assert len(tapes) == 1


def test_memory_is_bounded(tapes):
    graphs = Graphs(250)
    for size in (1, 1, 2, 2, 1, 3, 3):
        graphs.call(double, (torch.zeros(size),))
    assert graphs.nbytes == 200 and len(tapes) == 3  # of size 2, the least recently used, nothing is left
    graphs.call(double, (torch.zeros(1),))
    assert len(tapes) == 3
    for _ in range(2):
        graphs.call(double, (torch.zeros(2),))
    assert len(tapes) == 4


def test_a_graph_above_the_limit_is_not_kept(tapes):
    graphs = Graphs(Tape.nbytes - 1)
    for i in range(4):
        assert graphs.call(double, (torch.full((2,), float(i)),))[0][0] == 2 * i
    assert len(tapes) == 1 and graphs.nbytes == 0


def test_the_number_of_shapes_is_bounded(tapes, monkeypatch):
    monkeypatch.setattr(cuda_graph, "SHAPES", 2)
    graphs = Graphs(1000)
    for size in (1, 2, 3, 1):
        graphs.call(double, (torch.zeros(size),))
    assert not tapes


def test_on_a_cpu_nothing_changes():
    matrices = torch.randn(2, 30, 20)
    expected = products_tsv_merge(matrices, [10, 10]).matrix
    with use_cuda_graphs() as graphs:
        assert all(torch.equal(products_tsv_merge(matrices, [10, 10]).matrix, expected) for _ in range(2))
        assert graphs.nbytes == 0 and not graphs._known


def test_a_negative_limit_is_refused():
    with pytest.raises(ConfigError, match="limit"), use_cuda_graphs(limit=-1):
        pass


def wrong(function, arguments):
    tape = Tape(function, arguments)
    return lambda given: [x + 1 for x in tape(given)]


def refused(function, arguments):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\na long trace")


@pytest.mark.parametrize(("recorder", "why"), [(wrong, "other results"), (refused, "not permitted")])
def test_a_recording_that_fails_or_is_wrong_ends_all_graphs(tapes, monkeypatch, caplog, recorder, why):
    monkeypatch.setattr(cuda_graph, "record", recorder)
    monkeypatch.setattr(cuda_graph, "_wait", lambda recording: None)
    graphs = Graphs(1000)
    results = [graphs.call(double, (torch.full((2,), float(i)),))[0] for i in range(4)]
    assert [float(x[0]) for x in results] == [0.0, 2.0, 4.0, 6.0]
    (message,) = caplog.messages
    assert why in message and "double" in message and "\n" not in message and graphs.nbytes == 0


def test_a_graph_without_memory_is_left_out(tapes, monkeypatch, caplog):
    def record(function, arguments):
        if len(arguments[0]) > 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        return Tape(function, arguments)

    monkeypatch.setattr(cuda_graph, "record", record)
    graphs = Graphs(1000)
    for size in (3, 2):
        for i in range(3):
            assert float(graphs.call(double, (torch.full((size,), float(i)),))[0][0]) == 2 * i
    assert graphs.failed is None and graphs.nbytes == Tape.nbytes and not caplog.messages


def test_nan_is_a_result_like_any_other(tapes):
    graphs = Graphs(1000)
    for _ in range(3):
        assert graphs.call(double, (torch.full((2,), torch.nan),))[0].isnan().all()
    assert graphs.failed is None
