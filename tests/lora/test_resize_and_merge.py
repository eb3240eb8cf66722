import json
import math

import numpy as np
import pytest
import torch
from adapters import SHAPES, dense_updates, factors, random_adapter, save_adapter
from compare import relative_error
from safetensors.torch import load_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import (
    AdapterRefusedError,
    CheckpointError,
    ConfigError,
    InputChangedError,
    NonFiniteError,
    ShapeError,
)
from r_tsvm_kernels.linalg import tsv_merge
from r_tsvm_kernels.lora import Adapter
from r_tsvm_kernels.lora_tools import merge_lora, resize_lora


def best(delta, rank):
    U, values, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.0.up": 5.5}}], ids=str)
def test_resized_updates_are_the_best_of_their_rank(tmp_path, options):
    source = random_adapter(tmp_path / "a", 0, rank=6, **options)
    result = resize_lora(str(source), tmp_path / "out", rank=2)
    after = dense_updates(tmp_path / "out")
    for module, before in dense_updates(source).items():
        assert relative_error(after[module], best(before, 2)) < 1e-6
        report = result.modules[module]
        assert report.rank == 2 and report.norm == pytest.approx(float(before.norm()))
        assert report.captured_energy == pytest.approx(float(best(before, 2).square().sum() / before.square().sum()))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, "some/base")


def test_resizing_by_energy(tmp_path):
    source = random_adapter(tmp_path / "a", 0, rank=6)
    result = resize_lora(str(source), tmp_path / "out", energy=0.8)
    for module, before in dense_updates(source).items():
        share = torch.linalg.svdvals(before).square().cumsum(0)
        assert result.modules[module].rank == int((share < 0.8 * share[-1]).sum()) + 1
    assert {m.rank for m in Adapter(tmp_path / "out").modules.values()} == {m.rank for m in result.modules.values()}


def test_a_rank_at_or_above_the_adapters_changes_nothing(tmp_path):
    source = random_adapter(tmp_path / "a", 0, rank=3, dtype=torch.bfloat16)
    resize_lora(str(source), tmp_path / "out", rank=64)
    after = dense_updates(tmp_path / "out")
    for module, before in dense_updates(source).items():
        assert relative_error(after[module], before) < 1e-6
    assert {module.rank for module in Adapter(tmp_path / "out").modules.values()} == {3}


def test_resizing_keeps_embeddings_and_orientation(tmp_path):
    modules = {"embed": factors((6, 30), 4, 0), "attn": factors((12, 8), 4, 1)}
    source = Adapter(save_adapter(tmp_path / "a", modules, fan_in_fan_out=True))
    resize_lora(str(source.path), tmp_path / "out", rank=4)
    after = Adapter(tmp_path / "out")
    for module in modules:
        assert after.modules[module].embedding == (module == "embed")
        assert relative_error(after.task_matrix(module).dense(), source.task_matrix(module).dense()) < 1e-6


@pytest.mark.parametrize("weights", [1.0, [0.5, -1.0, 2.0]], ids=str)
def test_tsvm_equals_the_dense_merge(tmp_path, weights):
    sources = [random_adapter(tmp_path / f"a{i}", i, rank=3 + i, use_rslora=i == 1) for i in range(3)]
    result = merge_lora([str(source) for source in sources], tmp_path / "out", weight=weights)
    after = dense_updates(tmp_path / "out")
    dense = [dense_updates(source) for source in sources]
    for module, shape in SHAPES.items():
        ranks = [min(3 + i, min(shape) // 3) for i in range(3)]
        expected = tsv_merge([updates[module] for updates in dense], ranks, weights)
        assert relative_error(after[module], expected.matrix) < 1e-6
        report = result.modules[module]
        assert report.ranks == expected.ranks and report.rank == sum(ranks)
        assert report.energies == pytest.approx(expected.captured_energy)
        assert report.certificate.error <= report.certificate.tolerance


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_sums_equal_the_dense_ones(tmp_path, method):
    sources = [random_adapter(tmp_path / f"a{i}", i, rank=3 + i) for i in range(2)]
    merge_lora([str(source) for source in sources], tmp_path / "out", method=method, weight=[3.0, 2.0])
    dense, after = [dense_updates(source) for source in sources], dense_updates(tmp_path / "out")
    for module in SHAPES:
        expected = (3 * dense[0][module] + 2 * dense[1][module]) / (5 if method == "linear" else 1)
        assert relative_error(after[module], expected) < 1e-6


@pytest.mark.parametrize("method", ["tsvm", "linear"])
def test_the_merged_update_is_cut_at_its_best(tmp_path, method):
    sources = [str(random_adapter(tmp_path / f"a{i}", i)) for i in range(2)]
    merge_lora(sources, tmp_path / "whole", method=method)
    merge_lora(sources, tmp_path / "cut", method=method, rank=3)
    whole, cut = dense_updates(tmp_path / "whole"), dense_updates(tmp_path / "cut")
    for module in SHAPES:
        assert relative_error(cut[module], best(whole[module], 3)) < 1e-5


@pytest.mark.parametrize("method", ["tsvm", "linear"])
def test_a_module_that_an_adapter_lacks_counts_as_zero(tmp_path, method):
    first = random_adapter(tmp_path / "a", 0)
    second = random_adapter(tmp_path / "b", 1, shapes={"layers.0.q": (24, 16), "new": (9, 9)})
    merge_lora([str(first), str(second)], tmp_path / "out", method=method)
    after, share = dense_updates(tmp_path / "out"), 0.5 if method == "linear" else 1.0
    assert set(after) == {*SHAPES, "new"}
    assert relative_error(after["new"], share * dense_updates(second)["new"]) < 1e-6
    assert relative_error(after["layers.0.up"], share * dense_updates(first)["layers.0.up"]) < 1e-6


def test_opposite_adapters_cancel(tmp_path):
    A, B = factors((8, 6), 2, 0)
    first = save_adapter(tmp_path / "a", {"q": (A, B), "k": (A, B)})
    second = save_adapter(tmp_path / "b", {"q": (A, -B), "k": (A, B)})
    result = merge_lora([str(first), str(second)], tmp_path / "out", method="linear")
    assert result.modules["q"].rank == 0 and result.modules["k"].rank == 2  # what rounding leaves is no update
    assert set(dense_updates(tmp_path / "out")) == {"k"}


def test_zero_updates_are_not_written(tmp_path):
    A, B = factors((8, 6), 2, 0)
    first = save_adapter(tmp_path / "a", {"q": (A, 0 * B), "k": (A, B)})
    for method in ("tsvm", "linear"):
        result = merge_lora([str(first), str(first)], tmp_path / method, method=method)
        assert result.modules["q"].rank == 0 and result.modules["q"].captured_energy == 1.0
        assert set(dense_updates(tmp_path / method)) == {"k"}


def test_weights_of_the_base_beside_an_embedding_are_kept(tmp_path):
    modules = {"embed": factors((6, 30), 4, 0), "q": factors((9, 6), 4, 1)}
    stored = {"base_model.model.embed.base_layer.weight": torch.randn(30, 6)}
    paths = [str(save_adapter(tmp_path / name, modules, tensors=stored)) for name in "ab"]
    merge_lora(paths, tmp_path / "out", out_dtype="bfloat16", rank=1)
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(*stored.values(), after["base_model.model.embed.base_layer.weight"])
    assert Adapter(tmp_path / "out").base_layers == ["embed"]
    other = {name: values + 1 for name, values in stored.items()}
    paths.append(str(save_adapter(tmp_path / "c", modules, tensors=other)))
    with pytest.raises(CheckpointError, match="differs from that of"):
        merge_lora(paths, tmp_path / "out2")
    del modules["embed"]
    with pytest.raises(AdapterRefusedError, match="embed is replaced, not adapted"):
        Adapter(save_adapter(tmp_path / "d", modules, tensors=stored))


def test_what_is_refused(tmp_path):
    first = str(random_adapter(tmp_path / "a", 0))
    other = str(random_adapter(tmp_path / "b", 0, shapes={"layers.0.q": (24, 17)}))
    turned = str(random_adapter(tmp_path / "c", 0, fan_in_fan_out=True))
    out = tmp_path / "out"
    with pytest.raises(ShapeError, match="belong to one base"):
        merge_lora([first, other], out)
    with pytest.raises(ShapeError, match="stores it in another way"):
        merge_lora([first, turned], out)
    with pytest.raises(ConfigError, match="weight: 1 tasks but 2 numbers"):
        merge_lora([first], out, weight=[1.0, 2.0])
    with pytest.raises(ConfigError, match="method must be one of"):
        merge_lora([first], out, method="ties")
    with pytest.raises(ConfigError, match="expected a rank or a share of the energy, got neither"):
        resize_lora(first, out)
    assert not out.exists()


def test_an_adapter_that_changes_meanwhile(tmp_path):
    source = random_adapter(tmp_path / "a", 0)

    def disturb(state):
        if state.tensors_done == state.tensors_total:
            (source / "adapter_model.safetensors").touch()

    with pytest.raises(InputChangedError):
        resize_lora(str(source), tmp_path / "out", rank=2, progress=disturb)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_commands(tmp_path, capsys):
    first, second = (str(random_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    assert main(["merge-lora", "--adapter", first, "--adapter", second, "--rank", "5", str(tmp_path / "m")]) == 0
    assert "3 modules of rank 5, at least " in capsys.readouterr().out
    assert main(["resize-lora", str(tmp_path / "m"), "--energy", "0.5", str(tmp_path / "r"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    report = json.loads((tmp_path / "r" / "lora_report.json").read_text())
    assert report["command"] == "resize-lora" and report["energy"] == 0.5
    assert main(["resize-lora", first, str(tmp_path / "x")]) == 2


def test_weights_of_numpy_one_for_all_and_not_finite(tmp_path):
    sources = [str(random_adapter(tmp_path / name, seed)) for seed, name in enumerate("ab")]
    merge_lora(sources, tmp_path / "lists", method="task_arithmetic", weight=[2.0, 2.0])
    for index, twos in enumerate((2, np.array([2, 2]), torch.tensor([2.0, 2.0]))):
        merge_lora(sources, tmp_path / f"{index}", method="task_arithmetic", weight=twos)
        for module, update in dense_updates(tmp_path / f"{index}").items():
            assert torch.equal(update, dense_updates(tmp_path / "lists")[module])
    for bad in ([math.nan, 1.0], np.array([math.inf, 1.0]), [1.0], "ab"):
        with pytest.raises(ConfigError, match="merge_lora: weight"):
            merge_lora(sources, tmp_path / "out", weight=bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["tsvm", "linear", "task_arithmetic"])
def test_updates_that_fit_no_dtype_are_refused(tmp_path, method):
    source = random_adapter(tmp_path / "a", 0)
    large = save_adapter(tmp_path / "large", {"up": tuple(1e6 * factor for factor in factors((12, 8), 4, 0))})
    with pytest.raises(NonFiniteError, match="up: the factors of the update do not fit float16"):
        merge_lora([str(large)], tmp_path / "out", method=method, out_dtype="float16")
    with pytest.raises(NonFiniteError, match="up: the factors of the update do not fit float16"):
        resize_lora(str(large), tmp_path / "out", rank=2, out_dtype="float16")
    assert not (tmp_path / "out").exists()
    config = tmp_path / "a" / "adapter_config.json"
    for key, value in (("lora_alpha", math.nan), ("alpha_pattern", {"up": math.inf})):
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {key: value}))
        with pytest.raises(CheckpointError, match="finite"):
            merge_lora([str(source)], tmp_path / "out", method=method)
        config.write_text(json.dumps(settings))
