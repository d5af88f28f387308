"""Pruning on disk: equal logits, nothing else touched, little memory, one line for every mistake."""

import hashlib
import json
import os
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bench.measure import added_peak_mb
from bench.pruning import pangu_shapes, write_sparse
from common.errors import UserError
from common.tiny_llm import make_tokenizer
from dia_pangu.src.Model.pangu import PanguEmbeddedConfig, PanguEmbeddedForCausalLM
from pruning import repair, train
from pruning.layers import parse_drop_layers, refuse_quantized, spec_of, without_layers
from pruning.pruning_tools import count_params, inspect_ckpt, prune_llm, prune_width, shards
from pruning.sensitivity_analyse.layer_mask import masked
from tests import pruning_zoo
from tests.pruning_zoo import call

SIZE = dict(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "pangu": (PanguEmbeddedConfig, PanguEmbeddedForCausalLM, {"bias": True}),
}
IDS = torch.tensor([[5, 9, 33, 21, 7, 40]])


def make(kind="llama", tied=False, dtype=torch.float32, **changes):
    config, model, more = CLASSES[kind]
    torch.manual_seed(0)
    model = model(config(**{**SIZE, **more, **changes}, tie_word_embeddings=tied)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def with_lora(model, r=2, alpha=16):
    lora = get_peft_model(
        model, LoraConfig(r=r, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return lora


def write(folder, tensors, form):
    """A checkpoint as a .bin, one safetensors file or shards, with a language model's config beside it."""
    folder.mkdir()
    if form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder / "pytorch_model.bin"
    unique = {k: v.contiguous().clone() for k, v in tensors.items()}
    if form == "safetensors":
        save_file(unique, folder / "model.safetensors")
        return folder / "model.safetensors"
    keys, weight_map = list(unique), {}
    for i in range(3):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file({k: unique[k] for k in keys[i::3]}, folder / name)
        weight_map |= {k: name for k in keys[i::3]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def digest(folder):
    return {
        str(p): hashlib.sha1(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def prune(ckpt, out, *arguments):
    call(prune_llm, "--ckpt", ckpt, "--out-dir", out, *arguments)
    return out


def full_checkpoint(model):
    """The language model inside dia_pangu's: other parts with layers, and a tied second embedding."""
    tensors = {f"lang_model.{k}": v for k, v in model.state_dict().items()}
    tensors["embedding_layer.weight"] = next(
        v for k, v in tensors.items() if k.endswith("embed_tokens.weight")
    )
    for i in range(4):
        tensors[f"embedding_layer.perceiver.layers.{i}.0.to_q.weight"] = torch.full((3, 3), float(i))
        tensors[f"embedding_layer.vision_encoder.transformer.layers.{i}.0.fn.to_qkv.weight"] = torch.full(
            (3, 3), float(i)
        )
    return tensors


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_pruned_on_disk_equals_layers_skipped_to_the_bit(kind, tied, form, tmp_path):
    model = make(kind, tied)
    model.save_pretrained(tmp_path / "hf")
    tensors = dict(model.state_dict())
    if tied and form != "bin":
        tensors.pop("lm_head.weight")  # as transformers saves tied models
    write(tmp_path / "source", tensors, form)
    before = digest(tmp_path / "source")
    words = ["--lang-model-path", tmp_path / "hf", "--drop-layers", "1-2"]
    out = prune(tmp_path / "source", tmp_path / "out", *words)
    pruned = AutoModelForCausalLM.from_pretrained(out / "hf_drop1_2").eval()
    with masked(model, 1, "layer"), masked(model, 2, "layer"):
        assert torch.equal(pruned(IDS).logits, model(IDS).logits)
    with without_layers(model, [1, 2]):
        assert torch.equal(
            pruned.generate(IDS, max_new_tokens=5, do_sample=False),
            model.generate(IDS, max_new_tokens=5, do_sample=False),
        )
    assert pruned.config.num_hidden_layers == 2 and pruned.config.tie_word_embeddings == tied
    assert digest(tmp_path / "source") == before, "the source was modified"


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("form", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("kind", CLASSES)
def test_lora_keeps_its_strength_in_all_three_results(kind, form, tmp_path):
    model = with_lora(make(kind), alpha=16)
    make(kind).save_pretrained(tmp_path / "hf")
    ckpt = write(tmp_path / "source", full_checkpoint(model), form)
    (tmp_path / "source" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": 2}))
    words = ["--lang-model-path", tmp_path / "hf", "--drop-layers", "0,3", "--hf", "both"]
    out = prune(ckpt, tmp_path / "out", *words)
    with without_layers(model, [0, 3]):
        wanted = model(IDS).logits
    merged = next(out.glob("pytorch_model_pruned_drop0_3_merged_clean_v0112_en_cpu*"))
    tensors = {k: e.read() for k, e in shards.open_checkpoint(merged).entries.items()}
    small = with_lora(
        make(kind, num_hidden_layers=2),
        alpha=json.loads((out / "adapter_config.json").read_text())["lora_alpha"],
    )
    small.load_state_dict(
        {k.removeprefix("lang_model."): v for k, v in tensors.items() if k.startswith("lang_model.")},
        strict=True,
    )
    assert torch.equal(small(IDS).logits, wanted)
    for i in range(4):
        assert tensors[f"embedding_layer.perceiver.layers.{i}.0.to_q.weight"].max() == i, (
            "the Perceiver is no part of the decoder"
        )
    adapter = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(out / "hf_drop0_3_adapter"),
        out / "hf_drop0_3_adapter" / "adapter",
    ).eval()
    assert torch.equal(adapter(IDS).logits, wanted)
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(out / "hf_drop0_3").eval()(IDS).logits, wanted, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_tying_are_kept(dtype, tmp_path):
    tensors = full_checkpoint(make(dtype=dtype))
    ckpt = write(tmp_path / "source", tensors, "bin")
    out = prune(ckpt, tmp_path / "out", "--drop-layers", "2")
    merged = torch.load(next(out.glob("pytorch_model_*")), weights_only=True)
    assert {v.dtype for k, v in merged.items() if k.startswith("lang_model")} == {dtype}
    assert (
        merged["embedding_layer.weight"].data_ptr()
        == merged["lang_model.model.embed_tokens.weight"].data_ptr()
    ), "stored twice"
    assert torch.equal(
        merged["lang_model.model.layers.2.mlp.up_proj.weight"],
        tensors["lang_model.model.layers.3.mlp.up_proj.weight"],
    )
    assert not any("layers.3." in k for k in merged if k.startswith("lang_model"))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_a_tied_model_in_another_number_format_keeps_every_tensor_once(form, tmp_path):
    """What is made while it is written lies, one after the other, at one place in memory."""
    model = make(tied=True)
    ckpt = write(tmp_path / "source", model.state_dict(), form)
    model.config.save_pretrained(tmp_path / "source")
    arguments = ["--drop-layers", "1", "--llm-dtype", "float16", "--off-mlp", "2"]
    folder = next(prune(ckpt.parent, tmp_path / "out", *arguments).glob("hf_*"))
    written = shards.open_checkpoint(folder).entries
    assert ("lm_head.weight" in written) == (form == "safetensors")
    old = [0, 2, 3]
    for key, value in model.half().state_dict().items():
        layer = re.search(r"layers\.(\d)\.", key)
        if layer and int(layer[1]) == 1 or key == "lm_head.weight":
            continue
        new = key.replace(layer[0], f"layers.{old.index(int(layer[1]))}.") if layer else key
        wanted = torch.zeros_like(value) if "layers.2.mlp.down_proj" in key else value
        assert torch.equal(written[new].read(), wanted), key


@pytest.mark.parametrize(
    "words, message",
    [
        (["--llm-dtype", "float32"], "--llm-dtype has no effect for a quantized model"),
        (["--off-mlp", "2"], "--off-mlp has no effect for a quantized model"),
        (["--lora-alpha", "16", "--hf", "both"], "LoRA cannot be merged into quantized matrices"),
    ],
)
def test_codes_of_a_quantization_are_not_taken_for_values(words, message, tmp_path):
    lora = "--hf" in words
    model = with_lora(make()) if lora else make()
    make().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "x"}})
    )
    ckpt = write(tmp_path / "source", full_checkpoint(model) if lora else model.state_dict(), "bin")
    with pytest.raises(UserError, match=message):
        prune(ckpt, tmp_path / "out", "--lang-model-path", tmp_path / "hf", "--drop-layers", "1", *words)
    assert not (tmp_path / "out").exists()


def test_values_beyond_a_number_format_are_not_made_infinite(tmp_path):
    model = make(dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 1e6
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(UserError, match="holds 9.99e[+]05, beyond the range of torch.float16"):
        prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1", "--llm-dtype", "float16")
    assert not list((tmp_path / "out").iterdir())


def test_a_quantized_model_is_not_cut_in_width_or_repaired():
    model = make()
    model.config.quantization_config = {"quant_method": "x"}
    with pytest.raises(UserError, match="--method wanda: this model is quantized"):
        refuse_quantized(model, "--method wanda")
    with pytest.raises(UserError, match="--repair linear: this model is quantized"):
        repair.repair_gaps("linear", model, make(), [1], [], [])


def test_several_sets_in_one_call_and_a_plan(tmp_path):
    make().save_pretrained(tmp_path / "hf")
    (tmp_path / "plan.json").write_text(
        json.dumps({"choices": [{"drop_layers": "0"}, {"drop_layers": "1-2"}]})
    )
    out = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "3", "--plan", tmp_path / "plan.json")
    assert {p.name for p in out.glob("hf_*")} == {"hf_drop3_3", "hf_drop0_0", "hf_drop1_2"}
    report = json.loads((out / "prune_layer_map_drop1_2_v0112_en_cpu.json").read_text())
    assert report["layer_id_map"] == {"0": 0, "1": 3} and report["old_layers"] == 4


def test_sets_that_upstream_gives_one_name_do_not_overwrite_each_other(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "hf")
    out = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "0,2", "--drop-layers", "0-2")
    assert {p.name for p in out.glob("hf_*")} == {"hf_drop0_2", "hf_drop0to2"}
    for name, drop in (("hf_drop0_2", [0, 2]), ("hf_drop0to2", [0, 1, 2])):
        with without_layers(model, drop), torch.no_grad():
            assert torch.equal(
                AutoModelForCausalLM.from_pretrained(out / name).eval()(IDS).logits, model(IDS).logits
            )
    with pytest.raises(UserError, match="names two sets"):
        words = ["--drop-layers", "0,2", "--drop-layers", "0-2", "--tag", "a", "--tag", "a"]
        prune(tmp_path / "hf", tmp_path / "x", *words)


def test_a_result_whose_name_begins_alike_is_not_taken_for_this_one(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "hf")
    out = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "0,2,3", "--tag", "drop0_2_3")
    prune(tmp_path / "hf", out, "--drop-layers", "0,2")  # drop0_2
    assert {p.name for p in out.glob("hf_*")} == {"hf_drop0_2_3", "hf_drop0_2"}
    monkeypatch.chdir(out / "hf_drop0_2")
    for place in (out / "hf_drop0_2", "."):
        words = ["--pruned-model-path", str(place), "--texts", "t.txt", "--out", "o"]
        assert train.dropped_layers(train.parse_args(words)) == [0, 2]


def test_large_models_are_sharded_and_load(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "hf")
    out = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1", "--max-shard-gb", "0.00003")
    assert len(list((out / "hf_drop1_1").glob("model-*.safetensors"))) > 2
    with without_layers(model, [1]), torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(out / "hf_drop1_1").eval()(IDS).logits, model(IDS).logits
        )


def test_what_belongs_to_a_model_is_copied_and_other_weights_and_records_are_not(tmp_path):
    make(vocab_size=320).save_pretrained(tmp_path / "hf")
    wanted = ["modeling_x.py", "tokenizer.model.v3", "qwen.tiktoken", "words.txt", "chat_template.jinja"]
    wanted += ["LICENSE", "USE_POLICY.md", "processor_config.json", "additional_chat_templates/rag.jinja"]
    others = [
        "model.onnx",
        "adapter_config.json",
        "flax_model.msgpack.index.json",
        "log.jsonl",
        "params.json",
    ]
    for name in (*wanted, *others):
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_text("{}")
    make_tokenizer(["a text"], 48 + 256).save_pretrained(tmp_path / "hf")
    (tmp_path / "t.txt").write_text("the lung is clear\n")
    folder = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1") / "hf_drop1_1"
    call(prune_width, model=folder, out=tmp_path / "narrow", mlp_ratio=0.5, prompts=tmp_path / "t.txt")
    words = {"texts": tmp_path / "t.txt", "max_steps": 1, "out": tmp_path / "healed"}
    call(train, pruned_model_path=tmp_path / "narrow", accum=1, **words)
    for made in (folder, tmp_path / "narrow", tmp_path / "healed/model"):
        assert {name for name in (*wanted, *others) if (made / name).exists()} == set(wanted), made


@pytest.mark.parametrize("spec", ["5-2", "3-", "-3", "a", "1;2", "1--2", "2-1,0", "0-99999999999"])
def test_bad_layer_lists_are_refused(spec):
    with pytest.raises(UserError, match="--drop-layers"):
        parse_drop_layers(spec)


@pytest.mark.parametrize("layers", [[0], [1, 2, 3, 7], [0, 2, 4], list(range(17, 34))])
def test_layer_lists_survive_being_written(layers):
    assert parse_drop_layers(spec_of(layers)) == layers


def bad_lora_ranks(tensors):
    tensors["lang_model.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"] = (
        torch.zeros(3, 32)
    )


def without_lora(tensors):
    for key in [k for k in tensors if "lora_" in k]:
        del tensors[key]


def lost_layer(tensors):
    for key in [k for k in tensors if ".layers.1." in k and k.startswith("lang_model")]:
        del tensors[key]


@pytest.mark.parametrize(
    "arguments, change, message",
    [
        (["--drop-layers", ""], None, "--drop-layers is empty"),
        (["--drop-layers", "9"], None, "layers 0-3"),
        (["--drop-layers", "0-3"], None, "all 4 layers"),
        (["--drop-layers", "1", "--lang-model-path", "other"], None, "num_hidden_layers is 7"),
        (["--drop-layers", "1", "--lang-model-path", "nowhere"], None, "no config.json"),
        (["--drop-layers", "1", "--tag", "../x"], None, "--tag"),
        (["--drop-layers", "1", "--tag", "a", "--tag", "b"], None, "2 --tag"),
        (["--drop-layers", "1", "--lora-r", "8"], None, "rank 2"),
        (["--drop-layers", "1", "--lora-target-modules", "k_proj"], None, "q_proj,v_proj"),
        (["--drop-layers", "1", "--layer-prefix", "x.layers."], None, "--layer-prefix"),
        (["--drop-layers", "1"], bad_lora_ranks, "ranks differ"),
        (["--drop-layers", "1"], lost_layer, "layer 1 is missing"),
        (["--drop-layers", "1", "--out-dir", "source"], None, "own folder"),
        (["--drop-layers", "1", "--ckpt", "missing.bin"], None, "missing.bin"),
        (["--drop-layers", "1", "--plan", "missing.json"], None, "missing.json"),
        (["--drop-layers", "1"], without_lora, "--lora-alpha has no effect"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(arguments, change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensors = full_checkpoint(with_lora(make()))
    if change:
        change(tensors)
    write(tmp_path / "source", tensors, "bin")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**SIZE, "num_hidden_layers": 7}))
    before = digest(tmp_path)
    with pytest.raises(UserError, match=message):
        prune("source", "out", "--lora-alpha", "16", *arguments)
    assert digest(tmp_path) == before


def adapter_beside(folder):
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")


def adapter_alone(folder):
    (folder / "model.safetensors").unlink()
    with_lora(make()).save_pretrained(folder)


def adapters_inside(folder, model):
    """What peft holds in memory, under the plain model's names."""
    (folder / "model.safetensors").unlink()
    tensors = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")


def adapters_of_two_names(folder):
    model = with_lora(make())
    model.add_adapter("other", model.peft_config["default"])
    adapters_inside(folder, model)


def adapter_of_words(folder):
    adapters_inside(
        folder, get_peft_model(make(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (adapter_beside, "adapter_model.safetensors is an adapter beside the model"),
        (adapter_alone, "holds an adapter without the model"),
        (adapters_of_two_names, "holds several adapters, default and other"),
        (adapter_of_words, "lora_embedding_.* is no matrix of LoRA on a linear module"),
    ],
)
def test_an_adapter_that_would_be_lost_is_refused(change, message, tmp_path):
    make().save_pretrained(tmp_path / "hf")
    change(tmp_path / "hf")
    with pytest.raises(UserError, match=f"{message}.*merge_and_unload"):
        prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1", "--lora-alpha", "16")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_an_adapter_of_another_name_is_merged_too(tmp_path):
    model = with_lora(make(), alpha=16)
    tensors = {k.replace(".default.", ".reports."): v for k, v in full_checkpoint(model).items()}
    ckpt = write(tmp_path / "source", tensors, "bin")
    make().save_pretrained(tmp_path / "hf")
    words = ["--lang-model-path", tmp_path / "hf", "--drop-layers", "1", "--hf", "both", "--lora-alpha", "16"]
    out = prune(ckpt, tmp_path / "out", *words)
    with without_layers(model, [1]):
        wanted = model(IDS).logits
    merged, base = (
        AutoModelForCausalLM.from_pretrained(out / f"hf_drop1_1{end}") for end in ("", "_adapter")
    )
    adapted = PeftModel.from_pretrained(base, out / "hf_drop1_1_adapter/adapter")
    for loaded in (merged, adapted):
        assert torch.allclose(loaded.eval()(IDS).logits, wanted, atol=1e-5)


def test_a_plan_that_names_no_layers_is_named(tmp_path):
    make().save_pretrained(tmp_path / "hf")
    for choices, message in (([], "names no layers"), ([{"drop_layers": "x"}], "plan.json: drop_layers 'x'")):
        (tmp_path / "plan.json").write_text(json.dumps({"choices": choices}))
        with pytest.raises(UserError, match=message):
            prune(tmp_path / "hf", tmp_path / "out", "--plan", tmp_path / "plan.json")


@pytest.mark.parametrize(
    "field, value",
    [("use_rslora", True), ("use_dora", True), ("alpha_pattern", {"q_proj": 8}), ("fan_in_fan_out", True)],
)
def test_lora_of_another_strength_is_refused(field, value, tmp_path):
    ckpt = write(tmp_path / "source", full_checkpoint(with_lora(make(), alpha=16)), "bin")
    settings = {"lora_alpha": 16, "r": 2, "rank_pattern": {}, field: value}
    (tmp_path / "source" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"adapter_config.json: {field} is"):
        prune(ckpt, tmp_path / "out", "--drop-layers", "1")
    assert not (tmp_path / "out").exists()


def test_unknown_alpha_is_asked_for_and_contradictions_are_refused(tmp_path):
    ckpt = write(tmp_path / "source", full_checkpoint(with_lora(make())), "bin")
    with pytest.raises(UserError, match="pass --lora-alpha"):
        prune(ckpt, tmp_path / "out", "--drop-layers", "1")
    (tmp_path / "source" / "adapter_config.json").write_text('{"lora_alpha": 16}')
    with pytest.raises(UserError, match="must agree"):
        prune(ckpt, tmp_path / "out", "--drop-layers", "1", "--lora-alpha", "8")
    report = json.loads(
        next(prune(ckpt, tmp_path / "out", "--drop-layers", "1").glob("prune_layer_map*")).read_text()
    )
    assert report["lora_alpha"] == 16 and report["adapter_config_used"] is True and report["lora_r"] == 2
    with pytest.raises(UserError, match="--overwrite"):
        prune(ckpt, tmp_path / "out", "--drop-layers", "1")


def test_overwriting_leaves_nothing_of_the_earlier_results_of_the_tag(tmp_path):
    ckpt, out = write(tmp_path / "source", full_checkpoint(make()), "bin"), tmp_path / "out"
    make().save_pretrained(tmp_path / "hf")
    first = ["--lang-model-path", tmp_path / "hf", "--hf", "merged", "--tag", "a"]
    prune(ckpt, out, "--drop-layers", "1", *first)
    prune(ckpt, out, "--drop-layers", "3", "--tag", "another")
    kept = digest(out)
    prune(ckpt, out, "--drop-layers", "2-3", "--format", "safetensors", "--tag", "a", "--overwrite")
    left = {p.name for p in out.iterdir()}
    assert "hf_a" not in left and not [name for name in left if "_a_" in name and name.endswith(".bin")]
    assert {n for n in left if "_a_" in n and n.endswith(".safetensors")}
    others = {p: sums for p, sums in kept.items() if "another" in p}
    assert others and others.items() <= digest(out).items(), "other tags stay as they were"


@pytest.mark.parametrize("damage", ["cut", "header", "not a checkpoint", "shard missing", "no tensors"])
def test_damaged_checkpoints_are_named(damage, tmp_path):
    make().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    if damage == "shard missing":
        file.unlink()
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "gone.safetensors"}}'
        )
    else:
        file.write_bytes(
            {
                "cut": content[:-100],
                "header": content[:20],
                "not a checkpoint": b"hello",
                "no tensors": (2).to_bytes(8, "little") + b"{}",
            }[damage]
        )
    with pytest.raises(UserError, match="hf"):
        prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1")
    assert not (tmp_path / "out").exists()


def set_free_disk(monkeypatch, free: float):
    """Make the pruner see `free` bytes of free disk, whatever this machine has."""
    monkeypatch.setattr(prune_llm.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_too_little_disk_is_said_before_writing(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "hf")
    set_free_disk(monkeypatch, 1000)
    with pytest.raises(UserError, match="GB are needed"):
        prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "1")
    assert not (tmp_path / "out").exists()


NO_CHECKPOINTS = [b"root:x:0:0:root:/root:/bin/bash\n", b"", b"PK\x03\x04 cut", bytes(range(256)) * 40, b"{}"]


@pytest.mark.parametrize("content", [*NO_CHECKPOINTS, pickle.dumps({"a": os.system}, 2)])
def test_files_that_are_no_checkpoint_or_would_run_code_are_named(tmp_path, content):
    (tmp_path / "notes.bin").write_bytes(content)
    with pytest.raises(UserError, match="notes.bin"):
        call(inspect_ckpt, tmp_path / "notes.bin")


def test_copying_keeps_bytes_across_blocks_and_holes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 1000)
    values = torch.randn(50_000)
    values[10_000:30_000] = 0
    save_file({"a": values, "b": torch.arange(7), "empty": torch.zeros(0, 3)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    with open(tmp_path / "a.safetensors", "wb") as file:  # the same with a hole where the zeros are
        for start in range(0, len(content), 4096):
            piece = content[start : start + 4096]
            if any(piece):
                file.write(piece)
            else:
                file.seek(4096, os.SEEK_CUR)
    assert (tmp_path / "a.safetensors").read_bytes() == content
    entries = shards.open_checkpoint(tmp_path / "a.safetensors").entries
    shards.write_safetensors(
        tmp_path / "b.safetensors", {"x": entries["a"], "y": entries["b"], "z": entries["empty"]}
    )
    copied = shards.open_checkpoint(tmp_path / "b.safetensors").entries
    assert (
        torch.equal(copied["x"].read(), values)
        and torch.equal(copied["y"].read(), torch.arange(7))
        and copied["z"].shape == (0, 3)
    )
    from safetensors import safe_open

    with safe_open(tmp_path / "b.safetensors", "pt") as file:  # the official reader agrees
        assert torch.equal(file.get_tensor("x"), values)


@torch.no_grad()
def test_narrow_model_equals_the_wide_one_with_the_same_parts_zeroed(tmp_path):
    model, prompts = make(), [{"name": "a", "input_ids": IDS}, {"name": "b", "input_ids": IDS[:, :4]}]
    narrow = make()
    kept = prune_width.prune_width(narrow, prompts, mlp_ratio=0.25, kv_ratio=0.5)
    for i, layer in enumerate(model.model.layers):
        gone = [j for j in range(48) if j not in kept["mlp"][i]]
        layer.mlp.down_proj.weight[:, gone] = 0
        group = [g for g in range(2) if g not in kept["kv"][i]]
        layer.self_attn.o_proj.weight.view(32, 2, 16)[:, group] = 0
    assert torch.allclose(narrow(IDS).logits, model(IDS).logits, atol=1e-5)
    narrow.save_pretrained(tmp_path / "narrow")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow").eval()
    assert torch.equal(loaded(IDS).logits, narrow(IDS).logits)
    assert (
        loaded.config.intermediate_size,
        loaded.config.num_key_value_heads,
        loaded.config.num_attention_heads,
    ) == (36, 1, 2)


@pytest.mark.parametrize("ratios", [(0.005, 0.0), (0.5, 0.1)])
def test_a_ratio_that_removes_nothing_is_refused(ratios):
    with pytest.raises(
        UserError, match="one is too small to remove any of 48 neurons or of 2 key-value heads"
    ):
        prune_width.prune_width(make(), [{"name": "a", "input_ids": IDS}], *ratios)


@torch.no_grad()
def test_importance_finds_the_neurons_and_heads_that_do_nothing():
    model = make()
    dead = torch.arange(0, 48, 4)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, dead] = 0
        layer.self_attn.o_proj.weight.view(32, 2, 16)[:, 1] = 0
    before = model(IDS).logits
    kept = prune_width.prune_width(model, [{"name": "a", "input_ids": IDS}], mlp_ratio=0.25, kv_ratio=0.5)
    assert all(not set(k) & set(dead.tolist()) for k in kept["mlp"]) and kept["kv"] == [[0]] * 4
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)


@torch.no_grad()
def test_padding_has_no_part_in_the_importance():
    model, each = make(), [{"name": "a", "input_ids": IDS}, {"name": "b", "input_ids": IDS[:, :3]}]

    def importance(prompts):
        batch, real = prune_width.calibration_batch(model, prompts)
        with prune_width.Uses({"x": model.model.layers[1].mlp.down_proj.weight}, real) as uses:
            model(**batch)
        return uses.norms["x"]

    assert torch.allclose(importance(each), importance(each[:1]) + importance(each[1:]), rtol=1e-4)


@pytest.mark.parametrize("sparsity, share", [("0.5", 0.5), ("0.25", 0.25), ("2:4", 0.5)])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_zeros_have_the_asked_share_and_shape(method, sparsity, share):
    model = make()
    prune_width.prune_unstructured(model, [{"name": "a", "input_ids": IDS}], method, sparsity)
    for name, parameter in model.named_parameters():
        if re.search("layers.*proj.weight", name):
            zeros = parameter == 0
            assert zeros.float().mean().item() == pytest.approx(share, abs=0.02)
            if sparsity == "2:4":
                assert (zeros.view(len(zeros), -1, 4).sum(-1) == 2).all()
            elif method == "wanda":
                assert (zeros.sum(1) == round(share * zeros.shape[1])).all()
        elif "embed" in name or "lm_head" in name:
            assert not (parameter == 0).any()


@torch.no_grad()
def test_wanda_weighs_by_the_inputs_of_the_pruned_layers_before():
    model, reference = make(num_hidden_layers=2), make(num_hidden_layers=2)
    prune_width.prune_unstructured(model, [{"name": "a", "input_ids": IDS}], "wanda", "0.5")
    for i in range(2):  # by hand: layer by layer, on the inputs that the pruned model produces
        layer, seen = reference.model.layers[i], {}
        hooks = [
            m.register_forward_pre_hook(lambda m, a, n=n, seen=seen: seen.update({n: a[0][0]}))
            for n, m in layer.named_modules()
            if isinstance(m, torch.nn.Linear)
        ]
        reference(IDS)
        for hook in hooks:
            hook.remove()
        for name, inputs in seen.items():
            weight = layer.get_submodule(name).weight
            score = weight.abs() * inputs.norm(dim=0)
            weight[score < score.sort(dim=1).values[:, score.shape[1] // 2][:, None]] = 0
    for a, b in zip(model.parameters(), reference.parameters()):
        assert torch.equal(a == 0, b == 0)


@pytest.mark.slow
def test_counting_pangu_and_its_published_drops(tmp_path, capsys, monkeypatch):
    write_sparse(tmp_path, pangu_shapes())
    if sum(file.stat().st_blocks for file in tmp_path.iterdir()) > 1 << 21:  # of 512 bytes: one of the 16 GB
        pytest.skip(f"the file system of {tmp_path} keeps no holes")
    set_free_disk(monkeypatch, 1e12)  # files with holes take almost none of it
    result = count_params.describe(tmp_path, count_params.parse_args([str(tmp_path)]))["total"]
    assert result["values"] == 8_030_887_936 and result["decoder layers, values"] == 34 * 199_247_872
    matrices = 34 * (199_247_872 - 18_432) + 4096 * 153_376  # without biases and norms; lm_head
    assert result["FLOPs per token at 2048 tokens"] == 2 * matrices + 4 * 34 * 4096 * 2048
    assert result["KV-cache of 2048 tokens, bytes"] == 2 * 34 * 8 * 128 * 2 * 2048
    peak = added_peak_mb(lambda: prune(tmp_path, tmp_path / "out", "--drop-layers", "23-28"))
    assert "14.9%" in capsys.readouterr().out and peak < 1000, "a 16 GB model was read into memory"
    after = shards.open_checkpoint(tmp_path / "out" / "hf_drop23_28").entries
    assert sum(e.numel for e in after.values()) == 6_835_400_704


def test_tools_describe_before_and_after_and_find_leftovers(tmp_path, capsys):
    make().save_pretrained(tmp_path / "hf")
    out = prune(tmp_path / "hf", tmp_path / "out", "--drop-layers", "2-3")
    capsys.readouterr()
    leftovers = ["--check-layer-range", r"layers\.[23]\."]
    call(count_params, tmp_path / "hf", "--compare", out / "hf_drop2_3", *leftovers)
    printed = capsys.readouterr().out
    assert "50.0% less" in printed and "0 keys match" in printed
    call(inspect_ckpt, tmp_path / "hf", "--keys", "2")
    assert "4 layers under model.layers." in capsys.readouterr().out
    pruning_zoo.make("bert", pruning_zoo.ZOO["bert"]).save_pretrained(tmp_path / "bert")
    call(inspect_ckpt, tmp_path / "bert")
    assert "6 layers under bert.encoder.layer." in capsys.readouterr().out, "its config says that it is one"
    with pytest.raises(UserError, match="regular expression"):
        call(count_params, tmp_path / "hf", "--check-layer-range", "(")
    with pytest.raises(UserError, match="--include"):
        call(count_params, tmp_path / "hf", "--include", "nothing")
