"""The CUDA sources compile for every architecture that is shipped, without register spills."""

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
USAGE = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def readable(symbol: str) -> str:
    """Shorten a mangled kernel name to ``moments_kernel<float>``."""
    name = re.search(r"([a-z_]+_kernel)(?:I([fd])E)?", symbol)
    assert name is not None, symbol
    return name[1] + {"f": "<float>", "d": "<double>", None: ""}[name[2]]


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
    assert [name for name, _, _, spilled in rows if spilled] == []
