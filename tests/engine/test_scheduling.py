import re

import pytest
import torch
from checkpoints import family, save
from compare import same_bits

from r_tsvm_kernels import ConfigError, MemoryBudgetError, MergeConfig, merge_tensors
from r_tsvm_kernels.engine.scheduling import (
    GRAPH_BYTES,
    PROGRAM_BYTES,
    TILE_ELEMENTS,
    make_schedule,
    smallest_schedule,
)
from r_tsvm_kernels.plan import make_plan
from r_tsvm_kernels.sizes import parse_size

METHODS = ("linear", "task_arithmetic", "tsvm", "rtsvm")


def plan_for(paths, method, **fields):
    base, *tuned = paths
    models = tuple({"model": str(path)} for path in tuned)
    return make_plan(MergeConfig(merge_method=method, base_model=str(base), models=models, **fields), 10**9)


def big(folder, shapes, dtype=torch.bfloat16):
    """Three models of large tensors of zeros, whose values nobody reads."""
    tensors = {f"t{i}": torch.zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)}
    return [save(folder / name, tensors) for name in ("base", "a", "b")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two large matrices between small tensors; the first is more than one tile."""
    return big(tmp_path_factory.mktemp("big"), [(64,), (4096, 1500), (30, 40), (2048, 512), ()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_smallest_budget_works_and_a_byte_less_does_not(paths, method, on_gpu):
    plan = plan_for(paths, method)
    smallest = smallest_schedule(plan, on_gpu)
    host, device = smallest.peak_host_bytes, smallest.peak_device_bytes
    assert make_schedule(plan, 4, host, on_gpu=on_gpu).peak_host_bytes == host
    with pytest.raises(MemoryBudgetError, match=rf"memory budget of at least .* \({host} bytes\)"):
        make_schedule(plan, 4, host - 1, on_gpu=on_gpu)
    if on_gpu:
        assert make_schedule(plan, 4, None, device, on_gpu=True).peak_device_bytes == device
        with pytest.raises(MemoryBudgetError, match=rf"device memory budget of at least .* \({device} bytes\)"):
            make_schedule(plan, 4, None, device - 1, on_gpu=True)
    else:
        assert device == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_budget_is_kept_and_more_of_it_is_never_worse(paths, method):
    plan = plan_for(paths, method)
    smallest, most = smallest_schedule(plan).peak_host_bytes, make_schedule(plan, 4).peak_host_bytes
    budgets = [smallest + (most - smallest) * i // 20 for i in range(21)]
    chosen = [make_schedule(plan, 4, budget) for budget in budgets]
    for budget, found in zip(budgets, chosen, strict=True):
        assert found.peak_host_bytes <= budget
        assert found == make_schedule(plan, 4, budget)
    workers = [found.workers for found in chosen]
    assert workers == sorted(workers) and workers[0] == 1 and workers[-1] == 4
    assert chosen[-1] == make_schedule(plan, 4)


@pytest.mark.parametrize("method", METHODS)
def test_no_budget_can_change_what_is_computed(paths, method):
    """Only rows that may be merged separately are tiled; decompositions see whole matrices with every budget."""
    plan = plan_for(paths, method)
    for found in (make_schedule(plan, 4), smallest_schedule(plan)):
        for name, tensor in found.tensors.items():
            assert tensor.tile_rows == tensor.rows or plan.row_wise(name)
            assert [row for first, last in tensor.tiles for row in range(first, last)] == list(range(tensor.rows))
            assert len(tensor.tiles) == tensor.count
    assert plan.tensors["t1"].options == plan_for(paths, method).tensors["t1"].options


def test_tiles_of_averages(paths):
    plan = plan_for(paths, "linear")
    tensor = make_schedule(plan, 2).tensors["t1"]
    assert tensor.tile_rows == TILE_ELEMENTS[0] // 1500 < tensor.rows
    assert smallest_schedule(plan).tensors["t1"].tile_rows == TILE_ELEMENTS[-1] // 1500
    assert make_schedule(plan, 2).tensors["t4"].tiles == [(0, 1)]  # a scalar


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("method", METHODS)
def test_limits_hold_any_row_of_tiles(paths, method, workers):
    """However the workers share the tiles in their order, those in hand fit, and the next one is read ahead."""
    found = make_schedule(plan_for(paths, method), workers)
    tiles = [tensor for tensor in found.tensors.values() for _ in tensor.tiles]
    for first in range(len(tiles)):
        assert sum(tile.inputs for tile in tiles[first : first + workers + 1]) <= found.read_bytes
        assert sum(tile.work for tile in tiles[first : first + workers]) <= found.work_bytes
    assert found.peak_host_bytes > PROGRAM_BYTES + found.read_bytes + found.work_bytes


def test_on_a_gpu_work_is_done_there(paths):
    plan = plan_for(paths, "tsvm")
    here, there = make_schedule(plan, 2), make_schedule(plan, 2, on_gpu=True)
    assert there.peak_host_bytes < here.peak_host_bytes
    largest = max(there.tensors.values(), key=lambda tensor: tensor.work)
    assert there.peak_device_bytes >= largest.inputs + largest.work
    assert make_schedule(plan, 2, None, there.peak_device_bytes - 1, on_gpu=True).workers == 1


def test_a_smaller_workspace_in_the_recipe_needs_less(tmp_path):
    paths = big(tmp_path, [(20000, 256)])
    default, small = (smallest_schedule(plan_for(paths, "tsvm", parameters=p)) for p in ({}, {"workspace": "1MB"}))
    assert small.peak_host_bytes < default.peak_host_bytes


def test_refusal_adds_up_names_the_tensor_and_says_what_to_do(paths):
    def refusal(method, budget, **options):
        with pytest.raises(MemoryBudgetError) as caught:
            make_schedule(plan_for(paths, method), 1, budget, **options)
        return str(caught.value)

    host = smallest_schedule(plan_for(paths, "tsvm")).peak_host_bytes
    assert "got 1.000MB" in refusal("tsvm", 10**6) and "no recipe fits" in refusal("tsvm", 10**6)
    message = refusal("tsvm", host - 1)
    assert message.endswith("raise the budget, set a smaller `workspace` in the recipe, or exclude t1")
    program, tensors = (parse_size(re.search(rf"(\S+) for {what}", message)[1]) for what in ("Python", "tensors"))
    assert program + tensors == pytest.approx(host, rel=1e-4)
    host = smallest_schedule(plan_for(paths, "linear")).peak_host_bytes
    assert "the tiles of t3 are the smallest already" in refusal("linear", host - 1)
    host = smallest_schedule(plan_for(paths, "iso_c")).peak_host_bytes
    assert refusal("iso_c", host - 1).endswith("or exclude t1, whose rows cannot be merged separately")
    device = smallest_schedule(plan_for(paths, "tsvm"), on_gpu=True).peak_device_bytes
    message = refusal("tsvm", None, device_memory=device - 1, on_gpu=True)
    assert "device memory budget" in message and "for Python" not in message and "raise the budget" in message
    with pytest.raises(ConfigError, match="at least one worker"):
        make_schedule(plan_for(paths, "linear"), 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_merged_apart_give_the_same_bits(tmp_path, method, rows):
    paths, base, tuned = family(tmp_path, dtype=torch.bfloat16)
    plan = plan_for(paths, method, exclude=("*.1.mlp*",), parameters={"weight": [0.3, 1.0]})
    for name, tensor in plan.tensors.items():
        if not (plan.row_wise(name) and tensor.spec.shape):
            continue
        models = tuned if len(plan.config.models) == len(tuned) else [*tuned, base]  # linear, karcher: the base, too
        inputs = [base[name], *(state_dict[name] for state_dict in models)]

        def merged(parts, name=name, tensor=tensor):
            dtype = tensor.spec.dtype if tensor.spec.dtype.is_floating_point else None
            options = {"name": name, "position": tensor.position, "out_dtype": dtype}
            return merge_tensors(parts[0], parts[1:], plan.config, **options)

        whole = merged(inputs)
        tiles = [merged([x[first : first + rows] for x in inputs]) for first in range(0, max(tensor.rows, 1), rows)]
        assert same_bits(torch.cat([tile.weight for tile in tiles]), whole.weight)
        for tile in tiles:
            assert (tile.report.treatment, tile.report.reason) == (whole.report.treatment, whole.report.reason)
            assert tile.report.weights == whole.report.weights


def test_graphs_get_what_tensors_leave_of_the_device_memory(paths):
    plan = plan_for(paths, "tsvm")
    assert make_schedule(plan, 2).graph_bytes == 0
    free = make_schedule(plan, 2, on_gpu=True)
    assert free.graph_bytes == 2 * GRAPH_BYTES
    device = free.peak_device_bytes
    for spare in (0, 1000, 3 * GRAPH_BYTES):
        assert make_schedule(plan, 2, None, device + spare, on_gpu=True).graph_bytes == min(spare, 2 * GRAPH_BYTES)
