"""The CPU kernels give the same bits on 64-bit ARM, and with threads of their own in place of OpenMP."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Werror"]
ARM, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs GCC: apt-get install g++"),
]


def build(compiler, folder, *flags, level="-O1"):
    """Compile the kernels and the program that prints checksums of their results: they depend on no optimisation."""
    program = folder / "checksums"
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "tests" / "native_checksums.cpp"]
    command = [
        compiler,
        level,
        *FLAGS,
        f"-I{ROOT / 'csrc' / 'include'}",
        *flags,
        *map(str, sources),
        "-o",
        str(program),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return program


def lines(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The lines of this processor, with OpenMP and the widest vectors that it has."""
    found = lines(build("g++", tmp_path_factory.mktemp("here"), "-fopenmp", level="-O3"), 1)
    assert len(found) == len(set(found)) == 4 * 13
    return found


def test_own_threads(expected, tmp_path):
    program = build("g++", tmp_path, "-pthread", "-DRTSVM_ISA_CLONES=", "-DRTSVM_ONE_ISA")
    assert all(lines(program, threads) == expected for threads in (1, 2, 5))


@pytest.mark.skipif(ARM is None, reason="no cross compiler: apt-get install g++-aarch64-linux-gnu")
@pytest.mark.skipif(QEMU is None, reason="no emulator: apt-get install qemu-user-static")
def test_arm(expected, tmp_path):
    program = build(ARM, tmp_path, "-pthread", "-static")
    assert all(lines(QEMU, program, threads) == expected for threads in (1, 3))
    # The test sees what differs: with fused multiply-add, ARM rounds less often.
    fused = build(ARM, tmp_path, "-pthread", "-static", "-ffp-contract=fast", level="-O3")
    assert lines(QEMU, fused, 1) != expected
