"""Embeddings and heads are aligned by their tokens, whatever the ids; the other files of the output fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from vocabularies import BIAS, EMBEDDING, HEAD, LAYER, PIECES, ids_of, tensors_of, tokenizer_json, write

from r_tsvm_kernels import ConfigError, MergeConfig, NonFiniteError, merge_checkpoints, verify_output

ALIGNED = (EMBEDDING, HEAD, BIAS)
# Base; a chat tune with two tokens more; a tune with other ids, one token of its own, and padding to 16 rows.
TOKENIZERS = {
    "base": tokenizer_json(PIECES, ["<s>"]),
    "chat": tokenizer_json(PIECES, ["<s>", "<pad>", "<chat>"]),
    "odd": tokenizer_json(PIECES[::-1], ["<img>", "<s>", "<chat>"]),
}
HEIGHTS = {"base": 9, "chat": 11, "odd": 16}
ALPHA = 0.5


@pytest.fixture
def family(tmp_path):
    """Write the models; return their paths and tensors by name."""
    tensors = {name: tensors_of(HEIGHTS[name], seed) for seed, name in enumerate(TOKENIZERS)}
    extra = {"generation_config": {"eos_token_id": 8, "top_p": 0.9}}
    paths = {
        name: write(tmp_path / name, tensors[name], TOKENIZERS[name], {"eos_token_id": 8, "pad_token_id": i}, **extra)
        for i, name in enumerate(TOKENIZERS)
    }
    return paths, tensors


def merged(paths, out, method="task_arithmetic", **options):
    config = MergeConfig(method, base_model=paths["base"], models=[paths["chat"], paths["odd"]], **options)
    result = merge_checkpoints(config, out)
    return load_file(out / "model.safetensors"), result


def row_of(name, token, tensors):
    """The row of a token in a tensor of a model, or None."""
    return {
        model: own[name][ids_of(TOKENIZERS[model])[token]]
        for model, own in tensors.items()
        if token in ids_of(TOKENIZERS[model])
    }


def expected_row(name, token, tensors):
    """Task arithmetic where the base knows the token; otherwise the mean of those that do."""
    rows = row_of(name, token, tensors)
    if "base" not in rows:
        return sum(rows.values()) / len(rows)
    return rows["base"] + ALPHA * sum(row - rows["base"] for row in rows.values())


@pytest.mark.parametrize("source", ["base", "union", "model:odd", "model:chat"])
def test_rows_follow_their_tokens(family, tmp_path, source):
    paths, tensors = family
    vocabulary = f"model:{paths[source[6:]]}" if ":" in source else source
    found, result = merged(paths, tmp_path / "out", alpha=ALPHA, vocabulary=vocabulary)
    content = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    ids = ids_of(content)
    wanted = {"base": TOKENIZERS["base"], "model:odd": TOKENIZERS["odd"], "model:chat": TOKENIZERS["chat"]}
    if source == "union":
        assert ids == ids_of(TOKENIZERS["base"]) | {"<pad>": 9, "<chat>": 10, "<img>": 11}
    else:
        assert content == wanted[source]
    height = {"base": 9, "union": 12, "model:odd": 16, "model:chat": 11}[source]
    for name in ALIGNED:
        assert found[name].shape[0] == height
        for token, index in ids.items():
            assert torch.allclose(found[name][index], expected_row(name, token, tensors), atol=1e-6), (name, token)
    expected = tensors["base"][LAYER] + ALPHA * sum(tensors[x][LAYER] - tensors["base"][LAYER] for x in ("chat", "odd"))
    assert torch.allclose(found[LAYER], expected, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == height
    assert verify_output(tmp_path / "out", inputs=True).ok
    report = json.loads(result.report_path.read_text())["vocabulary"]
    assert sum(group["count"] for group in report["groups"]) == height == report["rows"]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "ties", "dare_ties", "tsvm"])
@pytest.mark.parametrize("rows", [2, 1 << 16])
def test_rows_that_no_model_changes_keep_their_bits(family, tmp_path, method, rows, monkeypatch):
    monkeypatch.setattr("r_tsvm_kernels.engine.scheduling.TILE_ELEMENTS", (rows * 4,) * 3)
    paths, tensors = family
    config = MergeConfig(method, base_model=paths["base"], models=[paths["chat"]], vocabulary=f"model:{paths['chat']}")
    merge_checkpoints(config, tmp_path / "chat_out")
    found = load_file(tmp_path / "chat_out" / "model.safetensors")
    for name in ALIGNED:  # the base lacks rows 9 and 10
        assert torch.equal(found[name][9:], tensors["chat"][name][9:])
    config = MergeConfig(method, base_model=paths["chat"], models=[paths["base"]], vocabulary="base")
    merge_checkpoints(config, tmp_path / "base_out")
    found = load_file(tmp_path / "base_out" / "model.safetensors")
    for name in ALIGNED:  # only the base has rows 9 and 10
        assert torch.equal(found[name][9:], tensors["chat"][name][9:])


@pytest.mark.parametrize("method", ["ties", "dare_ties", "tsvm", "sce"])
def test_the_ids_make_no_difference(tmp_path, method):
    """Merging a model with permuted ids gives the bits of merging the same model in the base's order."""
    order = torch.tensor([3, 0, 7, 1, 8, 2, 6, 5, 4])  # the base's row of each row of the permuted model
    base, same = tensors_of(9, 0), tensors_of(9, 1)
    odd = {name: value[order] if name in ALIGNED else value for name, value in same.items()}
    plain = tokenizer_json([*PIECES, "i"])
    permuted = tokenizer_json([[*PIECES, "i"][index] for index in order])
    paths = [write(tmp_path / "base", base, plain), write(tmp_path / "same", same, plain)]
    paths.append(write(tmp_path / "odd", odd, permuted))
    for index, name in ((1, "out_same"), (2, "out_odd")):
        merge_checkpoints(
            MergeConfig(method, base_model=paths[0], models=[paths[index]], vocabulary="base"), tmp_path / name
        )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out_same", "out_odd"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_padding(tmp_path):
    """A padded base stays padded, and new tokens take the place of its padding first."""
    base, chat = tensors_of(16, 0, torch.bfloat16, tied=True), tensors_of(11, 1, torch.bfloat16, tied=True)
    tied = {"tie_word_embeddings": True}
    many = tokenizer_json(PIECES, [f"<{i}>" for i in range(10)])
    paths = {
        "base": write(tmp_path / "base", base, TOKENIZERS["base"], tied),
        "chat": write(tmp_path / "chat", chat, TOKENIZERS["chat"], tied),
        "odd": write(tmp_path / "odd", tensors_of(18, 2, torch.bfloat16, tied=True), many, tied),
    }
    config = MergeConfig("ties", base_model=paths["base"], models=[paths["chat"]], vocabulary="union")
    merge_checkpoints(config, tmp_path / "few")
    few = load_file(tmp_path / "few" / "model.safetensors")[EMBEDDING]
    assert few.shape[0] == 16
    assert torch.equal(few[9:11], chat[EMBEDDING][9:11])
    assert torch.equal(few[11:], base[EMBEDDING][11:])
    found, result = merged(paths, tmp_path / "out", "ties", vocabulary="union")
    assert found[EMBEDDING].shape[0] == 32  # 9 + 2 + 10 tokens, a multiple of 16
    assert torch.equal(found[EMBEDDING][21:], base[EMBEDDING][-1:].expand(11, -1))
    assert HEAD not in found
    groups = json.loads(result.report_path.read_text())["vocabulary"]["groups"]
    assert {(group["rows"], group["count"]) for group in groups} == {("merged", 8), ("merged", 1), ("model", 2),
                                                                    ("model", 10), ("padding", 11)}  # fmt: skip


def test_a_model_of_another_dtype_keeps_the_bits_of_its_tokens(tmp_path):
    base, chat = tensors_of(9, 0, torch.bfloat16), tensors_of(11, 1)
    chat[EMBEDDING][9, 0] = -0.0
    paths = [write(tmp_path / "base", base, TOKENIZERS["base"]), write(tmp_path / "chat", chat, TOKENIZERS["chat"])]
    config = MergeConfig("ties", base_model=paths[0], models=paths[1:], vocabulary="union", out_dtype="float32")
    merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING]
    assert torch.equal(found[9:].view(torch.int32), chat[EMBEDDING][9:].view(torch.int32))


@pytest.mark.parametrize("spelled", [TOKENIZERS["base"], tokenizer_json([*PIECES, "<s>"])], ids=["same", "other file"])
def test_the_same_vocabulary_moves_nothing(tmp_path, spelled):
    paths = [write(tmp_path / f"m{i}", tensors_of(9, i), TOKENIZERS["base"] if i < 2 else spelled) for i in range(3)]
    for vocabulary, name in ((None, "plain"), ("union", "aligned")):
        config = MergeConfig("dare_ties", base_model=paths[0], models=paths[1:], vocabulary=vocabulary)
        merge_checkpoints(config, tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "aligned"))
    assert first == second


def test_resumption_gives_the_same_bytes(family, tmp_path):
    paths, _ = family
    expected, _ = merged(paths, tmp_path / "whole", vocabulary="union")

    def stop(state):
        if state.tensors_done == 2:
            raise KeyboardInterrupt

    config = MergeConfig("task_arithmetic", base_model=paths["base"], models=[paths["chat"], paths["odd"]],
                         vocabulary="union")  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", progress=stop, threads=1)
    assert merge_checkpoints(config, tmp_path / "out", resume=True).resumed >= 2
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_average_with_the_base_keeps_what_only_the_base_knows(family, tmp_path):
    """Three equal rows have a mean of other bits than theirs."""
    paths, tensors = family
    config = MergeConfig("linear", base_model=paths["chat"], models=[paths["base"], paths["chat"], paths["base"]],
                         vocabulary="base")  # fmt: skip
    merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ALIGNED:
        assert torch.equal(found[name][9:], tensors["chat"][name][9:])
        mean = (2 * tensors["base"][name] + tensors["chat"][name][:9]) / 3
        assert torch.allclose(found[name][:9], mean, atol=1e-6)


@pytest.mark.parametrize("token", ["<img>", "<chat>"])  # known to one model, and to two
def test_a_new_row_that_is_not_finite(family, tmp_path, token):
    """The message names the model whose row it is, not the base."""
    paths, tensors = family
    odd = dict(tensors["odd"])
    odd[HEAD] = odd[HEAD].clone()
    odd[HEAD][ids_of(TOKENIZERS["odd"])[token], 1] = torch.nan
    paths["odd"] = write(tmp_path / "nan", odd, TOKENIZERS["odd"])
    with pytest.raises(NonFiniteError, match=f"{HEAD} of {paths['odd']}: 1 of"):
        merged(paths, tmp_path / "out", vocabulary="union")
    merged(paths, tmp_path / "out_base", vocabulary="base")  # has no such row


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["same", "reversed"])
def test_tokens_under_other_ids_are_noted(tmp_path, order, caplog):
    paths = [
        write(tmp_path / name, tensors_of(9, seed), tokenizer_json(pieces, ["<s>"]), {})
        for seed, (name, pieces) in enumerate([("base", PIECES), ("tuned", PIECES[order])])
    ]
    merge_checkpoints(MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:]), tmp_path / "out")
    assert ("have other ids than in the base" in caplog.text) == (order.step == -1)


def with_tokens(paths, out, tokens, source="union", **options):
    """Merge by a recipe in mergekit's form; return the tensors and the ids of the output."""
    config = MergeConfig.from_dict({
        "merge_method": "task_arithmetic", "base_model": paths["base"], "parameters": {"alpha": ALPHA},
        "models": [{"model": paths["chat"]}, {"model": paths["odd"]}],
        "tokenizer": {"source": source, "tokens": tokens, **options},
    })  # fmt: skip
    merge_checkpoints(config, out)
    assert verify_output(out, inputs=True).ok
    assert MergeConfig.from_yaml(out / "merge_recipe.yaml") == config
    ids = ids_of(json.loads((out / "tokenizer.json").read_text()))
    return load_file(out / "model.safetensors"), ids


@pytest.mark.parametrize("name", ALIGNED)
def test_a_recipe_chooses_the_rows_of_tokens(family, tmp_path, name):
    paths, tensors = family
    rows = {model: own[name] for model, own in tensors.items()}
    place = {model: ids_of(tokenizer) for model, tokenizer in TOKENIZERS.items()}
    tokens = {
        "a": {"source": paths["chat"], "force": True},  # all models have it
        "b": {"source": paths["chat"]},  # the base has it, so it is merged
        "<chat>": {"source": {"model": {"path": paths["odd"]}}},  # two models have it, the base does not
        "<pad>": {"source": {"kind": "model_token", "model": paths["base"], "token": "<s>"}},
        "c": {"source": {"kind": "model_token", "model": paths["odd"], "token_id": 15}, "force": True},
        "d": {"source": None},
    }
    found, ids = with_tokens(paths, tmp_path / "out", tokens)
    got = found[name]
    assert torch.equal(got[ids["a"]], rows["chat"][place["chat"]["a"]])
    assert torch.equal(got[ids["<chat>"]], rows["odd"][place["odd"]["<chat>"]])
    assert torch.equal(got[ids["<pad>"]], rows["base"][place["base"]["<s>"]])
    assert torch.equal(got[ids["c"]], rows["odd"][15])
    for token in ("b", "d", "e", "<s>", "<img>"):
        assert torch.allclose(got[ids[token]], expected_row(name, token, tensors), atol=1e-6)


def test_listed_tokens_are_added_to_any_vocabulary(family, tmp_path):
    paths, tensors = family
    tokens = {
        "<chat>": {"source": paths["chat"]},
        "<new>": {"source": {"kind": "model_token", "model": paths["base"], "token": "<s>"}},
    }
    found, ids = with_tokens(paths, tmp_path / "base_out", tokens, "base", pad_to_multiple_of=8)
    assert ids == ids_of(TOKENIZERS["base"]) | {"<chat>": 9, "<new>": 10}
    assert found[EMBEDDING].shape[0] == 16
    assert torch.equal(found[EMBEDDING][9], tensors["chat"][EMBEDDING][10])
    assert torch.equal(found[EMBEDDING][10], tensors["base"][EMBEDDING][8])
    found, ids = with_tokens(paths, tmp_path / "odd_out", tokens, paths["odd"])
    assert ids == ids_of(TOKENIZERS["odd"]) | {"<new>": 11}
    assert torch.equal(found[HEAD][11], tensors["base"][HEAD][8])
    assert torch.equal(found[HEAD][ids["<chat>"]], row_of(HEAD, "<chat>", tensors)["odd"]) is False  # the mean of two
    config = json.loads((tmp_path / "odd_out" / "config.json").read_text())
    assert config["vocab_size"] == 16 and config["eos_token_id"] == 8  # odd's own id


@pytest.mark.parametrize("multiple, height", [(1, 9), (9, 9), (8, 16), (5, 10)])
def test_models_of_one_tokenizer_are_padded(tmp_path, multiple, height):
    own = [tensors_of(9, seed) for seed in range(2)]
    paths = [write(tmp_path / str(i), tensors, TOKENIZERS["base"]) for i, tensors in enumerate(own)]
    config = MergeConfig("task_arithmetic", base_model=paths[0], models=[paths[1]], vocabulary="base",
                         pad_to_multiple_of=multiple)  # fmt: skip
    merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in ALIGNED:
        assert found[name].shape[0] == height and not found[name][9:].any()
        assert torch.allclose(found[name][:9], own[1][name], atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == height


@pytest.mark.parametrize(
    "tokens, message",
    [
        ({"<no>": {"model": "{base}"}}, "tokens: '<no>': .*base has no row of '<no>'"),
        ({"a": {"model": "{base}", "token": 9}}, "tokens: 'a': .*base has no row of 9"),
        ({"a": {"model": "elsewhere"}}, "tokens: 'a' is from elsewhere, which is none of the models"),
    ],
)
def test_rows_that_do_not_exist_are_refused(family, tmp_path, tokens, message):
    paths, _ = family
    tokens = {token: own | {"model": own["model"].format(**paths)} for token, own in tokens.items()}
    with pytest.raises(ConfigError, match=message):
        merged(paths, tmp_path / "out", vocabulary="base", tokens=tokens)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", [("chat", "odd", "base"), ("base", "chat", "odd"), ("odd", "base", "chat")], ids=str)
@pytest.mark.parametrize("source", ["union", "model:odd"])
@pytest.mark.parametrize("rows", [2, 1 << 16])
def test_without_a_base_all_models_are_alike(family, tmp_path, order, source, rows, monkeypatch):
    """A model that lacks a token has the mean of those that know it, whichever model comes first."""
    monkeypatch.setattr("r_tsvm_kernels.engine.scheduling.TILE_ELEMENTS", (rows * 4,) * 3)
    paths, tensors = family
    weights = {"base": 0.2, "chat": 0.5, "odd": 0.3}
    entries = [{"model": paths[name], "parameters": {"weight": weights[name]}} for name in order]
    vocabulary = f"model:{paths['odd']}" if ":" in source else source
    config = MergeConfig.from_dict({"merge_method": "linear", "models": entries, "vocabulary": vocabulary})
    result = merge_checkpoints(config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    ids = ids_of(json.loads((tmp_path / "out" / "tokenizer.json").read_text()))
    for name in ALIGNED:
        for token, index in ids.items():
            own = row_of(name, token, tensors)
            mean = sum(own.values()) / len(own)
            expected = sum(weight * own.get(model, mean) for model, weight in weights.items())
            assert torch.allclose(found[name][index], expected, atol=1e-6), (name, token)
            if len(own) == 1:
                assert torch.equal(found[name][index], *own.values())
    groups = json.loads(result.report_path.read_text())["vocabulary"]["groups"]
    assert {group["rows"] for group in groups} <= {"merged", "model", "padding"}
    single = {token for token in ids if len(row_of(HEAD, token, tensors)) == 1}
    assert single == {token for group in groups if group["rows"] == "model" for token in group["tokens"]}
