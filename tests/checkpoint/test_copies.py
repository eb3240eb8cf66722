"""Tied tensors that only some models store: the output has the base's tensors, tied as they were."""

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import CheckpointError, MergeConfig, ShapeError, merge_checkpoints
from r_tsvm_kernels.engine.verify import verify_output
from r_tsvm_kernels.plan import make_plan

EMBED, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w.weight"


def model(seed, rows=50):
    generator = torch.Generator().manual_seed(seed)
    return {EMBED: torch.randn(rows, 16, generator=generator), LAYER: torch.randn(16, 16, generator=generator)}


def tied(tensors, *names, to=EMBED):
    return tensors | {name: tensors[to].clone() for name in names}


def merged(tmp_path, base, *tuned, configs=None, method="task_arithmetic", **parameters):
    """Merge, check that the inputs are verified as they were read, and return the weights."""
    plan = config_of(tmp_path, base, *tuned, configs=configs, method=method, **parameters)
    out = merge_checkpoints(plan, tmp_path / "out").path
    assert verify_output(out, inputs=True).ok
    return load_file(out / "model.safetensors")


def config_of(tmp_path, *models, configs=None, method="task_arithmetic", **parameters):
    paths = [
        str(save(tmp_path / f"m{i}", tensors, config=(configs or {}).get(i, {"model_type": "toy"})))
        for i, tensors in enumerate(models)
    ]
    entries = tuple({"model": path} for path in paths[1:])
    return MergeConfig(merge_method=method, base_model=paths[0], models=entries, parameters=parameters)


def close(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_copy_that_the_base_lacks_is_left_out(tmp_path):
    close(merged(tmp_path, model(0), tied(model(1), HEAD)), model(1))


def test_a_copy_that_a_model_lacks_has_the_values_of_its_original(tmp_path):
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    base = tied({"shared.weight": model(0)[EMBED], LAYER: model(0)[LAYER], HEAD: model(7)[EMBED]}, *copies,
                to="shared.weight")  # fmt: skip
    tuned = {"shared.weight": model(1)[EMBED], LAYER: model(1)[LAYER], HEAD: model(8)[EMBED]}
    close(merged(tmp_path, base, tuned), tied(tuned, *copies, to="shared.weight"))


def test_some_store_it_and_some_do_not(tmp_path):
    got = merged(tmp_path, tied(model(0), HEAD), tied(model(1), HEAD), model(2), method="linear", weight=1.0)
    mean = {name: sum(model(seed)[name] for seed in range(3)) / 3 for name in model(0)}
    close(got, tied(mean, HEAD))


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_model_that_ties_its_head_has_the_embedding_for_a_head(tmp_path, config):
    base = model(0) | {HEAD: model(5)[EMBED]}
    close(merged(tmp_path, base, model(1), configs={1: config}), tied(model(1), HEAD))


def test_pickled_models_too(tmp_path):
    config = config_of(tmp_path, tied(model(0), HEAD), model(1))
    (tmp_path / "m1" / "model.safetensors").unlink()
    torch.save(model(1), tmp_path / "m1" / "pytorch_model.bin")
    out = merge_checkpoints(config, tmp_path / "out", allow_pickle=True).path
    close(load_file(out / "model.safetensors"), tied(model(1), HEAD))


@pytest.mark.parametrize("method", ["dare_linear", "della"])
@pytest.mark.parametrize("stored", [(1, 1, 1), (1, 0, 1), (1, 0, 0)], ids=str)
def test_random_masks_do_not_untie(tmp_path, method, stored):
    models = [tied(model(seed), HEAD) if kept else model(seed) for seed, kept in enumerate(stored)]
    got = merged(tmp_path, *models, method=method, density=0.5)
    assert torch.equal(got[EMBED], got[HEAD])
    alone = [{name: tensor for name, tensor in tensors.items() if name != HEAD} for tensors in models]
    (tmp_path / "alone").mkdir()
    assert torch.equal(merged(tmp_path / "alone", *alone, method=method, density=0.5)[EMBED], got[EMBED])


def test_a_head_of_its_own_has_masks_of_its_own(tmp_path):
    models = [tied(model(seed), HEAD) for seed in range(2)] + [model(2) | {HEAD: model(5)[EMBED]}]
    config = config_of(tmp_path, *models, method="dare_linear", density=0.5)
    assert all(tensor.seeded_by is None for tensor in make_plan(config, 10**9).tensors.values())


def test_what_is_no_copy_is_refused(tmp_path):
    config = config_of(tmp_path, model(0), model(1) | {HEAD: model(5)[EMBED]})
    with pytest.raises(CheckpointError, match=r"m1: .*1 extra \(lm_head\.weight\)"):
        make_plan(config, 10**9)


def test_a_layer_is_no_copy_of_another_one(tmp_path):
    base = model(0) | {"model.layers.1.w.weight": model(0)[LAYER]}
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.layers\.1\.w\.weight\)"):
        make_plan(config_of(tmp_path, base, model(1)), 10**9)


def test_another_vocabulary_is_said_to_be_one(tmp_path):
    config = config_of(tmp_path, tied(model(0), HEAD), model(1, rows=52))
    with pytest.raises(ShapeError, match="was its vocabulary resized"):
        make_plan(config, 10**9)


@pytest.mark.parametrize("holder", [0, 1], ids=["base", "model"])
def test_large_copies_are_compared_whole_when_the_merge_begins(tmp_path, holder):
    models = [{EMBED: torch.randn(5000, 64), LAYER: model(seed)[LAYER]} for seed in range(2)]
    models[holder] = tied(models[holder], HEAD)
    models[holder][HEAD][17] += 1
    config = config_of(tmp_path, *models)
    assert make_plan(config, 10**9).copies
    with pytest.raises(CheckpointError, match=r"lm_head\.weight should be the same as model\.embed_tokens\.weight"):
        merge_checkpoints(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
