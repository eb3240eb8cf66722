"""Models whose vocabularies grew by the means of transformers are merged, and load with their tokenizer."""

import pytest
import torch
from families import FAMILIES, fine_tune, load, run, transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from r_tsvm_kernels import MergeConfig, merge_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own

TOKENS = {f"word{i}": i for i in range(96)}
ADDED = {"first": ["<shared>", "<one>"], "second": ["<two>", "<shared>"]}


def tokenizer(*added):
    words = Tokenizer(models.WordLevel(TOKENS, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="word0", pad_token="word0")
    made.add_tokens(list(added))
    return made


@pytest.fixture(scope="module", params=["llama", "llama, tied", "t5", "gemma-3 with images"])
def grown(request, tmp_path_factory):
    """A base of 96 tokens, and two fine-tunes that added two each, one of them the same."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("vocabularies")
    for seed, name in enumerate(("base", "first", "second")):
        model = family.build()
        words = tokenizer(*ADDED.get(name, ()))
        if seed:
            model.resize_token_embeddings(len(words), mean_resizing=False)
            fine_tune(model, family, seed)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return family, folder


def rows_of(model, words):
    """Return the row of each token in the embedding and in the head, by its text."""
    matrices = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert {len(matrix) for matrix in matrices} == {len(words)}
    return {token: torch.cat([matrix[i] for matrix in matrices]).detach() for token, i in words.get_vocab().items()}


@pytest.mark.parametrize("method", ["task_arithmetic", "tsvm"])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_rows_follow_their_tokens(grown, tmp_path, vocabulary, method):
    family, folder = grown
    paths = [folder / name for name in ("base", "first", "second")]
    config = MergeConfig(method, base_model=paths[0], models=paths[1:], vocabulary=vocabulary)
    merge_checkpoints(config, tmp_path / "out")
    merged = load(family, tmp_path / "out")
    words = [transformers.AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", *paths)]
    added = ["<shared>", "<one>", "<two>"] if vocabulary == "union" else []
    assert words[0].get_vocab() == TOKENS | {token: 96 + i for i, token in enumerate(added)}
    assert merged.config.get_text_config().vocab_size == len(words[0])
    rows, base, *tuned = (
        rows_of(model, own) for model, own in zip([merged, *(load(family, path) for path in paths)], words, strict=True)
    )
    for token, row in rows.items():
        known = [own[token] for own in tuned if token in own]
        if token in base and method == "task_arithmetic":
            torch.testing.assert_close(row, base[token] + sum(own - base[token] for own in known), rtol=0, atol=1e-6)
        elif token not in base:
            torch.testing.assert_close(row, sum(known) / len(known), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert run(merged, family).isfinite().all()
