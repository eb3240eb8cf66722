"""Each Triton kernel, compiled for each GPU as launched: no spills, nothing inexact, wide accesses, tensor cores.

The launches are those of the cases marked `compiled` of each op; compile_launches.py records them. All of it is left to
make test-all: an architecture takes three minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels import backends

STATE = backends.READY if os.environ.get("TRITON_INTERPRET") == "1" else backends.triton_state()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STATE != backends.READY, reason=f"compiles with Triton: {STATE}"),
]

exhaustive = pytest.mark.exhaustive
ARCHITECTURES = [pytest.param(architecture, marks=exhaustive) for architecture in (80, 86, 89, 90, 100, 120)]
TENSOR_CORE = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the others: mma.sync
PRODUCTS = {"gemm3_kernel", "symmetric_kernel"}
# Bytes that a thread reads, and writes, at once in the case where it is most: what the kernels have reached.
READ = {"add_update_kernel": 16, "gemm3_kernel": 16, "split_kernel": 16, "symmetric_kernel": 16}
WRITTEN = {"add_update_kernel": 16, "gemm3_kernel": 16, "split_kernel": 16}
TESTS = Path(__file__).parent


def compiled(architecture, folder):
    """Return the reports of all kernels, and what was not launched."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_DISABLE_LINE_INFO": "1",  # the same code, a sixth faster
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "compile_launches.py"), str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, last = (json.loads(line) for line in done.stdout.splitlines())
    return rows, last["missing"]


def show(capsys, architecture, rows):
    lines = [
        f"  {row['op']:16}{row['kernel']:22}{row.get('registers', ''):>4} registers{row['shared']:7} B shared"
        f"{row.get('load', ''):>4} B read{row.get('store', ''):>4} B written  {row['case']}"
        for row in rows
    ]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", f"triton, {architecture}", *lines, ""]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel(architecture, tmp_path, capsys):
    rows, missing = compiled(architecture, tmp_path)
    show(capsys, f"sm_{architecture}", rows)
    assert missing == {}, "kernels without a case that is compiled"

    def wrong(condition):
        return [(row["op"], row["kernel"], row["case"]) for row in rows if condition(row)]

    assert wrong(lambda row: row["spilled"]) == []
    # Products only accumulate on tensor cores, in an order of their own; there a fused multiply-add is no less exact.
    assert wrong(lambda row: ".ftz" in row["inexact"] or (row["inexact"] and row["kernel"] not in PRODUCTS)) == []
    assert wrong(lambda row: row["narrow"] and row["kernel"] not in PRODUCTS) == []
    instruction = TENSOR_CORE.get(architecture, "mma.sync")
    assert (
        wrong(lambda row: row["kernel"] in PRODUCTS and not any(p.startswith(instruction) for p in row["products"]))
        == []
    )
    most = (227 if architecture in (90, 100) else 99) * 1024
    assert wrong(lambda row: row["shared"] > most) == []
    for least, what in ((READ, "load"), (WRITTEN, "store")):
        widest = {name: max(row[what] for row in rows if row["kernel"] == name) for name in least}
        assert not {name: size for name, size in widest.items() if size < least[name]}, what


def test_narrow_arithmetic_would_be_seen():
    from compile_launches import narrow_program_ids

    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.muli %0, %c : i32") != []
    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.extsi %0 : i32 to i64") == []


def test_the_width_of_accesses():
    from compile_launches import widest

    ptx = """
    @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    st.global.b16 [ %rd2 + 0 ], { %rs1 };
    """
    assert (widest(ptx, "ld"), widest(ptx, "st"), widest("", "ld")) == (16, 2, 0)
    assert widest("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "ld") == 16


@pytest.mark.parametrize("architecture", [pytest.param("gfx942", marks=exhaustive)])
def test_amd(architecture, tmp_path, capsys):
    """Reports only: no AMD GPU is supported yet."""
    rows, missing = compiled(architecture, tmp_path)
    show(capsys, architecture, rows)
    assert rows and not missing
