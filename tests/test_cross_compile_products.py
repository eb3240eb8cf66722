"""The Triton products compile to tensor-core instructions for every architecture, without register spills."""

import re
import sys
from importlib import import_module

import pytest
from test_cross_compile_triton import ARCHITECTURES, STATE, resources

from r_tsvm_kernels import backends

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(STATE != backends.READY, reason=f"compiles with Triton: {STATE}"),
]

TENSOR_CORE = {90: r"wgmma\.mma_async\S*\.f32\.f16\.f16", 100: r"tcgen05\.mma\S*kind::f16"}
MMA_SYNC = r"mma\.sync\S*\.f32\.f16\.f16\.f32"
STRIDES = {"rows": ("i32", 1), "columns": (1, "i32")}


def cases(tile):
    """Yield a label, a kernel and the type (text) or the constant value of each of its arguments."""
    products = import_module("r_tsvm_kernels.ops._triton_products")
    gemm = import_module("r_tsvm_kernels.ops.gemm3.triton_kernel")
    common = dict.fromkeys(
        ("linear_ptr", "quadratic_ptr", "sums_ptr", "scale_ptr", "inverse_ptr", "share_ptr"), "*fp32"
    )
    common |= dict.fromkeys(("n", "m", "k", "stride_b", "stride_ab", "stride_bb", "stride_cb", "stride_cm"), "i32")
    common |= {"done_ptr": "*i32", "stride_cn": 1, "BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    common |= {"CHUNK": products.CHUNK, "GROUP": gemm.GROUP}
    for low, suffix in (("*fp16", "x3"), (None, "x1")):
        planes = {"hi_ptr": "*fp16", "a_hi": "*fp16", "b_hi": "*fp16", "out_ptr": "*fp16", "c_ptr": "*fp16"}
        planes |= dict.fromkeys(("lo_ptr", "a_lo", "b_lo", "out_lo_ptr", "c_lo_ptr"), low)
        plain = {"out_ptr": "*fp32", "out_lo_ptr": None, "linear_ptr": None, "done_ptr": None}
        for order, (first, second) in STRIDES.items():
            sides = {"stride_n": first, "stride_k": second}
            sides |= {"stride_am": first, "stride_ak": second, "stride_bk": first, "stride_bn": second}
            values = {**common, **planes, **sides}
            yield f"symm_gram fp16{suffix} {order}", products.symmetric_kernel, {**values, **plain}
            yield f"gemm3 fp16{suffix} {order} to planes", gemm.gemm3_kernel, values
            merged = {"out_ptr": "*bf16", "out_lo_ptr": None, "c_ptr": "*bf16", "c_lo_ptr": None}
            yield f"gemm3 fp16{suffix} {order} to bf16", gemm.gemm3_kernel, {**values, **merged}
        values = {**common, **planes, "stride_n": "i32", "stride_k": 1}
        yield f"symm_square fp16{suffix}", products.symmetric_kernel, values


def compiled(kernel, arguments, target, tile):
    import triton
    from triton.compiler import ASTSource

    from r_tsvm_kernels.ops._triton import LAUNCH

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        signature[name] = value if isinstance(value, str) else "constexpr"
        if signature[name] == "constexpr":
            constants[(place,)] = value
        else:
            attributes[(place,)] = [["tt.divisibility", 16]]  # memory as torch allocates it, sizes as models have them
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {**LAUNCH, "num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=target, options=options)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 120])
def test_products_use_tensor_cores_and_do_not_spill(architecture, tmp_path, monkeypatch, capsys):
    from triton.backends.compiler import GPUTarget

    from r_tsvm_kernels.ops._triton_products import TILES

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # the same code, a sixth faster
    tile = TILES[max(key for key in TILES if key <= architecture)]
    instruction = re.compile(TENSOR_CORE.get(architecture, MMA_SYNC))
    rows = []
    for label, kernel, arguments in cases(tile):
        result = compiled(kernel, arguments, GPUTarget("cuda", architecture, 32), tile)
        found = len(instruction.findall(result.asm["ptx"]))
        assert found and ".ftz" not in result.asm["ptx"], label
        used, spilled = resources(result.asm["cubin"], tmp_path / "kernel.cubin")
        rows.append((label, found, used, result.metadata.shared, spilled))
    table = [f"  {label:34}{found:4} products{used:4} registers{shared:7} B shared{spilled:5} B spilled"
             for label, found, used, shared, spilled in rows]  # fmt: skip
    with capsys.disabled():
        sys.stdout.write("\n".join(["", f"triton, sm_{architecture}", *table, ""]))
    assert [row[0] for row in rows if row[-1]] == []
    assert all(shared <= (227 if architecture in (90, 100) else 99) * 1024 for *_, shared, _ in rows)
