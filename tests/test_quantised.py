"""Quantised weights are recognised by what they are; integers are kept only where all models have the same."""

import pytest
import torch
from compare import same_bits

from r_tsvm_kernels import DTypeError, MergeConfig, QuantisedRefusedError, merge_state_dicts, merge_tensors
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.quantised import refuse_quantised

LINEAR = MergeConfig(merge_method="linear")


def ints(*shape, dtype=torch.int32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, dtype=torch.int64, generator=generator).to(dtype)


def float8(*shape):
    return torch.linspace(-4, 4, ints(*shape).numel()).reshape(shape).to(torch.float8_e4m3fn)


# What each format writes for one layer.
FORMATS = {
    "gptq": {"q.qweight": ints(2, 16), "q.qzeros": ints(1, 2), "q.scales": torch.ones(1, 16), "q.g_idx": ints(16)},
    "awq": {"q.qweight": ints(16, 2), "q.qzeros": ints(1, 2), "q.scales": torch.ones(1, 16).half()},
    "gptq without zeros": {"q.qweight": ints(2, 16)},
    "bitsandbytes int8": {"q.weight": ints(16, 16, dtype=torch.int8), "q.SCB": torch.ones(16)},
    "bitsandbytes nf4": {"q.weight": ints(128, 1, dtype=torch.uint8), "q.weight.absmax": torch.ones(4)},
    "bitsandbytes state": {
        "q.weight": ints(128, 1, dtype=torch.uint8),
        "q.weight.quant_state.bitsandbytes__nf4": ints(20, dtype=torch.uint8),
    },
    "mxfp4": {
        "experts.up_proj_blocks": ints(2, 8, 1, 16, dtype=torch.uint8),
        "experts.up_proj_scales": ints(2, 8, 1, dtype=torch.uint8),
    },
    "fp8": {"q.weight": float8(16, 16), "q.weight_scale_inv": torch.ones(1, 1)},
    "fp8 per tensor": {"q.weight": float8(16, 16), "q.weight_scale": torch.ones(()), "q.input_scale": torch.ones(())},
    "fp8 experts": {"experts.up_proj": float8(2, 8, 8), "experts.up_proj_scale": torch.ones(2, 1, 8)},
    "fp8 of image models": {"q.weight": float8(16, 16), "q.scale_weight": torch.ones(())},
    "fp8 as first published": {"q.weight": float8(16, 16), "q.scale": torch.ones(1, 1)},
    "int8": {"q.weight": ints(16, 16, dtype=torch.int8), "q.weight_scale": torch.ones(16, 1)},
    "nvfp4": {"q.weight": ints(16, 8, dtype=torch.uint8), "q.weight_scale_2": torch.ones(())},
    "compressed-tensors": {"q.weight_packed": ints(16, 2), "q.weight_scale": torch.ones(16, 1)},
    "mlx": {"q.weight": ints(16, 4, dtype=torch.uint32), "q.scales": torch.ones(16, 2), "q.biases": torch.ones(16, 2)},
    "hqq": {"q.W_q": ints(16, 16, dtype=torch.uint8), "q.scale": torch.ones(16, 1), "q.zero": torch.ones(16, 1)},
    "quanto": {"q.weight._data": ints(16, 16, dtype=torch.int8), "q.weight._scale": torch.ones(16, 1)},
    "torchao": {"q._weight_qdata": ints(16, 16, dtype=torch.int8), "q._weight_scale": torch.ones(16)},
    "aqlm": {"q.codes": ints(4, 4, 1, dtype=torch.int8), "q.codebooks": torch.ones(1, 256, 1, 8)},
    "exl2": {"q.q_weight": ints(4, 16), "q.q_scale": ints(1, 2)},
    "quanto int4": {"q.weight._data._data": ints(8, 16, dtype=torch.uint8), "q.weight._scale": torch.ones(16, 1)},
    "quip": {"q.Qidxs": ints(16, 2, dtype=torch.int64), "q.SU": torch.ones(16), "q.SV": torch.ones(16)},
    "vptq": {"q.indices": ints(1, 4, 4), "q.centroids.weight": torch.ones(1, 64)},
    "spqr": {"q.dense_weights": ints(32, dtype=torch.int64), "q.row_offsets": ints(9)},
    "unknown scales": {"q.weight": ints(16, 16, dtype=torch.int8), "q.weight.scaling": torch.ones(16)},
    "exl3": {"q.trellis": ints(1, 1, 48, dtype=torch.int16), "q.svh": torch.ones(16).half()},
}  # fmt: skip

# What an ordinary model may have, however much it looks like one of these.
ORDINARY = {
    "floats": {"q.weight": torch.ones(4, 4), "q.scales": torch.ones(4, 1), "q.scale": torch.ones(4),
               "q.biases": torch.ones(4)},
    "float scale": {"q.weight": torch.ones(4, 4), "q.weight_scale": torch.ones(4, 1).half(),
                    "q.weight_scale_inv": torch.ones(4)},
    "swin": {"attn.relative_position_index": ints(9, 9, dtype=torch.int64), "attn.logit_scale": torch.ones(4, 1, 1)},
    "gpt2": {"attn.bias": ints(1, 1, 8, 8, dtype=torch.uint8), "attn.scale": torch.ones(()),
             "attn.weight": torch.ones(4, 4)},
    "counters": {"norm.num_batches_tracked": torch.tensor(3), "norm.weight": torch.ones(4), "norm.step": ints(4)},
    "other names": {"q.indices": ints(4, 4), "q.weight": torch.ones(4, 4), "q.dense_weights": torch.ones(4),
                    "norm.weight": ints(4)},
    "scaled counter": {"step": torch.tensor(3, dtype=torch.int32), "step_scale": torch.ones(())},
    "root": {"weight": torch.ones(4, 4), "scales": torch.ones(4), "_scale": torch.ones(4), "zero": torch.ones(4)},
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.layers.0."])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised(name, prefix):
    tensors = {"embed.weight": torch.ones(4, 4)} | {prefix + key: tensor for key, tensor in FORMATS[name].items()}
    with pytest.raises(QuantisedRefusedError, match=f"here: the checkpoint is quantised: {prefix}.* is .*Dequantise"):
        refuse_quantised("here", tensors)


@pytest.mark.parametrize("prefix", ["", "model.layers.0."])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_merged(name, prefix):
    base = {prefix + key: tensor for key, tensor in ORDINARY[name].items()}
    tuned = {
        key: tensor + 1 if tensor.is_floating_point() or tensor.ndim < 2 else tensor for key, tensor in base.items()
    }
    merged = merge_state_dicts(base, [tuned], LINEAR).state_dict
    for key, tensor in base.items():
        assert same_bits(merged[key], tuned[key] if tensor.is_floating_point() else tensor), key


@pytest.mark.parametrize("config", [
    {"quantization_config": {"quant_method": "gptq"}},
    {"text_config": {"quantization_config": {"bits": 4}}},
    {"a": {"b": {"compression_config": {"format": "int-quantized"}}}},
    {"quantization": {"bits": 4, "group_size": 64}},
], ids=str)  # fmt: skip
def test_configurations_are_recognised(config):
    with pytest.raises(QuantisedRefusedError, match=r"config\.json has (text_config\.|a\.b\.)?[a-z]+"):
        refuse_quantised("here", {"w": torch.ones(4, 4)}, config)


@pytest.mark.parametrize("config", [
    {"quantization_config": None}, {"quantization_config": {}}, {"quantization": False}, {"quantization": "none"},
    {"quantizer": {"bits": 8}}, {"text_config": {}, "list": [{"quantization_config": 1}]},
], ids=str)  # fmt: skip
def test_configurations_that_say_nothing(config):
    refuse_quantised("here", {"w": torch.ones(4, 4)}, config)


def test_a_quantiser_s_file_counts_where_a_tensor_may_be_packed():
    files = ["config.json", "quantize_config.json"]
    refuse_quantised("here", {"w": torch.ones(4, 4), "ids": ints(1, 4, dtype=torch.int64)}, {}, files)
    with pytest.raises(QuantisedRefusedError, match=r"quantize_config\.json is beside it, and w is int32 of 4 x 4"):
        refuse_quantised("here", {"w": ints(4, 4)}, {}, files)
    refuse_quantised("here", {"w": ints(4, 4)}, {}, files[:1])


@pytest.mark.parametrize("which", ["base", "tuned"])
@pytest.mark.parametrize("name", ["gptq", "fp8", "mlx"])
def test_state_dicts(name, which):
    packed, floats = FORMATS[name], {key: torch.ones(t.shape) for key, t in FORMATS[name].items()}
    base, tuned = (packed, floats) if which == "base" else (floats, packed)
    label = "base" if which == "base" else r"tuned\[1\]"
    for exclude in ((), ("*weight",)):
        with pytest.raises(QuantisedRefusedError, match=f"{label}: the checkpoint is quantised"):
            merge_state_dicts(base, [floats, tuned], MergeConfig(merge_method="linear", exclude=exclude))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16, torch.uint8, torch.bool], ids=str)
def test_integers_of_two_dimensions_must_agree(dtype):
    base = ints(6, 4, seed=1).remainder(2).to(dtype)
    other = base.clone()
    other.view(torch.uint8)[-1, -1] ^= 1
    got = merge_tensors(base, [base.clone(), base.to(torch.int64)], LINEAR, name="table")
    assert same_bits(got.weight, base) and got.report.treatment == "base"
    short = str(dtype).removeprefix("torch.")
    for model in (other, base[:5], base.float() + 0.5):
        with pytest.raises(
            QuantisedRefusedError, match=rf"table of tuned\[1\]: .* differs from the base's, which is {short} "
        ):
            merge_tensors(base, [base, model], LINEAR, name="table")
    with pytest.raises(DTypeError, match="an update cannot be added"):
        merge_tensors(base, [Factored(torch.ones(6, 1), torch.ones(1, 4), 1.0)], LINEAR, name="table")


def test_an_excluded_table_may_differ_a_packed_weight_may_not():
    config = MergeConfig(merge_method="linear", exclude=("kept",))
    for base in (ints(6, 4, dtype=torch.int64), ints(6, 4).bool()):
        assert same_bits(merge_tensors(base, [base.logical_not().to(base.dtype)], config, name="kept").weight, base)
    assert same_bits(merge_tensors(float8(4, 4), [float8(4, 4)], config, name="kept").weight, float8(4, 4))
    for base in (ints(6, 4), ints(6, 4, dtype=torch.uint8), float8(6, 4)):
        other = base.float().flip(0).to(base.dtype)
        with pytest.raises(QuantisedRefusedError, match="kept of tuned") as error:
            merge_tensors(base, [other], config, name="kept")
        assert "exclude it" not in str(error.value)
