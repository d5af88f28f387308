"""Loading a language model and adding LoRA: what is there, what is refused, and in which words."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.llm import add_lora, linear_names, load_llm, load_tokenizer, usual_targets
from common.tiny_llm import make_llm, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llm") / "tiny"
    make_llm(path, make_tokenizer(["a few words"], 300))
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma", "gpt_neox", "opt", "mistral", "phi3"])
@pytest.mark.parametrize("settings", [None, {}, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_special_words_alone_are_no_tokenizer(kind, settings, tmp_path):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r": holds no tokenizer \(tokenizer.json, .*; copy it there") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: ")


def test_a_tokenizer_of_bytes_needs_no_file_of_words(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert load_tokenizer(tmp_path)("a b").input_ids[:3] == [100, 35, 101]


def tiny(model_type, **config):
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


def test_a_folder_gives_its_model_in_the_stored_type_or_another(folder):
    ids = torch.tensor([load_tokenizer(folder)("a few words").input_ids])
    model = load_llm(folder)
    assert not model.training and model(ids).logits.dtype == torch.float32
    assert load_llm(folder, "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["no config", "no weights", "cut weights", "no tokenizer", "own code"])
def test_what_cannot_be_loaded_names_the_folder(folder, tmp_path, damage):
    (tmp_path / "llm").mkdir()
    for file in folder.iterdir():
        (tmp_path / "llm" / file.name).write_bytes(file.read_bytes())
    config, weights = tmp_path / "llm" / "config.json", tmp_path / "llm" / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "no tokenizer":
        for file in (tmp_path / "llm").glob("tokenizer*"):
            file.unlink()
        with pytest.raises(UserError, match="tokenizer"):
            load_tokenizer(tmp_path / "llm")
        return
    else:
        own = {"model_type": "nobody", "auto_map": {"AutoConfig": "configuration.Config"}}
        config.write_text(json.dumps(own))
    with pytest.raises(UserError, match="trust-remote-code" if damage == "own code" else "llm") as caught:
        load_llm(tmp_path / "llm")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model_type, config, targets",
    [
        ("llama", {"intermediate_size": 24}, ["q_proj", "v_proj"]),
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}, ["c_attn"]),
        ("gpt_neox", {"intermediate_size": 24}, ["query_key_value"]),
    ],
)
def test_lora_trains_its_own_matrices_alone_and_changes_nothing_at_first(model_type, config, targets):
    model, ids = tiny(model_type, **config), torch.tensor([[1, 2, 3]])
    before = model.eval()(ids).logits
    assert usual_targets(model) == targets and not {"lm_head", "embed_out"} & set(linear_names(model))
    wrapped = add_lora(model, r=2, alpha=8).eval()
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and any(t in name for t in targets) for name in trained)
    assert torch.equal(wrapped(ids).logits, before)
    assert wrapped.peft_config["default"].lora_alpha == 8 and wrapped.peft_config["default"].r == 2


def test_a_target_that_is_not_there_is_one_line_with_those_that_are():
    with pytest.raises(UserError, match="--my-flag c_attn: .* no linear module 'c_attn'; it has .*q_proj"):
        add_lora(tiny("llama", intermediate_size=24), 2, 4, targets=["c_attn"], option="--my-flag")
