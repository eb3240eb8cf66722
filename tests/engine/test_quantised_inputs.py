"""Every command that reads models refuses quantised ones; tables of integers are compared before a merge."""

import json

import pytest
import torch
from adapters import factors, save_adapter
from checkpoints import digest, save
from compare import same_bits
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import MergeConfig, QuantisedRefusedError, merge_checkpoints
from r_tsvm_kernels.checkpoint import Checkpoint
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.lora_tools import extract_lora

FLOATS = {"q.weight": torch.arange(64.0).reshape(8, 8), "norm.weight": torch.ones(8)}
INT8 = {"q.weight": torch.ones(8, 8, dtype=torch.int8), "q.weight_scale": torch.ones(8, 1)}
GPTQ = {"q.qweight": torch.ones(2, 8, dtype=torch.int32), "q.scales": torch.ones(1, 8).half()}


def recipe(base, *models, **options):
    return MergeConfig(
        merge_method="linear", base_model=str(base), models=[{"model": str(model)} for model in models], **options
    )


def table_models(folder, table, other):
    """A base and two models: the second has another table."""
    tables = {"base": table, "same": table, "other": other}
    return [save(folder / name, FLOATS | {"table": values}) for name, values in tables.items()]


@pytest.mark.parametrize("tensors", [INT8, GPTQ], ids=["int8", "gptq"])
@pytest.mark.parametrize("command", ["merge", "inspect", "extract-lora"])
@pytest.mark.parametrize("bare", [False, True])
def test_commands_refuse_quantised_models(tmp_path, capsys, tensors, command, bare):
    if bare:
        base, model = tmp_path / "base.safetensors", tmp_path / "model.safetensors"
        save_file(tensors, base)
        save_file(tensors, model)
    else:
        base, model = save(tmp_path / "base", tensors), save(tmp_path / "model", tensors)
    before = digest(tmp_path)
    arguments = {
        "merge": ["merge", "--base", base, "--model", model, "--exclude", "*q.weight", tmp_path / "out"],
        "inspect": ["inspect", "--base", base, "--model", model],
        "extract-lora": ["extract-lora", "--base", base, "--model", model, tmp_path / "out"],
    }[command]
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert f"{base}: the checkpoint is quantised: q." in captured.err and "Dequantise" in captured.err
    assert digest(tmp_path) == before


def test_a_quantised_base_of_an_adapter(tmp_path):
    base = save(tmp_path / "base", INT8)
    adapter = save_adapter(tmp_path / "adapter", {"q": factors((8, 8), 2, 0)})
    with pytest.raises(QuantisedRefusedError, match="base: the checkpoint is quantised"):
        merge_checkpoints(recipe(base, adapter), tmp_path / "out")


@pytest.mark.parametrize(
    "file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json", "quantization_config.json"]
)
def test_files_of_quantisers(tmp_path, file):
    unknown = save(tmp_path / "unknown", {"q.w4": torch.ones(8, 8, dtype=torch.int32), "q.s": torch.ones(8)})
    Checkpoint(unknown)
    for folder in (unknown, floats := save(tmp_path / "floats", FLOATS)):
        (folder / file).write_text(json.dumps({"bits": 4}))
    Checkpoint(floats)  # left over from another model
    with pytest.raises(QuantisedRefusedError, match=rf"{file} is beside it, and q\.w4 is int32 of 8 x 8"):
        Checkpoint(unknown)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("piece", [1, 16, 1 << 20])
def test_tables_must_agree(tmp_path, monkeypatch, capsys, dtype, piece):
    monkeypatch.setattr("r_tsvm_kernels.engine.tiles._PIECE_BYTES", piece)
    table = torch.arange(42).reshape(7, 3, 2).remainder(2).to(dtype)
    other = table.clone()
    other[-1, -1, -1] = 0
    base, same, differs = table_models(tmp_path, table, other)
    merge_checkpoints(recipe(base, same, base), tmp_path / "fine")
    assert same_bits(load_file(tmp_path / "fine" / "model.safetensors")["table"], table)
    before = digest(tmp_path)
    with pytest.raises(QuantisedRefusedError, match=f"table of {differs}: .*7 x 3 x 2, differs from the base's"):
        merge_checkpoints(recipe(base, same, differs), tmp_path / "out")
    with pytest.raises(QuantisedRefusedError, match=f"table of {differs}"):
        extract_lora(str(base), str(differs), tmp_path / "out")
    assert main(["inspect", "--base", str(base), "--model", str(differs)]) == 2
    assert f"table of {differs}" in capsys.readouterr().err
    assert digest(tmp_path) == before


def test_an_excluded_table_stays_the_base_s(tmp_path):
    table = torch.arange(6).reshape(2, 3)
    base, _, differs = table_models(tmp_path, table, table + 1)
    merge_checkpoints(recipe(base, differs, exclude=["table"]), tmp_path / "out")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors")["table"], table)
    packed = table.to(torch.uint8)
    base, _, differs = table_models(tmp_path / "packed", packed, packed + 1)
    with pytest.raises(QuantisedRefusedError, match="table of"):
        merge_checkpoints(recipe(base, differs, exclude=["table"]), tmp_path / "out2")


def test_equal_values_of_another_dtype_agree(tmp_path):
    table = torch.arange(6).reshape(2, 3)
    base, _, model = table_models(tmp_path, table, table.int())
    merge_checkpoints(recipe(base, model), tmp_path / "out")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors")["table"], table)


def test_buffers_of_one_dimension_may_differ(tmp_path):
    base, model = (
        save(tmp_path / str(i), FLOATS | {"bn.num_batches_tracked": torch.tensor(i), "ids": torch.arange(7) + i})
        for i in (0, 1)
    )
    merge_checkpoints(recipe(base, model), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged["bn.num_batches_tracked"] == 0 and torch.equal(merged["ids"], torch.arange(7))


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3FNUZ", "I4"])
def test_formats_without_a_dtype_of_torch(tmp_path, dtype):
    header = json.dumps({"q.weight_scale": {"dtype": dtype, "shape": [1, 16], "data_offsets": [0, 16]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(QuantisedRefusedError, match=rf"q\.weight_scale has dtype {dtype}, of quantised weights"):
        Checkpoint(file)


def test_a_mask_that_is_of_floats_in_the_base_alone(tmp_path):
    """As the causal masks of GPT-2, which later files hold as bools."""
    mask = torch.ones(1, 1, 8, 8).tril()
    base, _, model = table_models(tmp_path, mask, mask.bool())
    with pytest.raises(
        QuantisedRefusedError, match=r"other: table is torch\.bool, where the base has torch\.float32.*exclude"
    ):
        merge_checkpoints(recipe(base, model), tmp_path / "out")
    merge_checkpoints(recipe(base, model, exclude=["table"]), tmp_path / "out")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors")["table"], mask)
