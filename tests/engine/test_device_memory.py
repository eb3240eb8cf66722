"""The promise of `--device-memory`, on a simulated GPU: tensors stay on the CPU, and its memory is a number."""

import re
import threading
from contextlib import nullcontext, suppress
from dataclasses import replace

import pytest
import torch
from checkpoints import save

from r_tsvm_kernels import MemoryBudgetError, MergeConfig
from r_tsvm_kernels.engine import local, make_schedule, smallest_schedule, tiles
from r_tsvm_kernels.engine.device_memory import within_budget
from r_tsvm_kernels.engine.scheduling import CONTEXT_BYTES, LIBRARY_BYTES, reserved_for
from r_tsvm_kernels.engine.shards import Shards, layouts
from r_tsvm_kernels.methods import tsvm
from r_tsvm_kernels.plan import make_plan

GPU, GB = torch.device("cuda", 0), 1 << 30
NAMES = [f"layers.{i}.k" for i in range(6)]


class Gpu:
    """Memory of a GPU: `merging` bytes are taken while a tile is merged, and more than `most` is too much."""

    def __init__(self):
        self.total, self.most, self.held, self.elsewhere = 80 * GB, 80 * GB, 0, 0
        self.fraction, self.fractions, self.emptied = 1.0, [], 0
        self.merging, self.peak, self.merged = 0, 0, []
        self.lock = threading.Lock()

    def set_fraction(self, fraction, device):
        assert device == GPU
        self.fractions.append(fraction)
        self.fraction = fraction

    def mem_get_info(self, device):
        assert device == GPU
        return self.total - self.held - self.elsewhere, self.total

    def empty_cache(self):
        assert not self.merging
        self.emptied += 1

    def take(self, names, size):
        with self.lock:
            self.merged.append(names)
            if self.merging + size > self.most:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nDetails")
            self.merging += size
            self.peak = max(self.peak, self.merging)

    def give_back(self, size):
        with self.lock:
            self.merging -= size


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name, function in {
        "mem_get_info": gpu.mem_get_info,
        "memory_reserved": lambda device: gpu.held,
        "empty_cache": gpu.empty_cache,
        "set_per_process_memory_fraction": gpu.set_fraction,
        "get_per_process_memory_fraction": lambda device: gpu.fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, function, raising=False)
    monkeypatch.setattr(local, "read_tile", lambda plan, tile, pin, each: tiles.read_tile(plan, tile))
    monkeypatch.setattr(local._Pipeline, "_own_stream", lambda self: nullcontext())
    monkeypatch.setitem(tsvm.BATCH_ELEMENTS, "cuda", 2 * 2 * (24 * 40 + 24**2))
    monkeypatch.setattr(tsvm, "solver_for", lambda options, device_type: "products")
    return gpu


class Job:
    """Some tensors to merge; what is written is in `shards`."""

    def __init__(self, plan, folder, device=GPU):
        folder.mkdir()
        self.plan, self.device, self.measure_norms, self.pending = plan, device, None, list(plan.tensors)
        self.shards, self.done = Shards(folder, layouts(plan), create=True), []

    def record(self, entry):
        self.done.append(entry)

    def commit_if_due(self):
        pass

    def commit(self):
        pass


@pytest.fixture
def plan(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(24, 40, generator=generator) for name in NAMES}
    models = [base, *({n: t + torch.randn(24, 40, generator=generator) for n, t in base.items()} for _ in range(2))]
    paths = [save(tmp_path / str(i), tensors) for i, tensors in enumerate(models)]
    return make_plan(MergeConfig("tsvm", base_model=paths[0], models=paths[1:], solver="products"), 10**9)


def run(gpu, plan, schedule, folder, monkeypatch):
    """Merge on the simulated GPU, where a tile takes what the schedule says; return the job."""

    def on_gpu(merge):
        def merged(plan, tile, inputs, device, *rest):
            names = [own.name for own in (tile if isinstance(tile, list) else [tile])]
            needs = schedule.needs(names)
            size = reserved_for(needs.inputs + needs.work)
            gpu.take(names, size)
            try:
                return merge(plan, tile, inputs, torch.device("cpu"), *rest)
            finally:
                gpu.give_back(size)

        return merged

    monkeypatch.setattr(local, "merge_tile", on_gpu(tiles.merge_tile))
    monkeypatch.setattr(local, "merge_group", on_gpu(tiles.merge_group))
    job = Job(plan, folder)
    local.run_local(job, schedule, lambda name: None)
    return job


def checksums(job):
    return {entry.name: entry.stored[0].checksum for entry in job.done}


def test_all_that_the_driver_sees_is_within_the_budget(gpu, plan, tmp_path, monkeypatch):
    for workers in (1, 2):
        budget = replace(make_schedule(plan, workers, on_gpu=True)).peak_device_bytes
        schedule = make_schedule(plan, 4, None, budget, on_gpu=True)
        assert (schedule.workers, schedule.device_limit) == (workers, budget)
        gpu.peak, gpu.merged, gpu.most = 0, [], budget - schedule.device_program_bytes
        job = run(gpu, plan, schedule, tmp_path / f"out{workers}", monkeypatch)
        assert sorted(checksums(job)) == NAMES and len(gpu.merged) == 3  # batches of two, none merged again
        assert CONTEXT_BYTES + workers * LIBRARY_BYTES + gpu.peak <= budget
        assert gpu.fractions[-2:] == [(budget - CONTEXT_BYTES) / gpu.total, 1.0]
    with pytest.raises(MemoryBudgetError, match=r"got 1\.000MB: .* for the CUDA context and libraries, .* for tensors"):
        make_schedule(plan, 1, None, 10**6, on_gpu=True)


def test_what_does_not_fit_beside_others_is_merged_alone(gpu, plan, tmp_path, monkeypatch):
    schedule = make_schedule(plan, 2, on_gpu=True)
    expected = checksums(run(gpu, plan, schedule, tmp_path / "roomy", monkeypatch))
    needs = schedule.needs(schedule.groups[0])
    gpu.most, gpu.peak, gpu.merged = reserved_for(needs.inputs + needs.work), 0, []  # others took the rest
    together, merge_group = threading.Barrier(2, timeout=10), tiles.merge_group

    def slowly(*arguments):
        with suppress(threading.BrokenBarrierError):  # a second batch begins before the first ends
            together.wait(0.3)
        return merge_group(*arguments)

    monkeypatch.setattr(tiles, "merge_group", slowly)
    job = run(gpu, plan, schedule, tmp_path / "full", monkeypatch)
    assert checksums(job) == expected  # the batches are the same
    assert len(gpu.merged) > 3 and gpu.emptied and gpu.peak <= gpu.most


@pytest.mark.parametrize("limited", [False, True])
def test_what_does_not_fit_alone_is_an_error_with_the_smallest_budget(gpu, plan, tmp_path, monkeypatch, limited):
    budget = smallest_schedule(plan, on_gpu=True).peak_device_bytes if limited else None
    schedule = make_schedule(plan, 2, None, budget, on_gpu=True)
    gpu.most = 1000
    gpu.elsewhere = 0 if limited else gpu.total - 1000
    message = (
        r"^layers\.0\.k, layers\.1\.k: cuda:0 is out of memory, with nothing else merged on it: .* budget of at least"
    )
    with pytest.raises(MemoryBudgetError, match=message) as caught:
        run(gpu, plan, schedule, tmp_path / "out", monkeypatch)
    text = str(caught.value)
    assert "smaller `workspace`" in text and "Tried to allocate 2.00 GiB)" in text and "Details" not in text
    assert ("end other programs" in text) == (not limited) and gpu.fraction == 1.0
    least = int(re.search(r"\((\d+) bytes\)", text)[1])
    assert make_schedule(plan, 1, None, least, on_gpu=True).device_limit == least
    assert least > budget if limited else least == smallest_schedule(plan, on_gpu=True).peak_device_bytes


def test_the_limit_of_torch_is_set_and_restored(gpu, plan):
    roomy = make_schedule(plan, 1, on_gpu=True)
    for device, schedule in ((GPU, roomy), (torch.device("cpu"), replace(roomy, device_limit=GB))):
        with within_budget(device, schedule):
            assert gpu.fractions == [] and not gpu.emptied
    gpu.fraction = 0.5  # of the caller
    limited = make_schedule(plan, 1, None, 2 * GB, on_gpu=True)
    with pytest.raises(KeyError), within_budget(GPU, limited):
        assert gpu.fraction == (2 * GB - CONTEXT_BYTES) / gpu.total
        raise KeyError
    assert gpu.fraction == 0.5 and gpu.emptied == 1
    with within_budget(GPU, make_schedule(plan, 1, None, 100 * GB, on_gpu=True)):
        assert gpu.fraction == 0.5
    gpu.held = 2 * GB
    least = limited.peak_device_bytes + gpu.held - LIBRARY_BYTES  # of which workspaces take a part
    with (
        pytest.raises(MemoryBudgetError, match=rf"holds 2\.\d+GB on cuda:0 already: .* \({least} bytes\), got"),
        within_budget(GPU, limited),
    ):
        pytest.fail("the block ran")
    with within_budget(GPU, make_schedule(plan, 1, None, least, on_gpu=True)):
        assert gpu.fraction == pytest.approx((least - CONTEXT_BYTES) / gpu.total)


def test_versions_of_torch_that_do_not_know_their_limit(gpu, plan, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    with within_budget(GPU, make_schedule(plan, 1, None, 2 * GB, on_gpu=True)):
        assert gpu.fraction < 1
    assert gpu.fraction == 1.0
