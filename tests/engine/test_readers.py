"""Inputs of a tile are read by several threads for a GPU."""

import threading
from types import SimpleNamespace

import pytest
import torch
from checkpoints import family

from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.engine.local import READERS, _Pipeline
from r_tsvm_kernels.engine.tiles import Tile, read_tile
from r_tsvm_kernels.plan import make_plan


def pipeline(device):
    """The engine of a GPU, which need not be there as long as nothing is merged."""
    schedule = SimpleNamespace(workers=1, read_bytes=0, work_bytes=0, device_bytes=0, graph_bytes=0)
    return _Pipeline(SimpleNamespace(device=torch.device(device), pending=[]), schedule)


def test_at_once_and_in_order():
    together = threading.Barrier(READERS, timeout=30)

    def meet(item, other):
        together.wait()
        return item + other

    items = list(range(READERS))
    assert pipeline("cuda")._each(meet, items, items) == [2 * item for item in items]


def test_a_cpu_reads_in_the_thread_of_the_reader():
    assert pipeline("cpu")._each(lambda _: threading.get_ident(), [1, 2]) == [threading.get_ident()] * 2


def test_an_error_ends_it_when_all_have_ended():
    ended = []

    def fail(item):
        if item == 0:
            raise OSError("the disk is gone")
        threading.Event().wait(0.2)
        ended.append(item)

    with pytest.raises(OSError, match="gone"):
        pipeline("cuda")._each(fail, range(3))
    assert sorted(ended) == [1, 2]


def test_the_tile_is_the_same(tmp_path):
    (base, *tuned), *_ = family(tmp_path, tasks=3)
    plan = make_plan(
        MergeConfig("task_arithmetic", base_model=str(base), models=tuple({"model": str(path)} for path in tuned)),
        10**9,
    )
    for name, tensor in plan.tensors.items():
        tile = Tile(name, 0, 1, 0, tensor.rows)
        for one, other in zip(read_tile(plan, tile), read_tile(plan, tile, each=pipeline("cuda")._each), strict=True):
            assert torch.equal(one, other)
