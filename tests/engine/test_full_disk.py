"""Merges onto a disk that is full, for real: a small tmpfs in a mount namespace of its own."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import save

from r_tsvm_kernels import MergeConfig, merge_checkpoints

# Runs in the namespace; prints what happened as JSON.
SCRIPT = """
import json, os, sys
from pathlib import Path
from r_tsvm_kernels import DiskFullError, MergeConfig, merge_checkpoints
from r_tsvm_kernels.engine import job

job.COMMIT_SECONDS = 0.0
disk, config = Path(sys.argv[1]), MergeConfig.from_yaml(sys.argv[2])
facts = {}

def fill(state):
    # The shards have their space; what grows now is the journal.
    if state.tensors_done == 5:
        with open(disk / "ballast", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

def attempt(key, **options):
    try:
        facts[key] = merge_checkpoints(config, disk / "out", threads=1, **options).resumed
    except DiskFullError as error:
        facts[key] = str(error)
    facts[key + "_left"] = sorted(os.listdir(disk))

(disk / "ballast").write_bytes(bytes(600_000))
attempt("too_small")
(disk / "ballast").unlink()
attempt("filled", progress=fill)
attempt("still_full", resume=True)
(disk / "ballast").unlink()
attempt("resumed", resume=True)
facts["weights"] = (disk / "out" / "model.safetensors").read_bytes().hex()
print(json.dumps(facts))
"""


def in_namespace(folder, *command):
    mount = 'mount -t tmpfs -o size=1m small "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(folder), *command], capture_output=True, text=True, timeout=120
    )


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or in_namespace(disk, "true").returncode:
        pytest.skip("this system lets no user mount a tmpfs (unshare -rm)")
    paths = [save(tmp_path / name, {f"w{i}": torch.randn(40, 40) for i in range(100)}) for name in ("base", "tuned")]
    config = MergeConfig(merge_method="linear", base_model=str(paths[0]), models=({"model": str(paths[1])},))
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    done = in_namespace(disk, sys.executable, "-c", SCRIPT, str(disk), str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "more bytes are needed and" in facts["too_small"] and "resume" not in facts["too_small"]
    assert facts["too_small_left"] == ["ballast"]
    assert "cannot be written: No space left on device" in facts["filled"]
    assert "tensors are finished: run again with --resume" in facts["filled"]
    assert facts["filled_left"] == [".out.partial", "ballast"] == facts["still_full_left"]
    assert "No space left on device" in facts["still_full"]
    assert facts["resumed"] >= 5 and facts["resumed_left"] == ["out"]
    whole = merge_checkpoints(config, tmp_path / "whole")
    assert facts["weights"] == (whole.path / "model.safetensors").read_bytes().hex()
