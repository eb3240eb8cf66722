"""A disk that is full, for real: a small tmpfs in a mount namespace of its own."""

import json
import shutil
import subprocess
import sys

import pytest

# Runs in the namespace; prints what happened as JSON.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from r_tsvm_kernels import DiskFullError
from r_tsvm_kernels.checkpoint import ShardFile, ShardLayout, TensorSpec, writer

folder = Path(sys.argv[1])
small, large = (ShardLayout("s", {"a": TensorSpec(torch.uint8, (n,))}) for n in (500_000, 3_000_000))
try:
    ShardFile.create(folder / "large", large)
except DiskFullError as error:
    print(json.dumps([str(error), os.listdir(folder)]))
with ShardFile.create(folder / "small", small) as shard:
    shard.write("a", torch.ones(500_000, dtype=torch.uint8))
    shard.sync()
# As on a file system that cannot reserve space.
writer.reserve = os.ftruncate
with ShardFile.create(folder / "large", large) as shard:
    try:
        shard.write("a", torch.ones(3_000_000, dtype=torch.uint8))
    except DiskFullError as error:
        print(json.dumps([str(error), sorted(os.listdir(folder))]))
"""


# The same where the table of files is full, not the room for their bytes.
NO_MORE_FILES = """
import sys
from pathlib import Path
import torch
from r_tsvm_kernels import DiskFullError
from r_tsvm_kernels.checkpoint import ShardFile, ShardLayout, TensorSpec

layout = ShardLayout("s", {"a": TensorSpec(torch.uint8, (8,))})
try:
    for number in range(20):
        ShardFile.create(Path(sys.argv[1]) / str(number), layout)
except DiskFullError as error:
    print(error)
"""


def in_namespace(folder, *command, options="size=1m"):
    mount = f'mount -t tmpfs -o {options} small "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(folder), *command], capture_output=True, text=True, timeout=120
    )


def test_full_disk(tmp_path):
    if shutil.which("unshare") is None or in_namespace(tmp_path, "true").returncode:
        pytest.skip("this system lets no user mount a tmpfs (unshare -rm)")
    done = in_namespace(tmp_path, sys.executable, "-c", SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    reserving, writing = map(json.loads, done.stdout.splitlines())
    assert (
        "large: the disk is full: 3,000," in reserving[0] and "bytes are needed and 1,048,576 are free" in reserving[0]
    )
    assert reserving[1] == []
    assert "large: the disk is full: 3,000,000 bytes are needed" in writing[0]
    assert writing[1] == ["large", "small"]


def test_no_room_for_another_file(tmp_path):
    if shutil.which("unshare") is None or in_namespace(tmp_path, "true").returncode:
        pytest.skip("this system lets no user mount a tmpfs (unshare -rm)")
    done = in_namespace(tmp_path, sys.executable, "-c", NO_MORE_FILES, str(tmp_path), options="size=1m,nr_inodes=8")
    assert done.returncode == 0, done.stderr
    assert "the disk is full: it has no room for another file, or a quota is used up (1,0" in done.stdout
