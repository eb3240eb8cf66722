"""The Ray engine: in a Ray of this process, and on two nodes of a real cluster on this machine."""

import contextlib
import gc
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from checkpoints import digest, family, save, tuned_state_dict, without_times
from test_modules import sentence_model, write

from r_tsvm_kernels import (
    ConfigError,
    DeviceError,
    MemoryBudgetError,
    MergeConfig,
    NonFiniteError,
    merge_checkpoints,
    use_backend,
)
from r_tsvm_kernels.engine import ray_engine, run
from r_tsvm_kernels.engine.verify import verify_output
from r_tsvm_kernels.errors import BackendUnavailableError, ClusterError

try:
    import ray
except ImportError:
    pytest.skip("Ray is not installed (pip install 'r-tsvm-kernels[ray]')", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
# Nobody else can use our clusters, no token is left in the home folder, and nothing is reported to Ray's makers.
RAY_ENVIRONMENT = {"RAY_AUTH_TOKEN": secrets.token_hex(16), "RAY_USAGE_STATS_ENABLED": "0"}
STORE_BYTES = 80_000_000


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray keeps its sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.delenv("RAY_AUTH_MODE", raising=False)  # Ray sets it
        yield folder


@pytest.fixture(scope="module")
def own_ray(ray_folder):
    ray.init(
        "local",
        num_cpus=2,
        num_gpus=2,  # Ray believes us
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        log_to_driver=False,
        _temp_dir=ray_folder,
    )
    yield
    shut_down()


def shut_down():
    ray.shutdown()
    # Ray forgets the processes that it started without waiting for them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def config_for(paths, method="rtsvm"):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned))


def weights(folder):
    """Digests of what must not depend on the engine: the shards and their index."""
    return {name: value for name, value in digest(folder).items() if ".safetensors" in name}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A family that takes about two seconds to merge, and its merge by the local engine."""
    return merged_family(tmp_path_factory.mktemp("large"), 256, 192)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A family that takes about ten seconds: several commits of the journal, with work left after each."""
    return merged_family(tmp_path_factory.mktemp("larger"), 512, 512)


def merged_family(folder, rows, columns):
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{layer}.weight": torch.randn(rows, columns, generator=generator) for layer in range(64)}
    models = [base, *(tuned_state_dict(base, seed + 1) for seed in range(3))]
    config = config_for([save(folder / f"model{i}", tensors, shards=2) for i, tensors in enumerate(models)])
    merge_checkpoints(config, folder / "local", shard_size="2MB")
    return config, weights(folder / "local")


def descendants(pid):
    """Process ids and titles of everything that descends from a process."""
    found = {}
    children = [pid]
    for parent in children:  # grows while it is walked
        with contextlib.suppress(OSError):
            found[parent] = Path(f"/proc/{parent}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for thread in Path(f"/proc/{parent}/task").iterdir():
                children += [int(child) for child in (thread / "children").read_text().split()]
    return found


def merging(pid):
    """Workers below a process that are merging a group at this moment."""
    return [child for child, title in descendants(pid).items() if "ray::merge_group" in title]


class KillWorkers:
    """A progress callback that kills the workers that are merging, once."""

    killed = ()

    def __call__(self, _):
        if not self.killed:
            self.killed = merging(os.getpid())
            for pid in self.killed:
                os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("own_ray")
class TestInProcess:
    @pytest.mark.parametrize("method", ["rtsvm", "linear"])
    def test_the_bytes_of_the_local_engine(self, tmp_path, monkeypatch, method):
        paths, _, _ = family(tmp_path / "in", tasks=3, dtype=torch.bfloat16)
        config = config_for([path.relative_to(tmp_path) for path in paths], method)
        monkeypatch.chdir(tmp_path)  # where no worker is
        seen = []
        merge_checkpoints(config, "local", shard_size=3000)
        result = merge_checkpoints(config, "ray", shard_size=3000, engine="ray", progress=seen.append)
        assert weights(tmp_path / "ray") == weights(tmp_path / "local")
        assert len(weights(tmp_path / "ray")) > 2
        assert verify_output("ray", inputs=True).ok
        assert sorted(state.tensor for state in seen) == sorted(result.reports)
        assert (seen[-1].tensors_done, seen[-1].bytes_done) == (seen[-1].tensors_total, seen[-1].bytes_total)
        assert Path("ray/README.md").read_bytes() == Path("local/README.md").read_bytes()
        reports = [json.loads(Path(engine, "merge_report.json").read_text()) for engine in ("local", "ray")]
        assert reports[1]["engine"] == "ray" and reports[1]["stages"].keys() == reports[0]["stages"].keys()
        assert without_times(reports[1]) == without_times(reports[0])

    def test_forced_backends_reach_the_workers(self, tmp_path):
        paths, _, _ = family(tmp_path / "in")
        with use_backend("torch", elect_and_sum="cpu"):
            merge_checkpoints(config_for(paths, "ties"), tmp_path / "ray", engine="ray")  # or workers would differ
        kernels = json.loads((tmp_path / "ray" / "merge_report.json").read_text())["kernels"]
        assert kernels.pop("elect_and_sum") == "cpu" and set(kernels.values()) == {"torch"}

    def test_modules_in_folders(self, tmp_path):
        paths = [write(tmp_path / str(seed), sentence_model(seed, "0_Transformer")) for seed in range(3)]
        files = ["0_Transformer/model.safetensors", "2_Dense/model.safetensors"]
        for engine in ("local", "ray"):
            merge_checkpoints(config_for(paths, "ties"), tmp_path / engine, engine=engine)
        local, other = (digest(tmp_path / engine) for engine in ("local", "ray"))
        assert [file for file in other if file.endswith(".safetensors")] == files
        assert all(local[file] == other[file] for file in files)

    def test_adapters(self, tmp_path, monkeypatch):
        shapes = {"layers.0.q": (24, 16), "layers.1.q": (24, 16)}
        save(tmp_path / "base", {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()})
        for seed in (1, 2):
            random_adapter(tmp_path / f"adapter{seed}", seed, shapes=shapes)
        monkeypatch.chdir(tmp_path)
        config = config_for(["base", "adapter1", "base+adapter2"], "tsvm")
        merge_checkpoints(config, "local")
        merge_checkpoints(config, "ray", engine="ray")
        assert weights(tmp_path / "ray") == weights(tmp_path / "local")

    def test_killed_workers_are_replaced(self, tmp_path, large):
        config, expected = large
        kill = KillWorkers()
        merge_checkpoints(config, tmp_path / "out", shard_size="2MB", engine="ray", progress=kill)
        assert kill.killed
        assert weights(tmp_path / "out") == expected

    def test_workers_lost_for_good_leave_it_resumable(self, tmp_path, large, monkeypatch):
        config, expected = large
        monkeypatch.setattr(ray_engine, "RETRIES", 0)
        with pytest.raises(ClusterError, match=r"lost.*--resume"):
            merge_checkpoints(config, tmp_path / "out", shard_size="2MB", engine="ray", progress=KillWorkers())
        assert not (tmp_path / "out").exists()
        result = merge_checkpoints(config, tmp_path / "out", shard_size="2MB", resume=True)
        assert 0 < result.resumed < len(result.reports)
        assert weights(tmp_path / "out") == expected

    def test_an_interruption_ends_the_workers_and_is_resumable(self, tmp_path, large):
        config, expected = large

        def interrupt(_):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, tmp_path / "out", shard_size="2MB", engine="ray", progress=interrupt)
        deadline = time.monotonic() + 10
        while merging(os.getpid()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not merging(os.getpid())
        result = merge_checkpoints(config, tmp_path / "out", shard_size="2MB", resume=True)
        assert 0 < result.resumed < len(result.reports)
        assert weights(tmp_path / "out") == expected

    def test_a_signal_inside_the_compiled_part_of_ray(self, tmp_path, monkeypatch):
        paths, _, _ = family(tmp_path / "in")

        def wait(*args, **kwargs):
            raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ray, "wait", wait)
            merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray")
        merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray", resume=True)
        assert verify_output(tmp_path / "out").ok

    def test_an_error_in_a_worker_keeps_its_class(self, tmp_path):
        paths, _, tuned = family(tmp_path / "in")
        tuned[0]["model.norm.weight"][3] = float("nan")
        broken = save(tmp_path / "broken", tuned[0])
        with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
            merge_checkpoints(config_for([paths[0], broken]), tmp_path / "out", engine="ray")
        assert not (tmp_path / "out").exists()

    def test_other_software_is_refused(self, tmp_path, monkeypatch):
        paths, _, _ = family(tmp_path / "in")
        other = {"versions": {"r_tsvm_kernels": "0.0.1"}}
        monkeypatch.setattr(ray_engine, "software", lambda device, method: other)
        with pytest.raises(ClusterError, match=r"its software differs"):
            merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray")

    def test_machines_that_are_too_small(self, tmp_path, monkeypatch):
        paths, _, _ = family(tmp_path / "in")
        small = [{"Alive": True, "Resources": {"CPU": 1.0, "memory": 1e6}}, {"Alive": False, "Resources": {}}]
        monkeypatch.setattr(ray, "nodes", lambda: small)
        with pytest.raises(MemoryBudgetError, match=r"at most 1\.000MB on a machine"):
            merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray")

    def test_tasks_take_turns_on_gpus_in_processes_that_stay(self):
        def where():
            time.sleep(0.2)
            return os.getpid(), ray.get_gpu_ids()[0]

        task = ray.remote(num_cpus=1, **ray_engine.GPU_OPTIONS)(where)
        first = ray.get([task.remote() for _ in range(2)])
        assert {gpu for _, gpu in first} == {0, 1}
        assert {pid for pid, _ in ray.get([task.remote() for _ in range(4)])} <= {pid for pid, _ in first}

    @pytest.mark.parametrize(
        ("visible", "given", "index"), [(None, [1], 1), ("3,5", ["5"], 1), ("GPU-a,GPU-b", ["GPU-a"], 0)]
    )
    def test_the_gpu_among_the_visible_ones(self, monkeypatch, visible, given, index):
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: given)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert ray_engine.own_gpu() == torch.device("cuda", index)

    def test_pickled_models(self, tmp_path):
        paths = []
        for seed in range(3):
            tensors = {"a.weight": torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))}
            paths.append(tmp_path / f"model{seed}")
            paths[-1].mkdir()
            torch.save(tensors, paths[-1] / "pytorch_model.bin")
        merge_checkpoints(config_for(paths), tmp_path / "local", allow_pickle=True)
        merge_checkpoints(config_for(paths), tmp_path / "ray", allow_pickle=True, engine="ray")
        assert weights(tmp_path / "ray") == weights(tmp_path / "local") != {}

    @pytest.mark.parametrize(
        ("device", "message"),
        [("cuda", "no machine of the Ray cluster has a GPU"), ("cuda:1", "use --device cuda")],
    )
    def test_no_such_gpu(self, tmp_path, monkeypatch, device, message):
        paths, _, _ = family(tmp_path / "in")
        # The driver has one; Ray knows better.
        monkeypatch.setattr(run, "choose_device", torch.device)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0, "memory": 1e12}}])
        with pytest.raises(DeviceError, match=message):
            merge_checkpoints(config_for(paths), tmp_path / "out", device=device, engine="ray")


def test_ray_is_not_installed(tmp_path, monkeypatch):
    paths, _, _ = family(tmp_path / "in")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendUnavailableError, match="pip install ray"):
        merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray")


def test_nobody_at_the_address(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at {address}"):
        merge_checkpoints(config_for(paths), tmp_path / "out", engine="ray", ray_address=address)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("options", [{"engine": "spark"}, {"ray_address": "localhost:1"}], ids=str)
def test_wrong_options(tmp_path, options):
    paths, _, _ = family(tmp_path / "in")
    with pytest.raises(ConfigError, match="engine"):
        merge_checkpoints(config_for(paths), tmp_path / "out", **options)


# --- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(ray_folder):
    """Two nodes with one CPU each; yields their address and the processes that hold them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    command += [f"--object-store-memory={STORE_BYTES}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={ray_folder}"]
    with contextlib.ExitStack() as stack, Path(ray_folder, "nodes.log").open("wb") as log:
        nodes = []
        for options in (head, [f"--address=127.0.0.1:{port}"]):
            nodes.append(subprocess.Popen([*command, *options], env=with_token(), stdout=log, stderr=log))
            stack.callback(stop_node, nodes[-1])
            wait_for_node(nodes[-1], port)
        yield f"127.0.0.1:{port}", nodes


def with_token():
    return os.environ | {"RAY_AUTH_MODE": "token"}


def stop_node(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_node(node, port):
    """Wait until the head answers, and the node has the process that runs its workers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if any("/raylet " in title for title in descendants(node.pid).values()):
                return
        time.sleep(0.1)
    pytest.fail("a node of the Ray cluster did not start")


@pytest.mark.exhaustive
def test_two_nodes_and_a_driver_that_is_stopped(tmp_path, larger, two_nodes):
    config, expected = larger
    address, nodes = two_nodes
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "r_tsvm_kernels", "merge", "recipe.yaml", "out", "--shard-size=2MB"]
    command += ["--engine=ray", f"--ray-address={address}", "--resume"]
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    workers = [set(), set()]

    def merge(stop=None, again=True):
        """Run the command; send it a signal as soon as the journal has grown. Return exit code and output.

        On a busy machine a check inside Ray may abort the driver ("likely discovered a bug in Ray"): run it once more.
        """
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 1
        log = tmp_path / "log"
        with log.open("wb") as stream:
            driver = subprocess.Popen(command, cwd=tmp_path, env=with_token(), stdout=stream, stderr=stream)
            while driver.poll() is None:
                if stop is not None and journal.exists() and len(journal.read_bytes().splitlines()) > lines:
                    driver.send_signal(stop)
                    stop = None
                for seen, node in zip(workers, nodes, strict=True):
                    seen.update(merging(node.pid))
                time.sleep(0.05)
        if again and driver.returncode == -signal.SIGABRT and "a bug in Ray" in log.read_text():
            return merge(stop, again=False)
        return driver.returncode, log.read_text()

    assert merge(signal.SIGKILL)[0] == -signal.SIGKILL
    code, said = merge(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    assert "--resume" in said
    assert not (tmp_path / "out").exists()
    code, said = merge()
    assert code == 0, said
    assert weights(tmp_path / "out") == expected
    assert all(workers), "one of the nodes did nothing"
