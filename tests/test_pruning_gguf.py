"""A GGUF file says what its folder says: read by transformers, token by token."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from pruning.pruning_tools import export_gguf, prune_llm
from tests.pruning_zoo import call

gguf = pytest.importorskip("gguf")
LINES = ["The lung number 7 is clear and the heart is of normal size.", "肺野清晰，心影不大。"]


def make(folder, kind="llama", **config):
    settings = {"num_hidden_layers": 4, "hidden_size": 64, "head_dim": 128 if kind == "qwen3" else 16}
    return make_llm(folder, make_tokenizer(LINES, 300), kind, **{**settings, **config})


def export(folder, out, *words):
    call(export_gguf, "--model", folder, "--out", out, "--pre", "gpt-2", *words)
    return AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name).eval()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "kind, config",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_a_pruned_folder_and_its_file_write_the_same_tokens(tmp_path, kind, config):
    make(tmp_path / "llm", kind, **config)
    call(prune_llm, ckpt=tmp_path / "llm", out_dir=tmp_path, drop_layers=1)
    folder, out = tmp_path / "hf_drop1_1", tmp_path / "m.gguf"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    if config.get("tie_word_embeddings"):  # a tokenizer that begins every text with <s>
        start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = start
        tokenizer.save_pretrained(folder)
    read, again = export(folder, out), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert read.config.num_hidden_layers == 3
    starts = gguf.GGUFReader(out).fields["tokenizer.ggml.add_bos_token"].contents()
    assert starts == (tokenizer(LINES[0]).input_ids[0] == tokenizer.bos_token_id)
    for line in LINES:
        ids = tokenizer(line, return_tensors="pt").input_ids
        assert again(line).input_ids == ids[0].tolist()
        assert torch.equal(read(ids).logits, model(ids).logits)
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        assert torch.equal(read.generate(ids, **settings), model.generate(ids, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind, close", [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 2e-2)])
def test_other_number_formats_round_the_matrices_alone(tmp_path, kind, close):
    model = make(tmp_path / "llm")
    read = export(tmp_path / "llm", tmp_path / "m.gguf", "--type", kind)
    for (name, a), b in zip(model.named_parameters(), read.parameters()):
        assert torch.allclose(a, b, atol=close * a.abs().max().item()), name
        assert torch.equal(a, b) == (a.dim() == 1), name


@pytest.mark.parametrize(
    "kind, config, message",
    [
        ("gpt2", {}, "model_type gpt2 is not among"),
        ("llama", {"attention_bias": True}, "attention_bias True is not written"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "rope_param",
        ),
        ("mistral", {"sliding_window": 8}, "sliding_window 8 is not written"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu is not written"),
        ("llama", {"vocab_size": 200}, "the model's table has 200 rows"),
    ],
)
def test_what_the_file_cannot_say_is_refused_and_nothing_is_left(tmp_path, kind, config, message):
    make(tmp_path / "llm", kind, **config)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "llm", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*gguf*"))


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused(tmp_path):
    make(tmp_path / "llm")
    file = tmp_path / "llm/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Metaspace"}
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no byte-level BPE"):
        export(tmp_path / "llm", tmp_path / "m.gguf")


def test_words_beyond_the_tokenizer_are_padding_and_a_file_is_not_replaced_unasked(tmp_path):
    make(tmp_path / "llm", vocab_size=320)
    read = export(tmp_path / "llm", tmp_path / "m.gguf")
    assert read.config.vocab_size == 320
    with pytest.raises(UserError, match="add --overwrite"):
        export(tmp_path / "llm", tmp_path / "m.gguf")
    with pytest.raises(UserError, match="m.gguf: GGUF files are not pruned; give the folder"):
        call(prune_llm, ckpt=tmp_path / "m.gguf", out_dir=tmp_path / "out", drop_layers=1)
