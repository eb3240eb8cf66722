"""Verdicts are stored, found again, and made anew where they cannot be used."""

import json
import logging
import os

import pytest
import simulated_device
import torch

from r_tsvm_kernels import ConfigError, backends, use_backend, verdicts
from r_tsvm_kernels.dispatch import chosen, explain, ops, select
from r_tsvm_kernels.errors import BackendUnavailableError
from r_tsvm_kernels.verdicts import Verdict, store

OP = "add_update"


@pytest.fixture
def device(monkeypatch, checks):
    """A device with one kernel that passes, twice as fast as the reference."""
    simulated_device.install(monkeypatch, OP, triton=simulated_device.good)
    monkeypatch.setattr(
        "r_tsvm_kernels.selfcheck.check._times", lambda op, passed, device: {"torch": 2.0, **dict.fromkeys(passed, 1.0)}
    )
    return checks


def test_nothing_is_checked_twice(device, cache):
    assert not cache.exists()
    assert chosen(OP, "cpu") == chosen(OP, "cpu") == "triton"
    (file,) = cache.glob("*.json")
    stored = json.loads(file.read_text())
    assert stored["circumstances"] == store.circumstances("cpu")
    verdict = stored["verdicts"][OP]["triton"]
    assert verdict["passed"] and verdict["error"] == 0 and verdict["cases"] > 20 and verdict["seconds"] == 1.0
    verdicts.forget()  # as a new process
    assert chosen(OP, "cpu") == "triton" and len(device) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b'{"format": 1, "circumstances": {}, "verdicts": {"add_update": 3}}', b"\xff"],
    ids=["empty", "half", "deep", "numbers for verdicts", "no text"],
)
def test_a_file_that_cannot_be_read_is_made_anew(device, cache, content):
    assert chosen(OP, "cpu") == "triton"
    (file,) = cache.glob("*.json")
    whole = json.loads(file.read_text())
    file.write_bytes(content)
    verdicts.forget()
    assert chosen(OP, "cpu") == "triton" and len(device) == 2
    assert json.loads(file.read_text())["verdicts"].keys() == whole["verdicts"].keys()


@pytest.mark.parametrize("fact", ["device", "capability", "driver", "torch", "triton", "r_tsvm_kernels", "sources"])
def test_other_circumstances_are_checked_by_themselves(device, cache, fact, monkeypatch):
    assert chosen(OP, "cpu") == "triton"
    facts = store.circumstances("cpu") | {fact: "another"}
    verdicts.forget()
    monkeypatch.setattr(store, "circumstances", lambda device: facts)
    assert chosen(OP, "cpu") == "triton" and len(device) == 2 and len(list(cache.glob("*.json"))) == 2


def test_where_the_cache_cannot_be_written(device, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RTSVM_CACHE", str(tmp_path / "file"))
    caplog.set_level(logging.WARNING, "r_tsvm_kernels")
    assert chosen(OP, "cpu") == chosen(OP, "cpu") == "triton" and len(device) == 1
    told = [record.getMessage() for record in caplog.records if "RTSVM_CACHE" in record.getMessage()]
    assert len(told) == 1 and str(tmp_path / "file") in told[0]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("RTSVM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "r_tsvm_kernels"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert store.cache_folder() == tmp_path / ".cache" / "r_tsvm_kernels"


def test_two_processes_check_once(device, cache):
    """The second waits for the lock of the first, and finds its verdicts."""
    place = store.place_of("cpu")
    found = {OP: {"triton": Verdict(True, seconds=1.0), "torch": Verdict(True, seconds=2.0)}}
    locked = store.locked

    def locked_by_another(place, seconds=-1):
        store.locked = locked
        with locked(place):
            store.add(place, found)
        return locked(place, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "locked", locked_by_another)
        assert chosen(OP, "cpu") == "triton" and device == []
    assert store.read(place) == found


def test_what_could_not_be_checked_is_not_stored(device, cache, monkeypatch, caplog):
    monkeypatch.setattr(verdicts.children, "run_checks", lambda device, kernels, deadline: {})
    caplog.set_level(logging.WARNING, "r_tsvm_kernels")
    assert chosen(OP, "cpu") == chosen(OP, "cpu") == "torch"
    assert "it has not been checked yet" in dict(explain(OP, "cpu"))["triton"]
    assert sum("is not used on" in record.getMessage() for record in caplog.records) == 1
    assert "triton" not in store.read(store.place_of("cpu")).get(OP, {})


def test_off_means_references_only(device, monkeypatch):
    monkeypatch.setenv("RTSVM_SELFCHECK", "off")
    assert chosen(OP, "cpu") == "torch" and dict(explain(OP, "cpu"))["triton"] == backends.READY
    with use_backend("triton"):
        assert select(OP, torch.zeros(1)).__module__.endswith("triton_kernel")
    assert device == []
    monkeypatch.setenv("RTSVM_SELFCHECK", "of")
    with pytest.raises(ConfigError, match="RTSVM_SELFCHECK must be on or off, got 'of'"):
        chosen(OP, "cpu")


def test_a_kernel_asked_for_by_name_is_checked_first(device):
    with use_backend("triton"):
        select(OP, torch.zeros(1))
    assert device == [{OP: ["triton"]}]


def test_without_checking_a_kernel_without_verdict_is_not_taken(device):
    assert chosen(OP, "cpu", check=False) == "torch" and device == []
    chosen(OP, "cpu")
    assert chosen(OP, "cpu", check=False) == "triton"


def test_kernels_of_the_cpu_are_not_checked_by_themselves(checks, monkeypatch):
    assert chosen("task_spread", "cpu") == ops()["task_spread"].order["cpu"][0] and checks == []
    kernels = {"task_spread": ["cpu"]}
    monkeypatch.setattr(
        verdicts.children, "run_checks", lambda *_, **__: {"task_spread": {"cpu": Verdict(False, "a broken compiler")}}
    )
    assert verdicts.check("cpu", kernels)["task_spread"]["cpu"].reason == "a broken compiler"
    verdicts.forget()  # a later process honours what was found
    assert chosen("task_spread", "cpu") == "torch" and chosen("task_gram", "cpu") == "cpu"
    with pytest.raises(BackendUnavailableError, match="its self-check failed: a broken compiler"):
        select("task_spread", torch.zeros(1), backend="cpu")


def test_facts_of_gpus(monkeypatch):
    names = {"cuda:0": "A", "cuda:1": "A", "cuda:2": "B"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.get(device) or list(names.values())[device])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 << 30, 80 << 30))
    assert verdicts.devices.__wrapped__("cuda") == ("cuda:0", "cuda:2")  # one of each kind
    facts = store.circumstances.__wrapped__("cuda:2")
    assert (facts["device"], facts["capability"]) == ("B", "9.0") and facts["driver"] is not None
    assert facts.keys() == store.circumstances("cpu").keys()
    assert verdicts.children._at_once("cuda:0") == min(2, os.cpu_count())  # by the free memory


def test_devices_of_two_kinds(monkeypatch):
    """A kernel is used where it passed on every kind; its time is the sum."""
    monkeypatch.setattr(verdicts, "devices", lambda device_type: ("cuda:0", "cuda:1"))
    known = {"cuda:0": {OP: {"triton": Verdict(True, "", 0.0, 1.0, 3)}}, "cuda:1": {OP: {}}}
    monkeypatch.setattr(verdicts, "_known", known)
    assert verdicts.known(OP, "cuda") == {}
    known["cuda:1"][OP]["triton"] = Verdict(True, "", 1e-9, 2.0, 3)
    assert verdicts.known(OP, "cuda") == {"triton": Verdict(True, "", 1e-9, 3.0, 6)}
    known["cuda:0"][OP]["triton"] = failed = Verdict(False, "no")
    assert verdicts.known(OP, "cuda") == {"triton": failed}


def test_all_sources_of_kernels_count(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    hashes = set()
    for file in ("ops/a.py", "_cuda.so", "unrelated.py"):
        (tmp_path / file).write_text(file)
        store._sources.cache_clear()
        hashes.add(store._sources())
    store._sources.cache_clear()
    assert len(hashes) == 2
