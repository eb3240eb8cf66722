"""FP8 and MXFP4: the values that are read are those of plain PyTorch, in any rows and pieces."""

import json

import pytest
import torch
from safetensors.torch import save_file
from scaled_weights import fp8, mxfp4

from r_tsvm_kernels import QuantisedRefusedError
from r_tsvm_kernels.checkpoint import Checkpoint, without_quantisation

LAYOUTS = {
    "blocks": ((300, 200), (3, 2)),
    "few columns": ((300, 7), (3, 1)),
    "matrix": ((30, 20), ()),
    "matrix of one": ((30, 20), (1,)),
    "rows": ((30, 20), (30, 1)),
    "rows of one dimension": ((30, 20), (30,)),
    "experts": ((3, 300, 200), (3, 3, 2)),
    "experts, matrix": ((3, 30, 20), (3, 1, 1)),
    "experts, one scale": ((3, 30, 20), ()),
    "experts, rows": ((3, 30, 20), (3, 30)),
    "experts, columns": ((3, 30, 20), (3, 1, 20)),
}


def folder(path, tensors, config=None):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8(tmp_path, monkeypatch, layout):
    shape, scale_shape = LAYOUTS[layout]
    weight, scales, values = fp8(shape, scale_shape)
    names = (
        ("mlp.experts.up_proj", "mlp.experts.up_proj_scale") if len(shape) == 3 else ("q.weight", "q.weight_scale_inv")
    )
    checkpoint = Checkpoint(folder(tmp_path / "m", dict(zip(names, (weight, scales), strict=True))))
    assert list(checkpoint.tensors) == [names[0]]
    header = checkpoint.tensors[names[0]]
    assert (header.dtype, header.shape, header.written_as) == (torch.float32, shape, torch.bfloat16)
    assert torch.equal(checkpoint.load(names[0]), values)
    for piece in (1, 50, 1000):
        monkeypatch.setattr("r_tsvm_kernels.checkpoint.scaled.PIECE", piece)
        for rows in ((0, 1), (1, 3), (shape[0] - 1, shape[0]), (2, 2)):
            assert torch.equal(checkpoint.load(names[0], rows=rows), values[slice(*rows)])


@pytest.mark.parametrize("ending", ["weight_scale_inv", "weight_scale", "scale_weight", "scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_names_and_dtypes_of_fp8(tmp_path, ending, dtype):
    weight, scales, values = fp8((20, 12), (20, 1), dtype=dtype, scale_dtype=torch.bfloat16)
    beside = {"q.input_scale": torch.ones(()), "k_scale": torch.ones(1), "norm.weight": torch.ones(3)}
    checkpoint = Checkpoint(folder(tmp_path / "m", {"q.weight": weight, f"q.{ending}": scales, **beside}))
    assert set(checkpoint.tensors) == {"q.weight", "norm.weight"}
    assert torch.equal(checkpoint.load("q.weight"), values)


def test_the_configuration_has_the_size_of_blocks(tmp_path):
    weight, scales, values = fp8((20, 12), (3, 3), block=(8, 4))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 4]}}
    tensors = {"q.weight": weight, "q.weight_scale_inv": scales}
    for i, found in enumerate((config, {"text_config": config})):
        assert torch.equal(Checkpoint(folder(tmp_path / str(i), tensors, found)).load("q.weight"), values)
        assert "quantization_config" not in str(without_quantisation(found))
    with pytest.raises(QuantisedRefusedError, match="block of 128 x 128, row or matrix"):
        Checkpoint(folder(tmp_path / "other", tensors))


def test_mxfp4(tmp_path, monkeypatch):
    blocks, scales, values = mxfp4(3, 10, 64)
    scales[0, 0, 0] = 254
    name = "mlp.experts.gate_up_proj"
    blocks[0, 0, 0] = 0x21  # 0.5, then 1
    values[0, :32, 0] = torch.tensor([0.5, 1.0]).repeat(16) * 2.0**127
    checkpoint = Checkpoint(folder(tmp_path / "m", {f"{name}_blocks": blocks, f"{name}_scales": scales}))
    assert list(checkpoint.tensors) == [name] and checkpoint.tensors[name].shape == (3, 64, 10)
    for piece in (1 << 20, 100, 1):
        monkeypatch.setattr("r_tsvm_kernels.checkpoint.scaled.PIECE", piece)
        assert torch.equal(checkpoint.load(name).float(), values)
        assert torch.equal(checkpoint.load(name, rows=(1, 3)).float(), values[1:])


def test_a_byte_that_is_no_scale_is_nan(tmp_path):
    blocks, scales, _ = mxfp4(1, 2, 32)
    scales[0, 1] = 255
    checkpoint = Checkpoint(folder(tmp_path / "m", {"experts.w_blocks": blocks, "experts.w_scales": scales}))
    found = checkpoint.load("experts.w")[0]
    assert found[:, 1].isnan().all() and found[:, 0].isfinite().all()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"q.weight": fp8((20, 12), ())[0], "q.weight_scale": torch.ones(3, 5)}, {}, "has no scale for each block"),
        (
            {"q.weight": fp8((4, 4), ())[0], "q.weight_scale": torch.ones(()), "k.weight": fp8((4, 4), ())[0]},
            {},
            "k.weight is float8_e4m3fn without scales",
        ),
        (
            {"q.weight": fp8((4, 4), ())[0], "q.weight_scale": torch.ones(())},
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config",
        ),
        (
            {"q.weight": fp8((4, 4), ())[0], "q.weight_scale": torch.ones(()), "k.qweight": torch.ones(4, 4).int()},
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "k.qweight",
        ),
        ({"q.weight": torch.ones(4, 4)}, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"w_blocks": torch.ones(4, 2, 15).byte(), "w_scales": torch.ones(4, 2).byte()}, {}, "MXFP4"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, tensors, config, message):
    with pytest.raises(QuantisedRefusedError, match=message):
        Checkpoint(folder(tmp_path / "m", tensors, config))
