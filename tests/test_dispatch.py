"""Which backend runs, and how an op presents itself."""

import importlib
import pickle

import pytest
import torch

from r_tsvm_kernels import backends, dispatch, ops
from r_tsvm_kernels.dispatch import Op, chosen, explain, select, use_backend
from r_tsvm_kernels.errors import BackendUnavailableError, DeviceError

OPS = dispatch.ops()
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
TRITON_ON_CPU = backends.triton_interpreter_state()
interpreted = pytest.mark.skipif(TRITON_ON_CPU != backends.READY, reason=f"triton on the CPU: {TRITON_ON_CPU}")


def module_of(run):
    return run.__module__.rpartition(".")[2]


# --- an op


@every_op
def test_an_op_is_what_its_name_gives(op):
    assert isinstance(op, Op) and callable(op)
    assert getattr(ops, op.name) is op
    assert op.__doc__ and repr(op) == f"<op {op.name}: {', '.join(op.backends)}>"
    assert pickle.loads(pickle.dumps(op)) is op


@every_op
@pytest.mark.parametrize("form", ["import {name} as module", "from {package} import {last} as module"])
def test_modules_of_its_folder_can_be_imported(op, form):
    for module in ("reference", *(["triton_kernel"] if backends.triton_state() == backends.READY else [])):
        if module == "reference" or "triton" in op.backends:
            package = f"r_tsvm_kernels.ops.{op.name}"
            scope = {}
            exec(form.format(name=f"{package}.{module}", package=package, last=module), scope)
            assert scope["module"] is getattr(op, module) is importlib.import_module(f"{package}.{module}")
            assert callable(scope["module"].run)


@every_op
def test_its_backends(op):
    assert set(op.order) == {"cpu", "cuda"}
    assert op.backends[0] == "torch" and all("torch" in names for names in op.order.values())
    assert "triton" not in op.order["cpu"]
    for backend in op.backends:
        assert importlib.util.find_spec(f"r_tsvm_kernels.ops.{op.name}.{dispatch.MODULE[backend]}") is not None


def test_what_its_folder_does_not_have():
    with pytest.raises(AttributeError, match="op task_spread has no attribute 'abacus_kernel'"):
        _ = ops.task_spread.abacus_kernel
    assert ops.task_spread.small == {"BLOCK": 128}
    assert not hasattr(ops.task_spread, "__length_hint__")


# --- the choice


def test_the_first_backend_that_is_ready_runs(monkeypatch):
    monkeypatch.setitem(ops.add_update.order, "cpu", ("cpu", "torch"))
    states = {"cpu": "not built", "torch": backends.READY}
    monkeypatch.setattr(backends, "state", states.get)
    assert explain("add_update", "cpu") == [("cpu", "not built"), ("torch", "ready")]
    assert chosen("add_update", "cpu") == "torch"
    assert module_of(select("add_update", torch.zeros(1))) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"add_update: backend 'cpu' cannot run on cpu here \(cpu: not"):
        select("add_update", torch.zeros(1), backend="cpu")
    states["torch"] = "gone"
    assert chosen("add_update", "cpu") is None
    with pytest.raises(BackendUnavailableError, match="torch: gone"):
        select("add_update", torch.zeros(1))


def test_triton_is_never_chosen_on_the_cpu():
    assert all("triton" not in names for name in OPS for names, _ in [zip(*explain(name, "cpu"), strict=True)])
    assert module_of(select("symm_gram", torch.zeros(1))) == "reference"


@interpreted
def test_by_name_triton_runs_on_the_cpu():
    for name, op in OPS.items():
        if "triton" in op.backends:
            run = select(name, torch.zeros(1), backend="triton")
            assert run.__module__ == f"r_tsvm_kernels.ops.{name}.triton_kernel"
    with use_backend(add_update="triton"):
        assert module_of(select("add_update", torch.zeros(1))) == "triton_kernel"


@pytest.mark.skipif(TRITON_ON_CPU == backends.READY, reason="is about Triton without its interpreter, which is on")
def test_by_name_triton_is_refused_on_the_cpu_without_its_interpreter():
    with pytest.raises(
        BackendUnavailableError, match=r"add_update: backend 'triton' cannot run on cpu here .*triton: "
    ):
        select("add_update", torch.zeros(1), backend="triton")


def test_results_carry_no_graph():
    x = torch.ones(3, requires_grad=True)
    assert not ops.add_update(x, x, backend="torch").requires_grad


def test_devices_that_do_not_go_together():
    with pytest.raises(DeviceError, match=r"all tensors must be on one device of type cpu or cuda, got cpu, meta"):
        select("add_update", torch.zeros(1), torch.zeros(1, device="meta"))
    with pytest.raises(DeviceError, match="got meta"):
        select("add_update", torch.zeros(1, device="meta"))


# --- use_backend


def test_a_backend_for_every_op_that_has_it():
    with use_backend("torch"):
        assert {chosen(name, device) for name in OPS for device in ("cpu", "cuda")} == {"torch"}
        assert {module_of(select(name, torch.zeros(1))) for name in OPS} == {"reference"}
    with use_backend("triton"):
        for name, op in OPS.items():
            assert (chosen(name, "cuda") == "triton") == ("triton" in op.backends)
    before = {name: chosen(name, "cpu") for name in OPS}
    with use_backend("cpu"):  # the ops without it choose as ever
        assert {name: chosen(name, "cpu") for name in OPS if "cpu" not in OPS[name].backends}.items() <= before.items()


def test_a_backend_for_one_op():
    before = {name: chosen(name, "cpu") for name in OPS}
    with use_backend(task_spread="torch"):
        assert {name: chosen(name, "cpu") for name in OPS} == before | {"task_spread": "torch"}
    with use_backend("torch", task_spread="cpu"):
        assert chosen("task_spread", "cpu") == "cpu"
        assert chosen("task_gram", "cpu") == "torch"
    with use_backend(None):
        assert {name: chosen(name, "cpu") for name in OPS} == before


def test_blocks_nest_and_end():
    before = chosen("task_spread", "cpu")
    with use_backend("torch"):
        with use_backend(task_spread="cpu"):
            assert (chosen("task_spread", "cpu"), chosen("task_gram", "cpu")) == ("cpu", "torch")
        assert chosen("task_spread", "cpu") == "torch"
    assert chosen("task_spread", "cpu") == before
    with pytest.raises(ZeroDivisionError), use_backend("torch"):
        raise ZeroDivisionError
    assert chosen("task_spread", "cpu") == before


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["abacus"], {}, "no backend 'abacus'; expected one of torch, cpu, cuda, triton"),
        ([], {"task_spread": "abacus"}, "task_spread: no backend 'abacus'; expected one of torch, cpu, triton"),
        ([], {"task_spread": "cuda"}, "task_spread: no backend 'cuda'"),
        ([], {"task_sprade": "torch"}, "no op 'task_sprade'; expected one of add_update, "),
    ],
)
def test_what_cannot_be_forced(arguments, options, message):
    with pytest.raises(BackendUnavailableError, match=message), use_backend(*arguments, **options):
        pytest.fail("the block ran")


def test_a_call_takes_precedence_over_the_block():
    with use_backend("torch"):
        assert module_of(select("add_update", torch.zeros(1), backend=None)) == "reference"
        with pytest.raises(BackendUnavailableError, match="backend 'cuda' cannot run"):
            select("add_update", torch.zeros(1), backend="cuda")
