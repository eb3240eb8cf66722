"""Systems that lack calls: each replacement does the same, and whole merges give the same bytes there."""

import ast
import ctypes
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import digest, family

from r_tsvm_kernels import system
from r_tsvm_kernels.checkpoint import ShardFile, ShardLayout
from r_tsvm_kernels.checkpoint.writer import TensorSpec

PROGRAM = Path(__file__).with_name("poorer_system.py")
WITHOUT = [(), ("preadv",), ("preadv", "pread", "pwrite")]


@pytest.fixture(params=WITHOUT, ids=lambda names: "-".join(names) or "all")
def file(request, tmp_path, monkeypatch):
    """The descriptor of a new file, where these calls are missing."""
    for name in request.param:
        monkeypatch.delattr(os, name)
    descriptor = system.open_descriptor(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def test_reading_and_writing_anywhere(file):
    assert system.write_at(file, b"abc", 4) == 3
    assert system.write_at(file, memoryview(b"xy"), 0) == 2
    buffer = bytearray(5)
    assert system.read_at(file, memoryview(buffer), 3) == 4 and bytes(buffer) == b"\0abc\0"
    assert system.read_at(file, memoryview(buffer), 7) == 0


def test_threads_do_not_disturb_each_other(file):
    pieces = {number * 1000: bytes([number]) * 1000 for number in range(64)}
    wrong = []

    def work(start):
        for offset in list(pieces)[start::8]:
            system.write_at(file, pieces[offset], offset)
            buffer = bytearray(1000)
            if system.read_at(file, memoryview(buffer), offset) != 1000 or bytes(buffer) != pieces[offset]:
                wrong.append(offset)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    whole = bytearray(64000)
    assert system.read_at(file, memoryview(whole), 0) == 64000 and bytes(whole) == b"".join(pieces.values())


def unsupported(*_):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("how", ["missing", "unsupported"])
def test_a_file_gets_its_size_without_a_reservation(file, monkeypatch, how):
    if how == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    system.reserve(file, 0)
    assert os.fstat(file).st_size == 0
    system.reserve(file, 1_000_001)
    assert os.fstat(file).st_size == 1_000_001
    buffer = bytearray(2_000_000)
    assert system.read_at(file, memoryview(buffer), 0) == 1_000_001 and not any(buffer)


def test_a_full_disk_is_an_error_with_and_without_a_reservation(file, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        system.reserve(file, 5)


def test_hints_and_syncs_are_left_out_or_replaced(file, tmp_path, monkeypatch):
    synced = []
    for name in ("posix_fadvise", "fdatasync"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "fsync", synced.append)
    system.reads_in_order(file)
    system.forget_pages(file, 10)
    system.sync(file)
    assert synced == [file]
    monkeypatch.setattr(system, "WINDOWS", True)
    system.sync_path(tmp_path)
    assert synced == [file]
    system.sync_path(tmp_path / "file")
    assert len(synced) == 2


def test_on_macos_the_cache_of_the_drive_is_flushed(file, monkeypatch):
    import fcntl

    asked = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *arguments: asked.append(arguments))
    system.sync(file)
    assert asked == [(file, 51)]


def test_links_are_refused_without_a_flag_for_it(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to("precious")
    for name in ("O_NOFOLLOW", None):
        if name:
            monkeypatch.delattr(os, name)
        with pytest.raises(OSError, match="symbolic links"):
            system.open_descriptor(tmp_path / "link", os.O_WRONLY | os.O_CREAT)
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_a_file_takes_on_disk_where_nothing_says_so(tmp_path):
    class Status:
        st_size = 513

    assert system.allocated(Status()) == 1024
    assert system.allocated(tmp_path.stat()) == 512 * tmp_path.stat().st_blocks


def test_load(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for average, load in ((0.1, 1.0), (7.0, 3.5)):
        monkeypatch.setattr(os, "getloadavg", lambda average=average: (average, 0.0, 0.0))
        assert system.load() == load
    monkeypatch.delattr(os, "getloadavg")
    assert system.load() == 1.0


def test_writing_back_begins_with_the_bytes_that_were_written(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(system, "_sync_file_range", lambda: lambda *arguments: calls.append(arguments))
    layout = ShardLayout("a.safetensors", {"w": TensorSpec(torch.float32, (4, 2))})
    with ShardFile.create(tmp_path / "a.safetensors", layout) as shard:
        shard.write("w", torch.ones(2, 2), 2)
    assert [call[1:] for call in calls] == [(layout.offsets["w"] + 16, 16, 2)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call")
def test_linux_has_the_call(tmp_path, monkeypatch):
    call = system._sync_file_range()
    with (tmp_path / "a").open("wb") as file:
        file.write(b"12345678")
        assert call(file.fileno(), 0, 8, 2) == 0 and call(file.fileno(), -1, 8, 2) == -1
        system.begin_to_write_back(-1, 0, 8)  # a hint
        monkeypatch.setattr(system, "_sync_file_range", lambda: None)
        system.begin_to_write_back(file.fileno(), 0, 8)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has the call")
def test_large_blocks_are_returned():
    """In a process of its own, because the setting stays: freed tensors of 16 MB do not stay resident."""
    code = """
import sys, torch
from r_tsvm_kernels import system
if sys.argv[1] == "set":
    system.return_large_blocks()
page = 4096
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page
torch.ones(20 << 20, dtype=torch.uint8)  # after which malloc would keep such blocks
before = resident()
kept, last = torch.ones(16 << 20, dtype=torch.uint8), torch.ones(1000, dtype=torch.uint8)
del kept
print(resident() - before)
"""
    grown = {
        mode: int(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("set", "not")
    }
    assert grown["set"] < 4 << 20 < 12 << 20 < grown["not"]


# What only POSIX has, or only Linux, of modules that the package uses.
ELSEWHERE_MISSING = {
    "os": {
        "preadv", "pwritev", "pread", "pwrite", "posix_fallocate", "posix_fadvise", "fdatasync", "sched_getaffinity",
        "sched_setaffinity", "statvfs", "fstatvfs", "fork", "mkfifo", "getuid", "geteuid", "getpgid", "killpg",
        "setsid", "uname", "nice", "sysconf", "link", "symlink", "sendfile", "copy_file_range", "getloadavg", "fchmod",
        "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_DIRECTORY", "O_DIRECT", "O_TMPFILE", "O_SYNC", "O_DSYNC",
    },
    "signal": {"SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGPIPE", "setitimer", "alarm"},
    "time": {"clock_gettime", "tzset"},
    "socket": {"AF_UNIX"},
}  # fmt: skip
POSIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "crypt"}


def only_elsewhere(path):
    """Yield what a file uses that not every system has, outside of `system.py`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in ELSEWHERE_MISSING.get(node.value.id, ()):
                yield f"{path.name}:{node.lineno}: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{path.name}:{node.lineno}: {name}" for name in found if name in POSIX_MODULES)


def test_only_one_file_uses_calls_that_systems_lack(tmp_path):
    package = Path(system.__file__).parent
    used = [use for path in package.rglob("*.py") if path.name != "system.py" for use in only_elsewhere(path)]
    assert used == []
    (tmp_path / "bad.py").write_text("import fcntl\nimport os\nos.pread(0, 1, 0)\nsignal.SIGHUP\n")
    assert len(list(only_elsewhere(tmp_path / "bad.py"))) == 3


def test_text_files_are_opened_with_their_encoding(tmp_path):
    """Windows' own encoding is not UTF-8."""
    package = Path(system.__file__).parent

    def without(path):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keys = {key.arg for key in node.keywords}
                if node.func.attr in ("read_text", "write_text") and "encoding" not in keys:
                    yield f"{path.name}:{node.lineno}"

    assert [use for path in package.rglob("*.py") for use in without(path)] == []


# --- whole commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a command on a system: ``here``, or a poorer one. Each system is one process, which imports torch once."""
    folder, systems = tmp_path_factory.mktemp("systems"), {}
    out, err = folder / "out", folder / "err"

    def run(name, *arguments, check=True, interrupted_after=None):
        if name not in systems:
            program = [sys.executable, str(PROGRAM), name]
            systems[name] = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        request = [str(out), str(err), interrupted_after, list(map(str, arguments))]
        systems[name].stdin.write(json.dumps(request) + "\n")
        systems[name].stdin.flush()
        done = subprocess.CompletedProcess(
            arguments, int(systems[name].stdout.readline()), *map(Path.read_text, (out, err))
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    yield run
    for process in systems.values():
        process.communicate()


def weights(folder):
    return {name: value for name, value in digest(folder).items() if name.endswith((".safetensors", ".index.json"))}


@pytest.mark.parametrize("name", ["macos", "windows"])
def test_a_merge_gives_the_same_bytes(tmp_path, run, name):
    paths, _, _ = family(tmp_path / "in")
    inputs = ["--base", paths[0], "--model", paths[1], "--model", paths[2], "--method", "ties", "--shard-size", "2KB"]
    run("here", "merge", *inputs, tmp_path / "here")
    (tmp_path / "there").mkdir()  # an empty folder, which the output replaces
    done = run(name, "merge", *inputs, tmp_path / "there")
    assert weights(tmp_path / "there") == weights(tmp_path / "here") != {}
    run(name, "verify", tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "here", "there"}, done.stderr
    run(name, "merge", *inputs, tmp_path / "one.safetensors")
    run(name, "verify", tmp_path / "one.safetensors")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    done = run(name, "merge", *inputs, tmp_path / "there", check=False)
    assert done.returncode == 2 and "a finished merge is there" in done.stderr
    run(name, "inspect", *inputs, "--estimate-time")


@pytest.mark.parametrize("name", ["macos", "windows"])
def test_a_stopped_merge_is_resumed(tmp_path, run, name):
    paths, _, _ = family(tmp_path / "in")
    inputs = ["merge", "--base", paths[0], "--model", paths[1], "--method", "task_arithmetic", "--threads", "1"]
    run("here", *inputs, tmp_path / "whole")
    done = run(name, *inputs, tmp_path / "out", check=False, interrupted_after=4)
    assert done.returncode == 130 and "4 of 10 tensors are finished" in done.stderr, done.stderr
    done = run(name, *inputs, "--resume", tmp_path / "out")
    assert "(4 were finished before)" in done.stdout
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["macos", "windows"])
def test_adapters_are_written(tmp_path, run, name):
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    inputs = ["--base", paths[0], "--model", paths[1], "--rank", "4"]
    run(name, "extract-lora", *inputs, tmp_path / "lora")
    run("here", "extract-lora", *inputs, tmp_path / "here")
    assert weights(tmp_path / "lora") == weights(tmp_path / "here") != {}
    run(name, "merge-lora", "--adapter", tmp_path / "lora", "--adapter", tmp_path / "here", tmp_path / "both")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_sweep_is_refused_without_process_groups(tmp_path, run):
    paths, _, _ = family(tmp_path / "in")
    inputs = ["--base", paths[0], "--model", paths[1], "--method", "task_arithmetic", tmp_path / "out"]
    done = run("windows", "sweep", "--eval", "echo 1 {model}", "--grid", "alpha=0.5,1", *inputs, check=False)
    assert done.returncode == 2 and "run it on Linux, on macOS or in WSL" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_is_locked_against_another_merge_without_flock(tmp_path, run):
    paths, _, _ = family(tmp_path / "in")
    inputs = ["--base", paths[0], "--model", paths[1], "--method", "task_arithmetic", tmp_path / "out"]
    program = (
        "import sys, poorer_system; poorer_system.become('windows')\n"
        "from pathlib import Path\n"
        "from r_tsvm_kernels.engine.output import locked_stage\n"
        "with locked_stage(Path(sys.argv[1])):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        cwd=PROGRAM.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "locked\n"
        done = run("windows", "merge", *inputs, check=False)
        assert done.returncode == 2 and "another merge into this output is running" in done.stderr, done.stderr
    finally:
        holder.communicate("")
    run("windows", "merge", *inputs)
