"""The Triton kernels compile for every architecture that is supported, without register spills, on any machine."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from r_tsvm_kernels import backends

STATE = "tested in the interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else backends.triton_state()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STATE != backends.READY, reason=f"triton: {STATE}"),
]

ARCHITECTURES = [80, 86, 89, 90, 100]
TASKS = 8  # of the kernels that take all at once
# Base, fine-tuned, what they are subtracted in, type of the element count.
MIXES = {
    "bf16": ("*bf16", "*bf16", "fp32", "i32"),
    "fp16": ("*fp16", "*fp16", "fp32", "i64"),
    "fp32": ("*fp32", "*fp32", "fp32", "i64"),
    "fp32-bf16": ("*fp32", "*bf16", "fp32", "i64"),
    "fp64": ("*fp64", "*fp64", "fp64", "i64"),
}
FLOAT64 = ("theta_ptr", "small_limit_ptr", "parts_ptr")
REAL = ("threshold_ptr", "thresholds_ptr", "alpha_ptr", "numbers_ptr", "out_ptr")
INTEGERS = (
    "prefixes_ptr", "counts_ptr", "ties_in_ptr", "ties_ptr", "ties_before_ptr", "draw_ptr", "draws_ptr", "bad_ptr"
)  # fmt: skip
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def cases():
    """Yield a label, a kernel, and the type (text) or the constant value of each argument; also "options"."""
    import torch
    import triton.language as tl

    add, select, prune, measure, mask, elect, rank, gram, spread, draw = (
        import_module(f"r_tsvm_kernels.ops.{op}.triton_kernel")
        for op in ("add_update", "magnitude_select", "reweight_prune", "task_statistics", "random_mask",
                   "elect_and_sum", "magnitude_ranks", "task_gram", "task_spread", "ranked_mask")
    )  # fmt: skip
    digits = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
    digits = {name: select.FORMATS[dtype].digits for name, dtype in digits.items()}
    nothing_pruned = dict.fromkeys(("theta_ptr", "threshold_ptr", "ties_ptr", "ties_before_ptr"))
    drawn = {"draw_ptr": "*i64", "out_ptr": "*u8", "numel": "i64", "BLOCK": mask.BLOCK}
    yield "random_mask_kernel bf16", mask.random_mask_kernel, drawn
    drawn |= {"ranks_ptr": "*i32", "thresholds_ptr": "*i64", "BLOCK": draw.BLOCK}
    yield "ranked_mask_kernel bf16", draw.ranked_mask_kernel, drawn
    for mix, (base, tuned, real, count) in MIXES.items():
        common = {
            "numel": count,
            "blocks": "i32",
            "cols": "i32",
            "base_ptr": base,
            "tuned_ptr": tuned,
            "tuned_ptrs": (tuned, base) * (TASKS // 2),
            "update_ptr": tuned,
            "x_ptr": tuned,
            "ranks_ptr": "*i32",
            "mask_ptr": "*u8",
        }
        common |= dict.fromkeys(INTEGERS, "*i64") | dict.fromkeys(FLOAT64, "*fp64") | dict.fromkeys(REAL, f"*{real}")
        common |= {"REAL": {"fp32": tl.float32, "fp64": tl.float64}[real]}
        common |= {"PREFIXES": 1, "BITS": digits[real][0], "SHIFT": sum(digits[real][1:])}
        measured = {**common, "BLOCK": measure.BLOCK, "options": measure.OPTIONS}
        yield f"moments_kernel {mix}", measure.moments_kernel, measured
        yield f"tail_kernel {mix}", measure.tail_kernel, measured
        yield f"add_update_kernel {mix}", add.add_update_kernel, {**common, "BLOCK": add.BLOCK}
        count_digits = {**common, "BLOCK": select.BLOCK}
        yield f"digit_kernel {mix} delta", select.digit_kernel, count_digits
        if mix in ("bf16", "fp64"):
            second = {"PREFIXES": select.TOGETHER, "BITS": digits[real][1], "SHIFT": sum(digits[real][2:])}
            yield f"digit_kernel {mix} several", select.digit_kernel, {**count_digits, **second}
        if mix in digits:
            alone = {"base_ptr": None, "theta_ptr": None, "REAL": None if real != mix else common["REAL"]}
            alone |= {"BITS": digits[mix][0], "SHIFT": sum(digits[mix][1:])}
            yield f"digit_kernel {mix}", select.digit_kernel, {**count_digits, **alone}
        if real == "fp32":
            for columns in (1024, rank.LONGEST) if mix == "bf16" else (1024,):
                row = {**common, "BLOCK": columns, "options": rank.options(columns)}
                yield f"rank_kernel {mix} {columns}", rank.rank_kernel, row
        yield f"tie_kernel {mix}", prune.tie_kernel, {**common, "BLOCK": prune.BLOCK}
        yield f"prune_kernel {mix}", prune.prune_kernel, {**common, "BLOCK": prune.BLOCK}
        yield f"prune_kernel {mix} all", prune.prune_kernel, {**common, **nothing_pruned, "BLOCK": prune.BLOCK}
        for label, options in elections(TASKS, real):
            merge = {**common, **options, "BLOCK": elect.BLOCK}
            if label == "all" or mix in ("bf16", "fp64"):
                yield f"elect_and_sum_kernel {mix} {label}", elect.elect_and_sum_kernel, merge
        yield f"elect_and_sum_ties {mix}", elect.tie_kernel, merge
        for tasks in (2, TASKS, spread.MOST):
            distances = {**common, "tuned_ptrs": (tuned, base) * (tasks // 2), "out_ptr": "*fp64"}
            distances |= {"GROUP": spread.GROUP, "BLOCK": spread.BLOCK}
            if tasks == TASKS or mix in ("bf16", "fp64"):
                yield f"spread_kernel {mix} {tasks}", spread.spread_kernel, distances
        for tasks, absent in ((2, ["base_ptr", "mask_ptr"]), (TASKS, ["base_ptr"]), (TASKS, []), (2 * gram.GROUP, [])):
            members, pairs = list(gram.launches(tasks))[-1]
            products = {**common, "tuned_ptrs": (tuned, base) * (len(members) // 2), **dict.fromkeys(absent)}
            products |= {"PAIRS": pairs, "STEPS": gram.STEPS, "BLOCK": gram.BLOCK}
            if (tasks == TASKS and not absent) or mix in ("bf16", "fp64"):
                yield f"gram_kernel {mix} {tasks}{' alone' * bool(absent)}", gram.gram_kernel, products
    yield "digit_kernel bf16 one bit", select.digit_kernel, {**count_digits, "BITS": 1, "SHIFT": 29}


def elections(tasks, real):
    """Yield a label and the arguments of `elect_and_sum_kernel`, from the simplest to everything at once."""
    ranks_and_masks = ("ranks_ptrs", "rank_thresholds_ptrs", "rank_factors_ptrs", "mask_ptrs")
    absent = dict.fromkeys(ranks_and_masks, (None,) * tasks)
    ranks = {"ranks_ptrs": "*i32", "rank_thresholds_ptrs": "*i64", "rank_factors_ptrs": f"*{real}"}
    ranks = {name: (pointer,) * tasks for name, pointer in ranks.items()}
    no_selections, no_draws, draws = ((-1, -1),) * tasks, (False,) * tasks, (True,) * tasks
    nothing = {**absent, "SELECTIONS": no_selections, "DRAWN": no_draws, "ELECT": "none", "NORMALIZE": False}
    selections = tuple((2 * t, 2 * t + 1) for t in range(tasks))
    yield "all", nothing
    yield "mean", {**nothing, "ELECT": "count", "NORMALIZE": True}
    yield "dare", {**nothing, "DRAWN": draws}
    yield "della", {**nothing, **ranks, "DRAWN": draws, "ELECT": "sum", "NORMALIZE": True}
    unweighted = {**nothing, "mask_ptrs": ("*u8",) * tasks, "ELECT": "unweighted", "NORMALIZE": True}
    yield "unweighted", unweighted
    yield "everything", {**unweighted, "SELECTIONS": selections, "DRAWN": draws, "ELECT": "sum"}


def compiled(kernel, arguments, target):
    import triton
    from triton.compiler import ASTSource

    from r_tsvm_kernels.ops._triton import LAUNCH

    signature, constants, attributes = {}, {}, {}

    def describe(path, value, constant):
        if isinstance(value, tuple) and not constant:
            return tuple(describe((*path, place), part, constant) for place, part in enumerate(value))
        if constant or value is None:
            constants[path] = value
            return "constexpr"
        if value.startswith("*"):
            attributes[path] = [["tt.divisibility", 16]]  # as torch allocates
        return value

    for place, name in enumerate(kernel.arg_names):
        signature[name] = describe((place,), arguments[name], constant=name.isupper())
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=dict(arguments.get("options", LAUNCH)))


def resources(cubin, path):
    """Return registers and bytes of local memory (spills, for kernels without arrays of their own) of each thread."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listing = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, RESOURCES.search(listing).groups())
    return registers, stack + local


def narrow_program_ids(ir):
    """Return the operations that take a program's 32-bit number for arithmetic: the products exceed 2^31."""
    numbers = re.findall(r"(%\w+) = tt.get_(?:program_id|num_programs)", ir)
    users = [line.strip() for line in ir.splitlines() for number in numbers if re.search(rf"{number}\b(?! =)", line)]
    return [line for line in users if not re.search(r"arith.extsi|tt.addptr|scf.for", line)]


def test_narrow_arithmetic_would_be_seen():
    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.muli %0, %c : i32") != []
    assert narrow_program_ids("%0 = tt.get_program_id x : i32\n%1 = arith.extsi %0 : i32 to i64") == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_triton_kernel_spills(architecture, tmp_path, monkeypatch, capsys):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # the same code, a sixth faster
    rows = []
    for label, kernel, arguments in cases():
        result = compiled(kernel, arguments, GPUTarget("cuda", architecture, 32))
        # Flushing subnormals, fusing a product into a sum, dividing roughly: each would change results.
        for inexact in (".ftz", "fma.rn", "div.full", "div.approx"):
            assert inexact not in result.asm["ptx"], (label, inexact)
        assert narrow_program_ids(result.asm["ttir"]) == [], label
        rows.append((label, result.metadata.shared, *resources(result.asm["cubin"], tmp_path / "kernel.cubin")))
    table = [f"  {label:38}{used:4} registers{shared:7} B shared{spilled:5} B spilled"
             for label, shared, used, spilled in rows]  # fmt: skip
    with capsys.disabled():
        sys.stdout.write("\n".join(["", f"triton, sm_{architecture}", *table, ""]))
    assert [label for label, _, _, spilled in rows if spilled] == []


def test_amd(tmp_path, monkeypatch, capsys):
    """Reports only: no AMD GPU is supported yet."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # the same code, a sixth faster
    lines = []
    for label, kernel, arguments in cases():
        if label.split()[1] in ("bf16", "fp64"):
            try:
                shared = compiled(kernel, arguments, GPUTarget("hip", "gfx942", 64)).metadata.shared
                lines.append(f"  {label:38}{shared:7} B shared")
            except Exception as error:  # a report, whatever the compiler raises
                lines.append(f"  {label:38} does not compile: {type(error).__name__}")
    with capsys.disabled():
        sys.stdout.write("\n".join(["", "triton, gfx942", *lines, ""]))
    assert lines
