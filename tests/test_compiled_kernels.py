"""Each Triton kernel, compiled for each GPU as launched: no spills, nothing inexact, wide accesses, tensor cores.

The launches are those of the cases marked `compiled` of each op; compile_launches.py records them. make test compiles
the first launch of each kernel for sm_90. The rest is left to make test-all: every launch for sm_90, which takes
minutes, and the first of each kernel for sm_80 and sm_100, and by an older Triton. After a change of a kernel, compile
every launch for more of them, and by the older Triton: ``RTSVM_ARCHITECTURES="86 89 100 120" make test-all``.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from r_tsvm_kernels import backends
from r_tsvm_kernels.dispatch import ops

STATE = backends.READY if os.environ.get("TRITON_INTERPRET") == "1" else backends.triton_state()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STATE != backends.READY, reason=f"compiles with Triton: {STATE}"),
    pytest.mark.skipif(find_spec("triton") is None, reason="compiles with Triton, which is not installed"),
]

exhaustive = pytest.mark.exhaustive
MORE = [int(architecture) for architecture in os.environ.get("RTSVM_ARCHITECTURES", "").split()]
ARCHITECTURES = [pytest.param(architecture, marks=exhaustive) for architecture in (90, *MORE)]
FIRST = [90, *(pytest.param(architecture, marks=exhaustive) for architecture in sorted({80, 100, *MORE} - {90}))]
TENSOR_CORE = {90: "wgmma.mma_async", 100: "tcgen05.mma"}  # the others: mma.sync
PRODUCTS = {"gemm3_kernel", "symmetric_kernel"}
# By op and kernel.
WIDTHS = {(name, kernel): least for name, op in ops().items() for kernel, least in op.cases.WIDTHS.items()}
TESTS = Path(__file__).parent
OLDER_TRITON = "3.6.0"  # beside PyTorch 2.11


def compiled(architecture, folder, *options, packages=None):
    """Return the reports of all kernels, and what was not launched. Nothing is in the cache of Triton.

    `packages` is a folder with another Triton, of version `OLDER_TRITON`.
    """
    first = [] if packages is None else [str(packages)]
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_DISABLE_LINE_INFO": "1",  # the same code, a sixth faster
        "PYTHONPATH": os.pathsep.join([*first, str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(TESTS / "compile_launches.py"), str(architecture), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    *rows, last = (json.loads(line) for line in done.stdout.splitlines())
    assert packages is None or last["triton"] == OLDER_TRITON
    return rows, last["missing"]


def show(capsys, architecture, rows):
    lines = [
        f"  {row['op']:16}{row['kernel']:22}{row.get('registers', ''):>4} registers{row['shared']:7} B shared"
        f"{row.get('blocks', ''):>3} blocks at once{row.get('load', ''):>4} B read{row.get('store', ''):>4} B written"
        f"  {row['case']}"
        for row in rows
    ]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", f"triton, {architecture}", *lines, ""]))


def widths(rows):
    """Return for each kernel of an op the least width of its reads and of its writes, where sizes let them be wide."""
    found = {}
    for row in rows:
        if row["aligned"]:
            key = row["op"], row["kernel"]
            read, written = found.get(key, (row["load"], row["store"]))
            found[key] = (min(read, row["load"]), min(written, row["store"]))
    return found


def check(architecture, rows):
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
    assert wrong(lambda row: row["unguarded"]) == []
    assert wrong(lambda row: row["serialized"]) == []
    most = (227 if architecture in (90, 100) else 99) * 1024
    assert wrong(lambda row: row["shared"] > most) == []
    narrower = {
        kernel: (found, WIDTHS[kernel])
        for kernel, found in widths(rows).items()
        if any(size < least for size, least in zip(found, WIDTHS[kernel], strict=True))
    }
    assert narrower == {}


@pytest.mark.parametrize("architecture", FIRST)
def test_the_first_launch_of_each_kernel(architecture, tmp_path):
    rows, missing = compiled(architecture, tmp_path, "--once")
    assert missing == {}, "kernels without a case that is compiled"
    assert all(row["aligned"] for row in rows)
    check(architecture, rows)


@pytest.fixture
def older_triton(tmp_path_factory):
    """A folder with an older Triton."""
    folder = tmp_path_factory.mktemp("older_triton")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"triton=={OLDER_TRITON}"], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(reason=f"Triton {OLDER_TRITON} cannot be installed: {done.stderr[-300:]}")
    return folder


@exhaustive
def test_launches_by_an_older_triton(older_triton, tmp_path):
    rows, missing = compiled(90, tmp_path, *([] if MORE else ["--once"]), packages=older_triton)
    assert missing == {}, "kernels without a case that is compiled"
    check(90, rows)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch(architecture, tmp_path, capsys):
    rows, missing = compiled(architecture, tmp_path)
    show(capsys, f"sm_{architecture}", rows)
    assert missing == {}, "kernels without a case that is compiled"
    assert widths(rows).keys() == WIDTHS.keys()
    counts = [{row["kernel"] for row in rows if row["count"] == size} for size in ("i32", "i64")]
    assert counts[0] == counts[1] != set(), "kernels that count elements in 32 bits, and in 64"
    check(architecture, rows)


def test_narrow_arithmetic_would_be_seen():
    from compile_launches import narrow_program_ids

    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.muli %0, %c : i32") != []
    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.extsi %0 : i32 to i64") == []


def test_the_width_of_accesses():
    from compile_launches import widest

    ptx = """
    ld.global.b64 { %rd2 }, [ %rd3 + 0 ];
    @!%p1 ld.global.b32 { %r1 }, [ %rd1 + 0 ];
    st.global.b16 [ %rd2 + 0 ], { %rs1 };
    """
    assert (widest(ptx, "ld"), widest(ptx, "st"), widest("", "ld")) == (4, 2, 0)
    assert widest("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "ld") == 16
    assert widest("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "ld") == 16


def test_products_that_wait_for_each_other_would_be_seen():
    from compile_launches import serialized

    first, last = "HGMMA.64x128x16.F32 R88, gdesc[UR12], R88 ;", "HGMMA.64x128x16.F32 R88, gdesc[UR4], R88, gsb0 ;"
    assert serialized("\n".join([last, "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", last]))
    assert not serialized("\n".join([first, last])) and not serialized("")


def test_an_overwrite_without_a_barrier_would_be_seen():
    from compile_launches import unguarded_writes

    wait, barrier, copy = (
        "wgmma.wait_group.sync.aligned 0;",
        "bar.sync 0;",
        "cp.async.cg.shared.global [ %r1 ], [ %r2 ];",
    )
    assert unguarded_writes("\n".join([wait, copy, barrier])) == [copy]
    assert unguarded_writes("\n".join([copy, wait, barrier, copy, "st.shared.b32 [ %r1 ], %r2;"])) == []


@pytest.mark.parametrize("architecture", [pytest.param("gfx942", marks=exhaustive)])
def test_amd(architecture, tmp_path, capsys):
    """Reports only: no AMD GPU is supported yet."""
    rows, missing = compiled(architecture, tmp_path, "--once")
    show(capsys, architecture, rows)
    assert rows and not missing
