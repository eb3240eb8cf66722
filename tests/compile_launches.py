"""Compiles the Triton kernels for a GPU that is not there: compile_launches.py ARCHITECTURE [--once].

ARCHITECTURE is "90", or "gfx942". Runs the cases marked `compiled` of every op with a Triton backend. The driver is a
stand-in (triton_without_gpu.py): Triton specialises and compiles what is launched, and launches nothing. With --once,
only the first launch of each kernel is compiled. Prints one line of JSON per compiled kernel, and a last one with the
kernels that were never launched and the version of Triton. Must not run in Triton's interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import triton
from triton_without_gpu import launches

from r_tsvm_kernels import backends
from r_tsvm_kernels.dispatch import ops

RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# Flushing subnormals, fusing a product into a sum, dividing roughly: each would change results.
INEXACT = (".ftz", "fma.rn", "div.full", "div.approx")
PRODUCT = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*")
# Loads of whole blocks are masked, so each thread's has a predicate; a number that all threads need is read without.
ACCESS = {"ld": r"@!?%p\d+ ", "st": r"\b"}
ACCESS = {name: start + name + r"\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)" for name, start in ACCESS.items()}
COPY = r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (0x[0-9a-f]+|\d+)"  # to shared memory, past the registers


def kernels(module):
    """Return the names of the kernels that a module has, without the functions that they call."""
    functions = {name for name, value in vars(module).items() if isinstance(value, triton.runtime.jit.JITFunction)}
    return {name for name in functions if name.endswith("_kernel")}


def narrow_program_ids(ir):
    """Return the operations that take a program's 32-bit number for arithmetic: the products exceed 2^31."""
    numbers = re.findall(r"(%\w+) = tt.get_(?:program_id|num_programs)", ir)
    users = [line.strip() for line in ir.splitlines() for number in numbers if re.search(rf"{number}\b(?! =)", line)]
    return [line for line in users if not re.search(r"arith.extsi|tt.addptr|scf.for", line)]


def widest(ptx, instruction):
    """Return the bytes of the widest access of one thread to its elements in global memory, 0 for none."""
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in re.findall(ACCESS[instruction], ptx)]
    if instruction == "ld":
        sizes += [int(size, 0) for size in re.findall(COPY, ptx)]
    return max(sizes, default=0)


def unguarded_writes(ptx):
    """Return the writes to shared memory between a wait for tensor cores and the next barrier of the block.

    A warpgroup waits for its own products; another one may still read what is overwritten.
    """
    found, waited = [], False
    for line in ptx.splitlines():
        if "wgmma.wait_group" in line or "bar.sync" in line:
            waited = "wgmma" in line
        elif waited and re.search(r"cp\.async\.(?:c[ag]|bulk)|st\.shared", line):
            found.append(line.strip())
    return found


def listing(cubin, option):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def resources(cubin):
    """Return registers, and bytes of local memory (spills, for kernels without arrays of their own) of each thread."""
    registers, stack, local = map(int, RESOURCES.search(listing(cubin, "--dump-resource-usage")).groups())
    return registers, stack + local


def blocks_at_once(registers, warps, shared, architecture):
    """Return how many blocks a multiprocessor holds, by its threads, registers and shared memory."""
    large = architecture in (80, 90, 100)
    threads, memory = (2048 if large else 1536), ({80: 164}.get(architecture, 228) if large else 100) * 1024
    per_warp = -(-registers * 32 // 256) * 256
    return min(threads // (32 * warps), 65536 // per_warp // warps, memory // (shared + 1024))


def serialized(sass):
    """Whether ptxas lets each tensor-core instruction wait for the one before it, as it does where it sees a hazard.

    Otherwise only the last instruction of a product signals that it has ended.
    """
    signals = ["gsb0" in line for line in sass.splitlines() if "HGMMA." in line]
    return bool(signals) and all(signals)


def report(op, label, name, kernel, aligned, architecture):
    row = {"op": op, "case": label, "kernel": name, "shared": kernel.metadata.shared, "aligned": aligned}
    row["count"] = kernel.src.signature.get("numel")
    if "ptx" in kernel.asm:
        ptx = kernel.asm["ptx"]
        registers, spilled = resources(kernel.asm["cubin"])
        row |= {"registers": registers, "spilled": spilled, "load": widest(ptx, "ld"), "store": widest(ptx, "st")}
        row |= {
            "inexact": [text for text in INEXACT if text in ptx],
            "products": sorted({found[0] for found in PRODUCT.finditer(ptx)}),
            "unguarded": unguarded_writes(ptx),
            "blocks": blocks_at_once(registers, kernel.metadata.num_warps, kernel.metadata.shared, architecture),
            "serialized": "wgmma" in ptx and serialized(listing(kernel.asm["cubin"], "-sass")),
        }
    return row | {"narrow": narrow_program_ids(kernel.asm["ttir"])}


def main(architecture, once):
    backends.triton_interpreter_state = lambda: backends.READY  # tensors of the CPU are taken
    if not architecture.isdigit():
        torch.version.hip = architecture
    tiles = import_module("r_tsvm_kernels.ops._triton_products")
    number = int(architecture) if architecture.isdigit() else 90
    tile = tiles.TILES[max(key for key in tiles.TILES if key <= number)]
    for op in ops().values():
        if "triton" in op.backends:
            import_module(f"{op.__module__}.triton_kernel")
    for name, module in list(sys.modules.items()):  # no kernel writes the counts that ops read
        if name.startswith("r_tsvm_kernels.") and hasattr(module, "raise_not_finite"):
            module.raise_not_finite = lambda *arguments: None
    missing, seen = {}, set()
    with launches(architecture, once=once) as found:
        for name, op in ops().items():
            if "triton" not in op.backends:
                continue
            module = import_module(f"{op.__module__}.triton_kernel")
            expected, launched = kernels(module), set()
            if not expected and not op.cases.WIDTHS:
                continue  # it launches kernels of other ops
            for part in (tiles, module):
                if hasattr(part, "tile_of"):
                    part.tile_of = lambda tensor: tile
            for case in op.cases.cases("cpu"):
                if not case.compiled:
                    continue
                found.clear()
                op(*case.args, **case.options, backend="triton")
                for kernel_name, kernel, aligned in found:
                    launched.add(kernel_name)
                    if kernel is not None and kernel.hash not in seen:
                        seen.add(kernel.hash)
                        print(json.dumps(report(name, case.label, kernel_name, kernel, aligned, number)), flush=True)
            if expected - launched or not launched:
                missing[name] = sorted(expected - launched)
    print(json.dumps({"missing": missing, "triton": triton.__version__}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], once="--once" in sys.argv)
