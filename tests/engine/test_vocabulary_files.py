"""The tokenizer and the configs of a merge with a vocabulary of its own, and what is refused."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from vocabularies import EMBEDDING, HEAD, LAYER, PIECES, WIDTH, ids_of, tensors_of, tokenizer_json, write

from r_tsvm_kernels import CheckpointError, ConfigError, MergeConfig, ShapeError, merge_checkpoints, merge_state_dicts
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine.aligned_rows import read_aligned
from r_tsvm_kernels.plan import make_plan

BASE, CHAT = tokenizer_json(PIECES, ["<s>"]), tokenizer_json(PIECES, ["<s>", "<pad>", "<chat>"])


def pair(tmp_path, base=BASE, chat=CHAT, config=None, **files):
    """Write a base and a model, each with as many rows as tokens."""
    heights = [max(ids_of(x).values()) + 1 if x else 9 for x in (base, chat)]
    paths = [write(tmp_path / "base", tensors_of(heights[0], 0), base, config, **files)]
    return [*paths, write(tmp_path / "chat", tensors_of(heights[1], 1), chat)]


def merge(paths, out, vocabulary="union", **options):
    config = MergeConfig("task_arithmetic", base_model=paths[0], models=paths[1:], vocabulary=vocabulary, **options)
    merge_checkpoints(config, out)
    return load_file(out / "model.safetensors")


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_added_tokens_are_everywhere(tmp_path):
    declared = {"8": {"content": "<s>", "special": True}}
    paths = pair(tmp_path, tokenizer_config={"added_tokens_decoder": declared, "bos": "<s>"}, added_tokens={"<s>": 8},
                 vocab={"a": 0})  # fmt: skip
    merge(paths, tmp_path / "out")
    assert ids_of(read(tmp_path / "out", "tokenizer")) == ids_of(CHAT)
    config = read(tmp_path / "out", "tokenizer_config")
    assert config["bos"] == "<s>"
    assert {index: entry["content"] for index, entry in config["added_tokens_decoder"].items()} == {
        "8": "<s>", "9": "<pad>", "10": "<chat>",
    }  # fmt: skip
    assert config["added_tokens_decoder"]["10"]["special"] is True
    assert read(tmp_path / "out", "added_tokens") == {"<s>": 8, "<pad>": 9, "<chat>": 10}
    assert read(tmp_path / "out", "vocab") == {"a": 0}


def test_the_library_gives_the_ids_of_the_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="compares with tokenizers, which is not installed")
    base = tokenizer_json([*PIECES, "ab"], ["<s>"], merges=["a b"])
    chat = tokenizer_json([*PIECES, "ab", "cd", "abcd"], ["<s>", "<chat>"], merges=["a b", "c d", "ab cd"])
    base["added_tokens"][0]["id"] = 12  # with a gap, which the library would close
    paths = pair(tmp_path, base, chat, merges={}, vocab={})
    found = merge(paths, tmp_path / "out")
    assert found[EMBEDDING].shape[0] == 16
    content = read(tmp_path / "out", "tokenizer")
    assert content["model"]["merges"] == ["a b", "c d", "ab cd"]
    assert not (tmp_path / "out" / "vocab.json").exists()  # it lacks the new pieces
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    wanted = ids_of(base) | {"cd": 13, "abcd": 14, "<chat>": 15}
    assert {token: tokenizer.token_to_id(token) for token in wanted} == wanted
    assert tokenizer.encode("abcd<chat>").ids == [14, 15]


def test_other_classes_of_tokenizers(tmp_path):
    base, chat = (tokenizer_json(PIECES, added, kind="Unigram") for added in (["<s>"], ["<s>", "<chat>"]))
    found = merge(pair(tmp_path, base, chat), tmp_path / "out")
    assert found[EMBEDDING].shape[0] == 10
    assert ids_of(read(tmp_path / "out", "tokenizer")) == ids_of(chat)
    (tmp_path / "more").mkdir()
    paths = pair(tmp_path / "more", base, tokenizer_json([*PIECES, "new"], ["<s>"], kind="Unigram"))
    with pytest.raises(
        ConfigError, match=r"1 pieces that the tokenizer of .*base lacks \('new'\), and a Unigram model"
    ):
        merge(paths, tmp_path / "refused")
    assert merge(paths, tmp_path / "chosen", f"model:{paths[1]}")[EMBEDDING].shape[0] == 10


def test_token_ids_follow_the_vocabulary(tmp_path):
    config = {"bos_token_id": 0, "eos_token_id": [8, 1], "pad_token_id": None, "text_config": {"vocab_size": 9}}
    paths = pair(tmp_path, chat=tokenizer_json(PIECES[::-1], ["<x>", "<s>"]), config=config,
                 generation_config={"eos_token_id": 8, "unk_token_id": 3, "top_k": 5})  # fmt: skip
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    (tmp_path / "chat" / "config.json").write_text('{"vocab_size": 10, "sep_token_id": 2}')
    (tmp_path / "chat" / "chat_template.jinja").write_text("template")
    (tmp_path / "base" / "special_tokens_map.json").write_text("{}")
    merge(paths, tmp_path / "out", f"model:{paths[1]}")
    found = read(tmp_path / "out", "config")
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (7, [9, 6], None)
    assert found["sep_token_id"] == 2  # only the model has it
    assert found["text_config"]["vocab_size"] == found["vocab_size"] == 10
    assert read(tmp_path / "out", "generation_config") == {"eos_token_id": [9, 8], "unk_token_id": 4, "top_k": 5}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template"
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()


@pytest.mark.parametrize("kind", ["vocab.json", "vocab.txt"])
def test_older_tokenizer_files(tmp_path, kind):
    paths = pair(tmp_path)
    (tmp_path / "chat" / "tokenizer.json").unlink()
    if kind == "vocab.json":
        (tmp_path / "chat" / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(PIECES)}))
        (tmp_path / "chat" / "added_tokens.json").write_text(json.dumps({"<s>": 8, "<pad>": 9, "<chat>": 10}))
        assert merge(paths, tmp_path / "out")[EMBEDDING].shape[0] == 11
    else:
        (tmp_path / "chat" / "vocab.txt").write_text("\n".join([*PIECES, "<s>", "<pad>", "<chat>"]) + "\n")
    assert merge(paths, tmp_path / "kept", "base")[EMBEDDING].shape[0] == 9


@pytest.mark.parametrize("name", ["added_tokens", "tokenizer_config"])
def test_tokens_beside_the_tokenizer(tmp_path, name):
    """Some tunes have the base's tokenizer.json, and their own tokens only beside it."""
    paths = pair(tmp_path)
    (tmp_path / "chat" / "tokenizer.json").write_text(json.dumps(BASE))
    added = {"<pad>": 9, "<chat>": 10}
    content = added if name == "added_tokens" else {
        "added_tokens_decoder": {str(i): {"content": x, "special": True} for x, i in added.items()} | {"9" * 5000: {}}
    }  # fmt: skip
    (tmp_path / "chat" / f"{name}.json").write_text(json.dumps(content))
    found = merge(paths, tmp_path / "out")
    assert torch.equal(found[EMBEDDING][9:], tensors_of(11, 1)[EMBEDDING][9:])
    assert ids_of(read(tmp_path / "out", "tokenizer")) == ids_of(BASE) | added


def test_models_without_tokenizers(tmp_path, caplog):
    paths = pair(tmp_path, chat=None)
    merge(paths, tmp_path / "out", "base")
    assert "no tokenizer; it is taken to have the base's" in caplog.text
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"base: no tokenizer\.json"):
        merge(paths, tmp_path / "none")
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        merge(paths, tmp_path / "none")
    (tmp_path / "base" / "tokenizer.json").write_text('{"model": [1]}')
    with pytest.raises(CheckpointError, match="not a tokenizer file as expected"):
        merge(paths, tmp_path / "none")
    (tmp_path / "more").mkdir()
    paths = pair(tmp_path / "more")
    (tmp_path / "more" / "chat" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="its 11 rows could be aligned with the base's 9"):
        merge(paths, tmp_path / "none")


def test_what_cannot_be_aligned_is_refused(tmp_path):
    paths = pair(tmp_path)
    with pytest.raises(ShapeError, match=r"was its vocabulary resized\? --exclude .* --vocabulary base or union"):
        merge(paths, tmp_path / "none", None)
    with pytest.raises(ConfigError, match="is excluded and keeps the rows of the base"):
        merge(paths, tmp_path / "none", "union", exclude=("*embed_tokens*",))
    kept = merge(paths, tmp_path / "kept", "base", exclude=("*embed_tokens*",))
    assert torch.equal(kept[EMBEDDING], tensors_of(9, 0)[EMBEDDING])
    assert not torch.equal(kept[HEAD], tensors_of(9, 0)[HEAD])
    head = tensors_of(9, 0)
    save_file(
        {name: value for name, value in tensors_of(11, 1).items() if name != HEAD}, tmp_path / "chat/model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"rows of lm_head.weight cannot be aligned: only the base has it; use"):
        merge(paths, tmp_path / "none", "union", missing="base")
    assert torch.equal(merge(paths, tmp_path / "one", "base", missing="base")[HEAD], head[HEAD])
    with pytest.raises(ConfigError, match=r"model:elsewhere is none of the models: .*base.*chat; list it"):
        merge(paths, tmp_path / "none", "model:elsewhere")
    with pytest.raises(ConfigError, match="state dicts have no tokenizers"):
        merge_state_dicts({"w": torch.ones(1)}, [{"w": torch.ones(1)}], "linear", vocabulary="base")
    tensors = {LAYER: torch.ones(2, 2)}
    save_file(tensors, tmp_path / "chat" / "model.safetensors")
    with pytest.raises(CheckpointError, match="no token embedding found"):
        merge(paths, tmp_path / "none")


def adapter(tmp_path, module, shape):
    (tmp_path / "lora").mkdir()
    names = f"base_model.model.{module}"
    endings = ("lora_embedding_A", "lora_embedding_B") if "embed" in module else ("lora_A.weight", "lora_B.weight")
    sides = shape[::-1] if "embed" in module else shape
    factors = {f"{names}.{endings[0]}": torch.ones(1, sides[1]), f"{names}.{endings[1]}": torch.ones(sides[0], 1)}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [module]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    return str(tmp_path / "lora")


@pytest.mark.parametrize("module", ["model.layers.0.mlp", "model.embed_tokens"])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_adapters_beside_models(tmp_path, module, vocabulary):
    paths = pair(tmp_path)
    embedding = "embed" in module
    paths.append(adapter(tmp_path, module, (9, WIDTH) if embedding else (6, WIDTH)))
    if embedding and vocabulary == "union":
        with pytest.raises(ConfigError, match="whose rows the vocabulary moves"):
            merge(paths, tmp_path / "out", vocabulary)
        return
    found = merge(paths, tmp_path / "out", vocabulary)
    base, chat = tensors_of(9, 0), tensors_of(11, 1)
    for name, changed in ((EMBEDDING, embedding), (LAYER, not embedding)):
        rows = base[name].shape[0]
        expected = chat[name][:rows] + (1.0 if changed else 0.0)
        assert torch.allclose(found[name][:rows], expected, atol=1e-5)
    if vocabulary == "union":
        assert torch.equal(found[EMBEDDING][9:], chat[EMBEDDING][9:])


def test_a_generation_config_that_only_the_chosen_model_has(tmp_path):
    paths = pair(tmp_path)
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": 10, "top_k": 3}')
    merge(paths, tmp_path / "out", f"model:{paths[1]}")
    assert read(tmp_path / "out", "generation_config") == {"eos_token_id": 10, "top_k": 3}
    merge(paths, tmp_path / "union", "union")
    assert not (tmp_path / "union" / "generation_config.json").exists()


@pytest.mark.parametrize("model", ['{"merges": [5], "vocab": {"a": 0}, "type": "BPE"}', "null"])
def test_a_damaged_tokenizer_of_the_base(tmp_path, model):
    paths = pair(tmp_path, chat=tokenizer_json([*PIECES, "z"], ["<s>"], merges=["a b"]))
    added = '[{"id": 8, "content": "<s>"}]'
    (tmp_path / "base" / "tokenizer.json").write_text(f'{{"model": {model}, "added_tokens": {added}}}')
    with pytest.raises((CheckpointError, ConfigError), match=r"not as expected|cannot take those"):
        merge(paths, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_token_that_is_no_text(tmp_path):
    paths = pair(tmp_path)
    text = json.dumps(tokenizer_json([*PIECES[:-1], "\ud800"], ["<s>"]))
    (tmp_path / "base" / "tokenizer.json").write_text(text)
    assert merge(paths, tmp_path / "out")[EMBEDDING].shape[0] == 12
    assert ids_of(read(tmp_path / "out", "tokenizer"))["\ud800"] == 7
    assert main(["report", str(tmp_path / "out")]) == 0


def test_the_command(tmp_path, capsys):
    paths = pair(tmp_path)
    command = ["--base", paths[0], "--model", paths[1], "--method", "ties", "--vocabulary", "union"]
    assert main(["inspect", *command[:-1], ""]) == 2  # an empty variable of a script, say
    assert "expected 'base', 'union' or 'model:PATH', got ''" in capsys.readouterr().err
    assert main(["inspect", *command]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "vocabulary union: 11 rows, 2 tokens more than the base's" in out
    assert "2 rows of" in out
    assert "'<pad>', '<chat>'" in out
    assert main(["merge", *command, str(tmp_path / "out")]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {paths[0]}\nmodels: [{{model: {paths[1]}}}]\ntokenizer_source: union\n"
    )
    assert main(["merge", str(recipe), str(tmp_path / "again")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


def test_one_tokenizer_of_any_format_moves_nothing(tmp_path):
    paths = pair(tmp_path, None, None)
    for path in paths:
        (tmp_path / path / "tokenizer.model").write_bytes(b"sentencepiece")
    merge(paths, tmp_path / "out", "union")
    plain = merge(paths, tmp_path / "plain", None)
    assert all(torch.equal(plain[x], y) for x, y in load_file(tmp_path / "out" / "model.safetensors").items())
    (tmp_path / "chat" / "added_tokens.json").write_text('{"<new>": 8}')
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model but no tokenizer\.json"):
        merge(paths, tmp_path / "none", "union")


def test_heads_of_unknown_names(tmp_path):
    """Heads are found by their shapes where all heights are equal, too."""
    order = torch.arange(8, -1, -1)
    base, odd = tokenizer_json([*PIECES, "i"]), tokenizer_json([*PIECES, "i"][::-1])
    tensors = tensors_of(9, 0, tied=True) | {"decoder.weight": torch.randn(9, WIDTH), "decoder.bias": torch.randn(9)}
    moved = (EMBEDDING, "decoder.weight", "decoder.bias")
    turned = {name: value[order] if name in moved else value for name, value in tensors.items()}
    paths = [write(tmp_path / "base", tensors, base), write(tmp_path / "odd", turned, odd)]
    found = merge(paths, tmp_path / "out", "base")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_tokens_in_columns_are_refused(tmp_path):
    tensors = tensors_of(9, 0) | {"final_logits_bias": torch.zeros(1, 9)}
    paths = pair(tmp_path)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(ShapeError, match="one column for each token"):
        merge(paths, tmp_path / "none", missing="base")
    merge(paths, tmp_path / "out", exclude=("final_logits_bias",))


HOSTILE = ['{"a": 99999999999}', '{"a": -1}', '{"a": "0"}', '{"a": true}', "{}", '[["a"], [7]]', '"abc"']


@pytest.mark.parametrize("ids", HOSTILE)
def test_hostile_ids(tmp_path, ids):
    paths = pair(tmp_path)
    (tmp_path / "chat" / "tokenizer.json").write_text(f'{{"model": {{"vocab": {ids}}}}}')
    with pytest.raises(CheckpointError, match="not a tokenizer file as expected"):
        merge(paths, tmp_path / "none")


def test_a_token_may_look_like_the_list_of_merges(tmp_path):
    odd = ['"merges": [', "[", "]", "merges", 'a"b\\']
    base, chat = (tokenizer_json(PIECES, ["<s>", *more], merges=[['"', "["], "a b"]) for more in ([], odd))
    merge(pair(tmp_path, base, chat), tmp_path / "out")
    found = read(tmp_path / "out", "tokenizer")
    assert ids_of(found) == ids_of(chat)
    assert found["model"]["merges"] == [['"', "["], "a b"]


def test_a_single_file_says_that_it_has_no_tokenizer(tmp_path, caplog):
    paths = pair(tmp_path)
    merge_checkpoints(
        MergeConfig("ties", base_model=paths[0], models=paths[1:], vocabulary="union"), tmp_path / "o.safetensors"
    )
    assert "a single file has no tokenizer beside it" in caplog.text
    assert load_file(tmp_path / "o.safetensors")[EMBEDDING].shape[0] == 11


def test_a_plan_can_be_sent_to_another_process(tmp_path):
    paths = pair(tmp_path)
    config = MergeConfig("ties", base_model=paths[0], models=paths[1:], vocabulary="union")
    plan = make_plan(config, 2**30)
    there = pickle.loads(pickle.dumps(plan))
    here, other = (read_aligned(x, EMBEDDING, 0, 11) for x in (plan, there))
    assert all(torch.equal(first, second) for first, second in zip(here, other, strict=True))


def test_a_head_in_fp8_whose_rows_move(tmp_path, caplog):
    paths = pair(tmp_path)
    tensors = tensors_of(9, 0)
    scales = {f"{HEAD}_scale": torch.full((9, 1), 0.5)}
    save_file(tensors | {HEAD: tensors[HEAD].to(torch.float8_e4m3fn)} | scales, tmp_path / "base" / "model.safetensors")
    found = merge(paths, tmp_path / "out", requantise=True)
    assert found[HEAD].dtype == torch.bfloat16 and f"{HEAD}_scale" not in found
    assert torch.allclose(found[HEAD].float(), tensors_of(11, 1)[HEAD], rtol=1e-2, atol=1e-2)
    assert f"moves the rows of {HEAD}, so they are not written in FP8" in caplog.text
