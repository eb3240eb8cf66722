"""The CUDA sources compile for every architecture that is shipped, without register spills and with wide accesses."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [80, 86, 89, 90, 100]
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")]

SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# The bytes that one thread stores, or loads, at once.
WIDTHS = dict.fromkeys(["prune_kernel", "elect_kernel", "sum_kernel"], ("STG", 16)) | {"pattern_kernel": ("LDG", 16)}
TRITON = importlib.util.find_spec("triton")
DISASSEMBLER = shutil.which("cuobjdump") or (
    TRITON and str(Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
)

USAGE = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def readable(symbol: str) -> str:
    """Shorten a mangled kernel name to ``moments_kernel<float>``."""
    name = re.search(r"([a-z_]+_kernel)(?:I([fd])E)?", symbol)
    assert name is not None, symbol
    return name[1] + {"f": "<float>", "d": "<double>", None: ""}[name[2]]


def widest(sass: str, kernel: str, instruction: str) -> int:
    """Return the bytes of the widest access among the instructions (LDG or STG) of a kernel."""
    for part in sass.split("Function : ")[1:]:
        if readable(part.split(maxsplit=1)[0]) == kernel:
            kinds = re.findall(rf"\b{instruction}\.([\w.]+)", part)
            return max((int(bits) // 8 for kind in kinds for bits in re.findall(r"\d+$", kind)), default=4)
    raise AssertionError(f"no {kernel} in the listing")


@pytest.mark.parametrize(
    "architecture",
    [90, *(pytest.param(number, marks=pytest.mark.exhaustive) for number in ARCHITECTURES if number != 90)],
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source, architecture, tmp_path, capsys):
    if architecture == 100:
        listed = subprocess.run([NVCC, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        if "sm_100" not in listed.split():
            pytest.skip("this nvcc is older than 12.8 and does not know sm_100")
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", f"-I{ROOT / 'csrc' / 'include'}", f"-arch=sm_{architecture}"]
    command += ["-cubin", "-Xptxas=-v", "-Werror=all-warnings", "-o", str(tmp_path / "kernels.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    rows = []
    for report in done.stderr.split("Compiling entry function")[1:]:
        name = readable(report.split("'")[1])
        (stores, loads), (registers, shared) = SPILLS.search(report).groups(), USAGE.search(report).groups()
        rows.append((name, int(registers), int(shared or 0), int(stores) + int(loads)))
    table = [
        f"  {name:24}{used:4} registers{shared:7} B shared{spilled:5} B spilled" for name, used, shared, spilled in rows
    ]
    with capsys.disabled():
        sys.stdout.write("\n".join(["", f"sm_{architecture}", *sorted(table), ""]))
    assert rows, "no kernel was reported"
    if DISASSEMBLER:
        command = [DISASSEMBLER, "-sass", str(tmp_path / "kernels.cubin")]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name in {name for name, *_ in rows if name.split("<")[0] in WIDTHS}:
            instruction, least = WIDTHS[name.split("<")[0]]
            assert widest(listing, name, instruction) >= least, name
    assert [name for name, _, _, spilled in rows if spilled] == []
