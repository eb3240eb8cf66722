"""Model ids: resolved from a cache that the test lays out itself; huggingface_hub is offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import family, save, state_dict

from r_tsvm_kernels import CheckpointError, ConfigError, MergeConfig, PickleRefusedError
from r_tsvm_kernels.checkpoint import hub
from r_tsvm_kernels.checkpoint.modules import find_modules
from r_tsvm_kernels.plan import make_plan

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def cache_model(cache, folder, repo, revision="main"):
    """Put a folder into a cache the way huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMITS[revision]
    snapshot.mkdir(parents=True)
    for part in ("blobs", "refs"):
        (root / part).mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(COMMITS[revision])
    for number, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        blob = root / "blobs" / f"{revision}-{number}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The library reads its environment when it is imported, so both are set where it keeps them.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_ids_and_revisions(cache, tmp_path):
    first = cache_model(cache, save(tmp_path / "m", state_dict(0), 2), "org/name.7B-x")
    second = cache_model(cache, save(tmp_path / "n", state_dict(1)), "org/name.7B-x", "v2")
    assert hub.resolve("org/name.7B-x") == first
    assert hub.resolve("org/name.7B-x@v2") == second
    assert hub.resolve(f"org/name.7B-x@{COMMITS['v2']}") == second


def test_a_local_path_goes_first(cache, tmp_path):
    cache_model(cache, save(tmp_path / "m", state_dict(0)), "org/name")
    save(tmp_path / "org" / "name", state_dict(0))
    assert str(hub.resolve("org/name")) == "org/name"


@pytest.mark.parametrize("path", ["/abs/org/name", "./org/name", "a/b/c", "name", "../name/x", "org/name@", "a b/c"])
def test_what_is_no_id_is_a_path(cache, path, monkeypatch):
    monkeypatch.setattr(hub, "_fetch", lambda *_: pytest.fail("asked the hub"))
    assert hub.resolve(path) == Path(path)


@pytest.mark.parametrize("model", ["org/other", "org/name@v3", "org--x/-y"])
def test_not_in_the_cache(cache, tmp_path, model):
    cache_model(cache, save(tmp_path / "m", state_dict(0)), "org/name")
    with pytest.raises(CheckpointError, match=f"{model}: no such folder or file, and fetching it from .* failed"):
        hub.resolve(model)


def test_without_the_library(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        hub.resolve("org/name")


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """Serve the files of a folder, by the library's own rules for patterns; return the folder and what was fetched."""
    from huggingface_hub.utils import filter_repo_objects

    served, snapshot, fetched = tmp_path / "served", tmp_path / "snapshot", []
    snapshot.mkdir()

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        names = [str(path.relative_to(served)) for path in served.rglob("*") if path.is_file()]
        fetched.append({*filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)})
        for name in fetched[-1]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes((served / name).read_bytes())
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return served, fetched


def serve(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize("other", [["model.safetensors"], []])
def test_the_vendors_copy_is_fetched_only_if_there_is_no_other(repository, other):
    served, fetched = repository
    serve(served, "config.json", "consolidated.safetensors", *other)
    hub.resolve("org/name")
    assert set().union(*fetched) == {"config.json", *(other or ["consolidated.safetensors"])}


def test_what_is_fetched(repository):
    """Fetches pickles only if they are allowed and there are no safetensors; from subfolders only code and
    templates."""
    served, fetched = repository
    wanted = {"config.json", "LICENSE", "additional_chat_templates/tools.jinja", "custom_generate/generate.py"}
    serve(served, *wanted, "pytorch_model.bin", "onnx/model.safetensors", "onnx/config.json", "train.log")
    hub.resolve("org/name")
    assert set().union(*fetched) == wanted
    fetched.clear()
    hub.resolve("org/name", allow_pickle=True)
    assert set().union(*fetched) == wanted | {"pytorch_model.bin"}
    fetched.clear()
    serve(served, "model.safetensors")
    hub.resolve("org/name", allow_pickle=True)
    assert set().union(*fetched) == wanted | {"model.safetensors"}


def test_modules_are_fetched(repository):
    """Fetches their pickles too: without them a dense layer would look like a module without weights."""
    served, fetched = repository
    wanted = {"model.safetensors", "modules.json", "1_Pooling/config.json", "2_[x]Dense/pytorch_model.bin"}
    serve(served, *wanted, "onnx/config.json", "2_x/config.json")
    folders = ("", "1_Pooling", "2_[x]Dense", "3_Normalize")
    modules = [{"path": path, "type": f"sentence_transformers.models.{path[2:]}"} for path in folders]
    (served / "modules.json").write_text(json.dumps(modules))
    folder = hub.resolve("org/name")
    assert set().union(*fetched) == wanted
    with pytest.raises(PickleRefusedError, match=r"2_\[x\]Dense: only pickled weights"):
        find_modules(folder, allow_pickle=False)


def test_a_plan_from_ids(cache, tmp_path):
    paths, _, _ = family(tmp_path / "f")
    snapshots = [cache_model(cache, path, f"org/{path.name}") for path in paths]
    models = tuple({"model": f"org/{path.name}"} for path in paths)
    config = MergeConfig(merge_method="task_arithmetic", base_model="org/base@main", models=models)
    plan = make_plan(config, 10**9)
    # The base among the models is no task, although it is spelled differently there.
    assert [checkpoint.path for checkpoint in (plan.base, *plan.tuned)] == snapshots
    assert plan.config.base_model == "org/base@main"


def test_the_environment_is_honoured(tmp_path):
    snapshot = cache_model(tmp_path / "home" / "hub", save(tmp_path / "m", {"a": torch.ones(2)}), "org/name")
    code = "from r_tsvm_kernels.checkpoint.hub import resolve; print(resolve('org/name'))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(snapshot)
