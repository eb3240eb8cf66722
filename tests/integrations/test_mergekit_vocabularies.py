"""Recipes that align tokenizers: the same tokens and the same rows as mergekit, for what both define alike."""

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
tokenizers = pytest.importorskip("tokenizers", reason="mergekit is not installed: run make test-integrations")

from mergekit_pair import (  # noqa: E402  after the check for mergekit
    ALIGNED,
    ROUNDING,
    assert_close,
    assert_same_config,
    both,
    fine_tune,
    llama,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers

TEXT = ["merging models adds their task vectors to the base model", "tokens of other models are added to the model"]
BEGIN, END, UNKNOWN, OPEN, CLOSE, TOOL = "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|tool|>"
MOST = "most {{ messages }}"  # the template of most models
# Models: order of the special tokens, added tokens, rows of padding, tied.
MODELS = {
    "base": ((BEGIN, END, UNKNOWN), (), 0, False),
    "plain": ((BEGIN, END, UNKNOWN), (), 0, False),
    "chat": ((BEGIN, END, UNKNOWN), (OPEN, CLOSE), 0, False),
    "tool": ((BEGIN, END, UNKNOWN), (CLOSE, TOOL), 0, False),
    "moved": ((UNKNOWN, END, BEGIN), (CLOSE,), 0, False),
    "padded": ((BEGIN, END, UNKNOWN), (OPEN, CLOSE), 30, False),
    "tied": ((BEGIN, END, UNKNOWN), (), 0, True),
    "tied_chat": ((BEGIN, END, UNKNOWN), (OPEN, CLOSE), 0, True),
}


def tokenizer_of(first, added, template):
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(first), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    found.train_from_iterator(TEXT, trainer)
    found.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in added])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=found, bos_token=BEGIN, eos_token=END)
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models whose rows follow their tokens: a fine-tune's row is the base's of the same token, and an update."""
    folder = tmp_path_factory.mktemp("models")
    rows = {}
    for seed, (name, (first, added, padding, tied)) in enumerate(MODELS.items()):
        template = MOST if name in ("plain", "chat") else None if name == "tool" else f"{name} {{{{ messages }}}}"
        tokenizer = tokenizer_of(first, added, template)
        ids = tokenizer.get_vocab()
        start = llama(folder / f"start_{name}", len(ids) + padding, tied=tied)
        tensors = weights(start)
        for key in set(ALIGNED) & tensors.keys():
            for token, index in sorted(ids.items()):
                tensors[key][index] = rows.setdefault((key, token), torch.randn(32))
        save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
        fine_tune(start, folder / name, seed)
        tokenizer.save_pretrained(folder / name)
    return folder


def tokenizer_at(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def entries(models, names, **parameters):
    return [{"model": str(models / name), **({"parameters": parameters} if parameters else {})} for name in names]


def placed(models, value):
    """Write the names of models in a choice of tokens as paths."""
    if isinstance(value, dict):
        return {key: placed(models, item) for key, item in value.items()}
    return str(models / value) if value in MODELS else value


def compared(models, recipe, tmp_path, *, without=(), config=True):
    """Merge with both; the same tokens with the same flags, and the same row for each but those `without`."""
    theirs, ours = both({**recipe, "dtype": "float32"}, tmp_path)
    found = [tokenizer_at(tmp_path / name) for name in ("theirs", "ours")]
    ids = [tokenizer.get_vocab() for tokenizer in found]
    assert ids[0].keys() == ids[1].keys()
    flags = [
        {
            str(token): (token.special, token.normalized, token.lstrip)
            for token in tokenizer.added_tokens_decoder.values()
        }
        for tokenizer in found
    ]
    assert flags[0] == flags[1]
    assert found[0].special_tokens_map == found[1].special_tokens_map
    assert found[0].chat_template == found[1].chat_template
    for name, tensor in ours.items():
        if name in ALIGNED:
            for token in ids[1].keys() - set(without):
                assert_close(tensor[ids[1][token]], theirs[name][ids[0][token]], (name, token))
        else:
            assert_close(tensor, theirs[name], name)
    if config:
        assert_same_config(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    encoded = found[1](f"{TEXT[0]} {CLOSE}", return_tensors="pt").input_ids
    assert loaded(encoded).logits.isfinite().all()
    return theirs, ours, ids


METHODS = {
    "task_arithmetic": {"weight": 0.6}, "linear": {"weight": 1.0}, "dare_linear": {"weight": 0.3, "density": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["base", "union", "chat", "moved"])
@pytest.mark.parametrize("names", [("chat", "plain"), ("moved", "chat"), ("base", "chat", "moved")], ids=",".join)
def test_sources(models, tmp_path, method, source, names):
    if source in MODELS and source not in names and source != "base":
        names = (*names, source)
    several = {CLOSE} if method == "dare_linear" else ()  # we take the mean, whatever the weights are
    recipe = {
        "merge_method": method, "base_model": str(models / "base"), "models": entries(models, names),
        "parameters": METHODS[method], "tokenizer_source": placed(models, source) if source != "base" else source,
    }  # fmt: skip
    compared(models, recipe, tmp_path, without=several, config=source != "moved")
    if source == "moved":  # the ids of special tokens follow their tokens; mergekit keeps those of the base
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        ids = tokenizer_at(tmp_path / "ours").get_vocab()
        assert config["vocab_size"] == len(ids)


def model_token(model, **token):
    return {"kind": "model_token", "model": model, **token}


CHOICES = {
    "forced": {CLOSE: {"source": "chat", "force": True}},
    "forced from the other": {CLOSE: {"source": "tool", "force": True}},
    "a token that all have": {UNKNOWN: {"source": "tool"}},
    "a token that all have, forced": {UNKNOWN: {"source": "tool", "force": True}},
    "the base's": {UNKNOWN: {"source": "base", "force": True}, "a": {"source": "base"}},
    "another token's row": {TOOL: {"source": model_token("chat", token=OPEN), "force": True}},
    "an id": {CLOSE: {"source": model_token("base", token_id=5), "force": True}},
    "new tokens": {
        "<z>": {"source": model_token("base", token=END)},
        "<a>": {"source": model_token("tool", token=TOOL), "force": True},
        "<b>": {"source": model_token("chat", token_id=7)},
    },
    "nothing": {UNKNOWN: {"force": False}, "a": {"source": None}},
}


def is_shared(choice, source):
    """Whether mergekit 0.1.5 can do it too, and alike.

    It cannot add tokens to the vocabulary of the base (KeyError), and it adds them without the flags that they have in
    another model.
    """
    added = CHOICES[choice].keys() - {"a", UNKNOWN}
    return not (source == "base" and added) and not (source == "chat" and TOOL in added)


SHARED = [(choice, source) for choice in CHOICES for source in ("union", "base", "chat") if is_shared(choice, source)]


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("choice, source", SHARED)
def test_tokens(models, tmp_path, choice, source, method):
    chosen = placed(models, CHOICES[choice])
    recipe = {
        "merge_method": method, "base_model": str(models / "base"), "models": entries(models, ["chat", "tool"]),
        "parameters": METHODS[method],
        "tokenizer": {"source": placed(models, source) if source == "chat" else source, "tokens": chosen},
    }  # fmt: skip
    compared(models, recipe, tmp_path)


def test_listed_tokens_keep_their_flags(models, tmp_path):
    """mergekit adds them as plain tokens, which are not special."""
    chosen = placed(models, {TOOL: {"source": "tool", "force": True}})
    recipe = {
        "merge_method": "linear", "base_model": str(models / "base"), "models": entries(models, ["chat", "tool"]),
        "parameters": {"weight": 1.0}, "dtype": "float32",
        "tokenizer": {"source": str(models / "chat"), "tokens": chosen},
    }  # fmt: skip
    theirs, ours = both(recipe, tmp_path)
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name)
    flags = [
        {str(token): token.special for token in tokenizer_at(tmp_path / name).added_tokens_decoder.values()}
        for name in ("theirs", "ours")
    ]
    assert (flags[0][TOOL], flags[1][TOOL]) == (False, True)


ORDERS = [("chat", "tool", "plain"), ("plain", "tool", "chat"), ("base", "moved", "chat")]


@pytest.mark.parametrize("names", ORDERS, ids=",".join)
@pytest.mark.parametrize("weight", [[0.3, 0.9], 1.0], ids=str)
def test_without_a_base(models, tmp_path, names, weight):
    """All models are alike: one that lacks a token has the mean of those that know it."""
    listed = [{**entry, "parameters": {"weight": 0.5 + i}} for i, entry in enumerate(entries(models, names))]
    recipe = {"merge_method": "linear", "models": listed, "tokenizer_source": str(models / "chat")}
    listed[-1]["parameters"] = {"weight": weight}
    # Which model is the first one is chance in mergekit, and with it the configuration.
    compared(models, recipe, tmp_path, config=False)


@pytest.mark.parametrize("method", ["karcher", "multislerp", "slerp"])
def test_rows_of_one_model_are_exactly_its(models, tmp_path, method):
    """mergekit passes them through the method, which changes them with the direction of the whole tensor."""
    names = ["plain", "chat"] if method != "slerp" else ["chat"]
    recipe = {
        "merge_method": method, "base_model": str(models / "base"), "models": entries(models, names),
        "parameters": {"t": 0.4} if method == "slerp" else {"weight": 1.0}, "tokenizer_source": "union",
    }  # fmt: skip
    theirs, ours, ids = compared(models, recipe, tmp_path, without=[OPEN, CLOSE])
    own = tokenizer_at(models / "chat").get_vocab()
    for name in ALIGNED:
        for token in (OPEN, CLOSE):
            row = weights(models / "chat")[name][own[token]]
            assert torch.equal(ours[name][ids[1][token]], row)
            assert (theirs[name][ids[0][token]] - row).norm() < 0.05 * row.norm()


@pytest.mark.parametrize("source, chosen", [("base", False), *((s, c) for s in ("union", "tied_chat") for c in (0, 1))])
def test_tied_embeddings(models, tmp_path, source, chosen):
    tokens = placed(models, {CLOSE: {"source": model_token("tied", token=END), "force": True}}) if chosen else {}
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(models / "tied"), "models": entries(models, ["tied_chat"]),
        "parameters": {"weight": 0.6},
        "tokenizer": {"source": source if source == "base" else placed(models, source), "tokens": tokens},
    }  # fmt: skip
    _, ours, _ = compared(models, recipe, tmp_path)
    assert "lm_head.weight" not in ours


@pytest.mark.parametrize("multiple", [7, 16, 64])
@pytest.mark.parametrize("source", ["base", "union", "chat"])
def test_padding(models, tmp_path, source, multiple):
    """As many rows, and the same configuration; rows of padding are zeros here, the mean of all in mergekit."""
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": entries(models, ["chat"]),
        "parameters": {"weight": 0.6},
        "tokenizer": {"source": placed(models, source) if source == "chat" else source, "pad_to_multiple_of": multiple},
    }  # fmt: skip
    theirs, ours, ids = compared(models, recipe, tmp_path)
    for name in ALIGNED:
        assert ours[name].shape == theirs[name].shape and len(ours[name]) % multiple == 0
        assert not ours[name][len(ids[1]) :].any()


def test_a_padded_model_keeps_its_padding(models, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": entries(models, ["padded"]),
        "parameters": {"weight": 0.6}, "tokenizer_source": str(models / "padded"),
    }  # fmt: skip
    theirs, ours, ids = compared(models, recipe, tmp_path, config=False)
    padded = weights(models / "padded")
    for name in ALIGNED:
        assert len(theirs[name]) == len(ids[0]) and len(ours[name]) == len(padded[name])
        assert torch.equal(ours[name][len(ids[1]) :], padded[name][len(ids[1]) :])
    recipe["tokenizer_source"] = "union"  # counts tokens, in both
    compared(models, recipe, tmp_path / "again")


def test_rows_that_several_models_have_and_the_base_lacks(models, tmp_path):
    """Ours are the mean. In mergekit, task vectors around the mean cancel, and TIES elects between equal magnitudes."""
    recipe = {
        "merge_method": "ties", "base_model": str(models / "base"), "models": entries(models, ["chat", "tool"]),
        "parameters": {"weight": 0.5, "density": 1.0}, "tokenizer_source": "union",
    }  # fmt: skip
    theirs, ours, ids = compared(models, recipe, tmp_path, without=[CLOSE])
    own = {name: tokenizer_at(models / name).get_vocab()[CLOSE] for name in ("chat", "tool")}
    for name in ALIGNED:
        mean = sum(weights(models / model)[name][index] for model, index in own.items()) / 2
        assert (ours[name][ids[1][CLOSE]] - mean).norm() <= ROUNDING * mean.norm()
        assert (theirs[name][ids[0][CLOSE]] - mean).norm() > 0.01 * mean.norm()


@pytest.mark.parametrize("template", ["auto", "{% for message in messages %}{{ message['content'] }}{% endfor %}"])
@pytest.mark.parametrize("source", [None, "union"])
def test_chat_templates(models, tmp_path, template, source):
    recipe = {
        "merge_method": "linear", "base_model": str(models / "base"), "models": entries(models, ["plain", "chat"]),
        "parameters": {"weight": 1.0}, "chat_template": template, "tokenizer_source": source or "base",
    }  # fmt: skip
    compared(models, recipe, tmp_path)
    assert tokenizer_at(tmp_path / "ours").chat_template == (MOST if template == "auto" else template)


# Kind: options of the model, its trainer with options, what splits texts.
KINDS = {
    "Unigram": ({}, "UnigramTrainer", {"unk_token": UNKNOWN}, "Metaspace"),
    "WordPiece": ({"unk_token": UNKNOWN}, "WordPieceTrainer", {}, "Whitespace"),
    "BPE": ({"unk_token": UNKNOWN, "byte_fallback": True}, "BpeTrainer", {}, "Metaspace"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["base", "union", "more"])
def test_kinds_of_tokenizers(tmp_path, kind, source):
    """Added tokens, special or not, in the older form of the files, which has them in three places."""
    of_model, trainer, of_trainer, split = KINDS[kind]
    tokenizer = tokenizers.Tokenizer(getattr(tokenizers.models, kind)(**of_model))
    tokenizer.pre_tokenizer = getattr(tokenizers.pre_tokenizers, split)()
    special = [BEGIN, END, UNKNOWN]
    of_trainer = {"vocab_size": 60, "special_tokens": special, "show_progress": False, **of_trainer}
    tokenizer.train_from_iterator(TEXT, getattr(tokenizers.trainers, trainer)(**of_trainer))
    for seed, name in enumerate(("base", "more")):
        own = tokenizers.Tokenizer.from_str(tokenizer.to_str())
        if name == "more":
            own.add_special_tokens([tokenizers.AddedToken(CLOSE, special=True, normalized=False)])
            own.add_tokens([tokenizers.AddedToken("plain", special=False, normalized=True, lstrip=True)])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token=BEGIN, eos_token=END)
        fine_tune(llama(tmp_path / f"start_{name}", len(fast), layers=1, seed=seed), tmp_path / name, seed)
        fast.save_pretrained(tmp_path / name)
        entries_of = json.loads((tmp_path / name / "tokenizer.json").read_text())["added_tokens"]
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        decoder = {str(e["id"]): {key: value for key, value in e.items() if key != "id"} for e in entries_of}
        config |= {"added_tokens_decoder": decoder, "tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        added = {entry["content"]: entry["id"] for entry in entries_of if entry["content"] not in special}
        (tmp_path / name / "added_tokens.json").write_text(json.dumps(added))
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "more")}], "parameters": {"weight": 0.5},
        "tokenizer_source": str(tmp_path / "more") if source == "more" else source,
    }  # fmt: skip
    compared(tmp_path, recipe, tmp_path / "out")


def test_pieces_stay_pieces_in_a_union(models, tmp_path):
    """mergekit makes them added tokens, which are found in every text before the tokenizer's merges."""
    tokenizer = tokenizer_at(models / "base")
    content = json.loads((models / "base" / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = len(tokenizer)
    content["model"]["merges"].append(["z", "z"])
    fine_tune(llama(tmp_path / "start", len(tokenizer) + 1), tmp_path / "pieces", 3)
    tokenizer.save_pretrained(tmp_path / "pieces")
    (tmp_path / "pieces" / "tokenizer.json").write_text(json.dumps(content))
    recipe = {
        "merge_method": "linear", "base_model": str(models / "base"), "models": [{"model": str(tmp_path / "pieces")}],
        "parameters": {"weight": 1.0}, "tokenizer_source": "union", "dtype": "float32",
    }  # fmt: skip
    theirs, ours = both(recipe, tmp_path)
    for name, tensor in ours.items():
        assert_close(tensor, theirs[name], name)
    found = [tokenizer_at(tmp_path / name) for name in ("theirs", "ours")]
    assert found[0].get_vocab() == found[1].get_vocab()
    added = [{str(token) for token in x.added_tokens_decoder.values()} for x in found]
    assert "zz" in added[0] and "zz" not in added[1]
    assert found[1]("a zz").input_ids[-1] == len(tokenizer) + (0 if "\u0120zz" not in found[1].get_vocab() else 1)
