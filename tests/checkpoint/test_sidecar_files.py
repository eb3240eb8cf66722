"""Which files beside the weights go into an output."""

import ast
from pathlib import Path

import pytest

from r_tsvm_kernels.checkpoint import is_sidecar_file

NEEDED = (
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt tokenizer.model spiece.model sentencepiece.bpe.model tekken.json source.spm "
    "tokenizer.model.v3 tokenizer.model.v7m1 "
    "qwen.tiktoken bpe.codes dict.txt preprocessor_config.json processor_config.json video_preprocessor_config.json "
    "chat_template.jinja chat_template.json modules.json config_sentence_transformers.json sentence_bert_config.json "
    "model_index.json scheduler_config.json params.json modeling_x.py configuration_x.py LICENSE LICENSE.txt "
    "LICENSE-MIT NOTICE.md USE_POLICY.md "
)
FOREIGN = (
    "adapter_config.json adapter_model.safetensors adapter_model.bin Adapter_Config.JSON "
    "optimizer.pt scheduler.pt rng_state.pth rng_state_0.pth trainer_state.json training_args.bin training_args.json "
    "global_step100 train.log events.out.tfevents.1 all_results.json train_results.json eval_results.json "
    "ds_config.json zero_to_fp32.py requirements.txt eval_results_sts.txt latest "
    "quantize_config.json quant_config.json hf_quant_config.json quantization_config.json "
    "gptq_quantize_config.json awq_config.json gptq_config.json quant.json quantization.json scheduler_state.json "
    "accelerator_state.json predictions.json nbest_predictions.json "
    "model.safetensors model.safetensors.index.json Model.Safetensors.Index.json model.safetensors.index.fp16.json "
    "model-00001-of-00002.safetensors pytorch_model.bin pytorch_model.bin.index.json tf_model.h5 flax_model.msgpack "
    "model.gguf model.onnx LICENSE.safetensors LICENSE-00001-of-00002.safetensors NOTICE.safetensors LICENSE.bin "
    "merge_report.json MERGE_REPORT.json merge_report.html merge_recipe.yaml merge_journal.jsonl README.md readme.MD "
    ".hidden.json .DS_Store "
)


@pytest.mark.parametrize("name", NEEDED.split())
def test_what_a_model_needs(name):
    assert is_sidecar_file(name)


@pytest.mark.parametrize("name", FOREIGN.split())
def test_what_is_not_the_models(name):
    assert not is_sidecar_file(name)


def test_every_file_of_the_tokenizers_of_transformers():
    """Each tokenizer names its files in a table, VOCAB_FILES_NAMES; none of them is left behind."""
    transformers = pytest.importorskip("transformers")
    names = set()
    for file in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            if "VOCAB_FILES_NAMES" in targets and isinstance(node.value, ast.Dict):
                names.update(value.value for value in node.value.values)
    assert len(names) > 10
    assert [name for name in sorted(names) if not is_sidecar_file(name)] == []
