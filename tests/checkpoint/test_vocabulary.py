"""`tokenizer_source` is taken where the models share a vocabulary, and refused where rows would have to move."""

import json

import pytest
from checkpoints import family

from r_tsvm_kernels import MergeConfig
from r_tsvm_kernels.errors import CheckpointError
from r_tsvm_kernels.plan import make_plan

IDS = {"a": 0, "b": 1, "<pad>": 2}


def bpe(ids=IDS, added=()):
    return json.dumps(
        {"model": {"type": "BPE", "vocab": ids}, "added_tokens": [{"content": t, "id": i} for t, i in added]}
    )


def unigram(tokens=("a", "b", "<pad>")):
    return json.dumps({"model": {"type": "Unigram", "vocab": [[token, -1.0] for token in tokens]}})


@pytest.fixture
def plan(tmp_path):
    """Make a plan of models with these tokenizer files: one dictionary for each model, the base first."""

    def make(*files, source="union"):
        paths, _, _ = family(tmp_path, tasks=len(files) - 1)
        for path, contents in zip(paths, files, strict=True):
            (path / "tokenizer.json").unlink()
            for name, text in contents.items():
                (path / name).write_text(text)
        models = [{"model": str(path)} for path in paths[1:]]
        recipe = {"merge_method": "task_arithmetic", "base_model": str(paths[0]), "models": models}
        return make_plan(MergeConfig.from_dict(recipe | {"tokenizer": source and {"source": source}}), 2**30)

    return make


@pytest.mark.parametrize("source", ["base", "union"])
@pytest.mark.parametrize(
    "files",
    [
        [{"tokenizer.json": bpe()}, {"tokenizer.json": bpe(dict(reversed(IDS.items())))}],
        [{"tokenizer.json": bpe()}, {"tokenizer.json": bpe({"a": 0, "b": 1}, [("<pad>", 2)])}],
        [{"tokenizer.json": unigram()}, {"tokenizer.json": bpe(), "vocab.json": "{}"}],
        [{"vocab.json": '{"a": 0}'}, {"vocab.json": '{ "a": 0 }'}],
        [{"tokenizer.model": "bytes"}, {"tokenizer.json": bpe(), "tokenizer.model": "bytes"}],
    ],
    ids=["order", "added", "kinds", "vocab", "sentencepiece"],
)
def test_the_same_ids_in_other_files(plan, files, source):
    assert len(plan(*files, source=source).tuned) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"tokenizer.json": bpe()}, {"tokenizer.json": bpe({"a": 1, "b": 0, "<pad>": 2})}], "'a' has id 1.*base 0"),
        ([{"tokenizer.json": bpe()}, {"tokenizer.json": bpe(added=[("<new>", 3)])}], "'<new>' has id 3.*base None"),
        ([{"tokenizer.json": bpe(added=[("<new>", 3)])}, {"tokenizer.json": bpe()}], "'<new>' has id None.*base 3"),
        ([{"tokenizer.json": unigram()}, {"tokenizer.json": unigram(["b", "a", "<pad>"])}], "'a' has id 1"),
        ([{"vocab.json": '{"a": 0}'}, {"vocab.json": '{"a": 1}'}], "in vocab.json"),
        ([{"tokenizer.model": "bytes"}, {"tokenizer.model": "other"}], "tokenizer.model"),
        ([{"tokenizer.json": bpe()}, {"tokenizer.model": "bytes"}], "no tokenizer file in common"),
        ([{}, {}], "no tokenizer file in common"),
        ([{"tokenizer.json": bpe()}, {"tokenizer.json": '{"model": [1]}'}], "not a tokenizer file as expected"),
        ([{"tokenizer.json": bpe()}, {"tokenizer.json": '{"added_tokens": [{}]}'}], "not a tokenizer file as expected"),
        ([{"tokenizer.json": bpe()}, {"tokenizer.json": "{"}], "not readable as JSON"),
    ],
)
def test_other_vocabularies_are_refused(plan, files, message):
    with pytest.raises(CheckpointError, match=message):
        plan(*files)


def test_every_model_is_compared(plan):
    with pytest.raises(CheckpointError, match=r"expert1: '<new>'"):
        plan(*[{"tokenizer.json": bpe()}] * 2, {"tokenizer.json": bpe(added=[("<new>", 3)])})


def test_without_tokenizer_source_nobody_looks(plan):
    plan({"tokenizer.json": bpe()}, {}, source=None)
