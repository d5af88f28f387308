"""Every decoder that transformers knows: pruned on disk and in memory it is the model with layers skipped."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSpeechSeq2Seq,
)

from common.errors import UserError
from common.tiny_llm import make_tokenizer
from pruning import test, train
from pruning.layers import decoder_layers, without_layers
from pruning.pruning_tools import count_params, prune_llm, prune_width, read_back
from pruning.pruning_tools.language_model import find_language_model
from pruning.sensitivity_analyse import layer_sensitivity_scan, scan_methods
from pruning.sensitivity_analyse.layer_mask import masked
from pruning.sensitivity_analyse.layer_sensitivity_scan import fingerprint
from pruning.shorter import picture_layers, quantized_names, shorter_config, shorter_generation
from tests import pruning_zoo
from tests.pruning_zoo import BASE, GPT, LINEAR, REFUSED, ZOO, call

IDS = torch.tensor([[5, 9, 33, 21, 7, 40, 11, 62, 3]])
DROP = [2, 4]
# Their modes for attention and MLP alone do not exist, or the fast methods do not apply: words that say so.
UNSCANNED = {
    "gemma3n_text": "several streams",
    "gemma4_text": "share keys and values",
    "mamba": "no MLP branch",
    "mamba2": "no MLP branch",
    "falcon_mamba": "no MLP branch",
    "zaya": "several streams",
}


@pytest.fixture(autouse=True)
def quiet():
    with read_back.quiet():
        yield


def skipped(model, drop, ids=IDS):
    """Logits with the layers `drop` returning their input."""

    def skip(module, args, kwargs, output):
        states = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, (tuple, list)):
            return states
        # a second state of the tokens came in as the next argument
        further = [
            args[i] if torch.is_tensor(part) and i < len(args) else part for i, part in enumerate(output) if i
        ]
        return type(output)((states, *further))

    hooks = [decoder_layers(model)[i].register_forward_hook(skip, with_kwargs=True) for i in drop]
    try:
        return model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def prune(source, out, drop=DROP, *more):
    spec = ",".join(map(str, drop))
    call(prune_llm, "--ckpt", source, "--out-dir", out, "--drop-layers", spec, *more)
    return next(out.glob("hf_*"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_pruned_on_disk_and_in_memory_equals_layers_skipped(name, tmp_path):
    model = pruning_zoo.make(name, ZOO[name])
    model.save_pretrained(tmp_path / "source")
    wanted = skipped(model, DROP)
    with without_layers(model, DROP):
        assert torch.allclose(model(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5)
    assert torch.equal(skipped(model, DROP), wanted), "the model was not put together again"
    folder = prune(tmp_path / "source", tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    logits = loaded.eval()(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(logits, wanted, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_fast_scans_equal_naive_or_say_why_not(name):
    model = pruning_zoo.make(name, ZOO[name])
    prompt = {"name": "a", "input_ids": IDS}

    def scan(method):
        variants = [v for v in scan_methods.list_variants(model, ["attention", "mlp"]) if v.layer in (1, 5)]
        record = scan_methods.scan_batch(model, [prompt], variants, ("kl",), method)[0]
        return [value for v in record["variants"] for value in (v["kl"], v["nll"])]

    if name in UNSCANNED:
        with pytest.raises(UserError, match=UNSCANNED[name]):
            scan("wavefront")
        return
    naive = scan("naive")
    assert max(naive) > 1e-3, "nothing was masked"
    for method in ("cached", "wavefront"):
        assert scan(method) == pytest.approx(naive, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_configuration_says_is_refused_for_the_true_reason(name, tmp_path):
    settings, reason = REFUSED[name]
    pruning_zoo.make(name, settings).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=reason):
        prune(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists(), "refused, and written"


# ---------------------------------------- models that see pictures

TEXT = {k: v for k, v in BASE.items() if not k.endswith("token_id")}
SIGHT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
)
QWEN = dict(**SIGHT, depth=2, num_heads=4, out_hidden_size=32, embed_dim=32)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
SEEING = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 4},
        "vision_config": {**SIGHT, "model_type": "siglip_vision_model"},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGHT, "model_type": "clip_vision_model", "projection_dim": 32},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**SIGHT, "model_type": "pixtral", "head_dim": 8},
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "model_type": "qwen2_vl_text", "rope_parameters": ROPE},
        "vision_config": {**QWEN, "model_type": "qwen2_vl"},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
        "vision_config": {**QWEN, "model_type": "qwen2_5_vl", "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "model_type": "qwen3_vl_text", "rope_parameters": ROPE},
        "vision_config": {**QWEN, "model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1]},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**SIGHT, "model_type": "internvl_vision", "image_size": [28, 28]},
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGHT, "model_type": "idefics3_vision"},
    },
    "llama4": {
        "text_config": {**TEXT, **pruning_zoo.ZOO["llama4_text"], "model_type": "llama4_text"},
        "vision_config": {
            **SIGHT,
            "model_type": "llama4_vision_model",
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", SEEING)
def test_the_nested_layer_count_of_a_model_that_sees_follows(kind, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SEEING[kind])
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "source")
    folder = prune(tmp_path / "source", tmp_path / "out")
    loaded, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"] == 4
    logits = loaded.eval()(input_ids=IDS, use_cache=False).logits
    assert torch.allclose(logits, skipped(model, DROP), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("named", [None, ["LlavaOfSomeoneElse"]])
def test_a_model_whose_class_is_not_named_is_of_the_kind_that_takes_its_configuration(named, tmp_path):
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **SEEING["llava"])).eval()
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": named}))
    loaded = AutoModelForImageTextToText.from_pretrained(prune(tmp_path / "source", tmp_path / "out")).eval()
    assert torch.allclose(loaded(input_ids=IDS).logits, skipped(model, DROP), atol=1e-5)
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["CLIPTextModel"]}))
    with pytest.raises(UserError, match="config.json is refused by its class"):
        prune(tmp_path / "source", tmp_path / "again")


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_a_model_that_sees_is_scanned_healed_and_tested_on_texts(kind, tmp_path):
    settings = {**SEEING[kind], "text_config": {**SEEING[kind]["text_config"], "vocab_size": 320}}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings))
    tokenizer = make_tokenizer(["the lung is clear"], 300)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "source")
    (tmp_path / "t.txt").write_text("the lung is clear\nthe heart is of normal size\n")
    out, texts = {"out": tmp_path / "s.csv"}, {"texts": tmp_path / "t.txt"}
    call(
        layer_sensitivity_scan, "--sanity-check", model=tmp_path / "source", prompts=tmp_path / "t.txt", **out
    )
    folder = prune(tmp_path / "source", tmp_path / "out")
    call(
        train, pruned_model_path=folder, **texts, max_steps=1, accum=1, batch_size=1, out=tmp_path / "healed"
    )
    call(test, pruned_model_path=tmp_path / "healed/model", **texts, out_dir=tmp_path)
    scores = json.loads((tmp_path / "llm_model_scores.json").read_text())
    assert scores["layers"] == 4 and scores["perplexity"] > 1


@torch.no_grad()
def test_a_tower_as_high_as_the_decoder_is_not_taken_for_it(tmp_path):
    settings = {"encoder_config": {"num_layers": 6, "hidden_dim": 32, "num_heads": 4, "output_dim": 8}}
    settings["projector_config"] = {
        "model_type": "blip_2_qformer",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "encoder_hidden_size": 32,
    }
    config = AutoConfig.for_model("granite_speech", **settings, text_config={**TEXT, "model_type": "granite"})
    model = AutoModelForSpeechSeq2Seq.from_config(config).eval()
    model.save_pretrained(tmp_path / "source")
    folder = prune(tmp_path / "source", tmp_path / "out")
    loaded = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    wanted = skipped(model, DROP)
    with without_layers(model, DROP):
        assert torch.allclose(model(input_ids=IDS).logits, wanted, atol=1e-5)
    assert torch.allclose(loaded(input_ids=IDS).logits, wanted, atol=1e-5)
    assert not torch.equal(model(input_ids=IDS).logits, wanted)


def test_layers_that_features_of_pictures_are_added_to_stay(tmp_path):
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen3_vl", **SEEING["qwen3_vl"]))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=r"layer 1: features .* layers 0, 1 \(deepstack_visual_indexes\)"):
        prune(tmp_path / "source", tmp_path / "out", [1, 4])


def test_layers_that_pictures_name_by_number_follow_or_stay():
    """Granite 4 Vision's two fields: layers, and pairs of the encoder's and the decoder's."""
    config = {"spatial_target_layers": [0, 5], "deepstack_layer_map": [[2, 1], [0, 3]], "vision_config": {}}
    wanted = {"spatial_target_layers": [0, 3], "deepstack_layer_map": [[2, 1], [0, 2]]}
    assert picture_layers(config, [0, 1, 3, 5], 6) == wanted
    for gone, name in ((5, "spatial_target_layers"), (3, "deepstack_layer_map")):
        with pytest.raises(UserError, match=f"layer {gone}: features of pictures .*{name}"):
            picture_layers(config, [i for i in range(6) if i != gone], 6)


# ---------------------------------------- fields and names that number layers


@pytest.mark.parametrize(
    "before, after",
    [
        ("lm_head", "lm_head"),
        ("model.layers.2.mlp.down_proj", None),
        ("model.layers.3.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        ("model.layers.5", "model.layers.3"),
        (r"re:.*layers\.3\..*", r"re:.*layers\.2\..*"),
        (r"re:.*layers\.[35]\..*", r"re:.*layers\.(2|3)\..*"),
        (r"re:.*layers\.(0|2)\.mlp.*", r"re:.*layers\.0\.mlp.*"),
        (r"re:.*layers\.\d+\.mlp.*", r"re:.*layers\.\d+\.mlp.*"),
        (r"re:.*layers\.[0-9]+\.mlp.*", r"re:.*layers\.[0-9]+\.mlp.*"),
        (r"-:model\.layers\.4\..*", None),
        ("transformer.h.1.attn", "transformer.h.1.attn"),
        ("transformer.h.11.attn", None),
        # names of other modules that are numbered
        ("visual.blocks.3.attn.qkv", "visual.blocks.3.attn.qkv"),
        ("model.vision_tower.encoder.layers.2.mlp.fc1", "model.vision_tower.encoder.layers.2.mlp.fc1"),
        ("model.language_model.layers.3.mlp.up_proj", "model.language_model.layers.2.mlp.up_proj"),
        ("mtp.layers.2.mlp.gate", "mtp.layers.2.mlp.gate"),
        # ModelOpt's stars, and counts of digits
        ("model.layers.3*", "model.layers.2*"),
        ("model.layers.5.self_attn*", "model.layers.3.self_attn*"),
        (r"re:.*layers\.\d{1,2}\.mlp.*", r"re:.*layers\.\d{1,2}\.mlp.*"),
        (r"re:.*layers\.(?!3\.)\d+\.mlp.*", r"re:.*layers\.(0|1|3)\.mlp.*"),
        (r"re:.*layers\.(1|(2|3))\.mlp.*", r"re:.*layers\.(1|2)\.mlp.*"),
        # GPTQModel's, which leave out the word, and AutoRound's, which join names
        (r"+:.*\.3\..*gate.*", r"+:.*\.2\..*gate.*"),
        (r"-:.*\.(?:2|5)\..*", r"-:.*\.3\..*"),
        (r"-:.*\.4\..*", None),
        (r"-:.*\.(?:q|k)_proj.*", r"-:.*\.(?:q|k)_proj.*"),
        (r"re:.*\.(gate|up)\..*", r"re:.*\.(gate|up)\..*"),
        # several names in one expression
        (r"re:.*layers\.3\.mlp.*|.*layers\.5\..*", r"re:.*layers\.2\.mlp.*|.*layers\.3\..*"),
        (
            r"re:(.*layers\.4\..*|.*layers\.3\.mlp\.experts\..*\.2\..*)",
            r"re:(.*layers\.(?!)\..*|.*layers\.2\.mlp\.experts\..*\.2\..*)",
        ),
        (r"re:vision.layers\.3\..*|model.layers\.3\..*", r"re:vision.layers\.3\..*|model.layers\.2\..*"),
        (r"re:lm_head|.*layers\.2\..*", r"re:lm_head|.*layers\.(?!)\..*"),
        ("model.layers.1,model.layers.2,model.layers.3", "model.layers.1,model.layers.2"),
    ],
)
def test_names_of_a_quantization_follow_their_layers(before, after):
    keep = [0, 1, 3, 5]
    wanted = [] if after is None else [after]
    assert quantized_names([before], keep, 6) == wanted
    assert quantized_names({before: {"bits": 4}}, keep, 6) == dict.fromkeys(wanted, {"bits": 4})


def test_a_quantization_that_names_layers_is_written_for_the_new_ones(tmp_path):
    pruning_zoo.make("llama", {}).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    ignore = ["lm_head", "model.layers.3.mlp.down_proj"]
    config["quantization_config"] = {"quant_method": "compressed-tensors", "ignore": ignore}
    file.write_text(json.dumps(config))
    modelopt = {"quantization": {"exclude_modules": ["lm_head", "model.layers.3*", "model.layers.4*"]}}
    (tmp_path / "source" / "hf_quant_config.json").write_text(json.dumps(modelopt))
    folder = prune(tmp_path / "source", tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert written == ["lm_head", "model.layers.2.mlp.down_proj"]
    beside = json.loads((folder / "hf_quant_config.json").read_text())
    assert beside == {"quantization": {"exclude_modules": ["lm_head", "model.layers.2*"]}}


def test_names_of_layers_that_predict_further_tokens_stay_behind_the_last():
    names = ["model.layers.5.mlp.gate", "model.layers.6.eh_proj", "model.layers.7.mlp.gate"]
    config = {"model_type": "glm4_moe", **BASE, "num_nextn_predict_layers": 1}
    for key in ("quantization_config", "compression_config"):
        written = shorter_config({**config, key: {"ignore": names}}, [0, 1, 3, 5])
        assert written[key] == {"ignore": ["model.layers.3.mlp.gate", "model.layers.4.eh_proj"]}


def test_derived_types_are_written_down_where_the_file_leaves_them_to_the_class():
    config = {"model_type": "gemma2", **BASE, "num_hidden_layers": 6}
    kinds = AutoConfig.for_model("gemma2", **BASE).layer_types
    assert shorter_config(config, [1, 3, 5])["layer_types"] == [kinds[i] for i in (1, 3, 5)]
    assert shorter_config({**config, "layer_types": None}, [1, 3])["layer_types"] == [
        kinds[i] for i in (1, 3)
    ]


@pytest.mark.parametrize(
    "field, before, after",
    [
        ("layer_rope_theta", [1e4, 0, 100, 0, 1e4, 1e3], [1e4, 0, 0, 1e3]),
        ("rope_theta", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 4.0, 6.0]),  # Step's, one for each layer
        ("no_rope_layers", [1, 0, 1, 1, 0, 0, 7, 8], [1, 0, 1, 0, 7, 8]),
        ("moe_layers_enum", "1,2,3,6", "1,2,4"),  # 6 predicts further tokens
        ("moe_layers", [1, 2, 3, 6], [1, 2, 4]),
        ("nope_layers", [1, 3, 4], [1, 2]),  # a name that no class has
        ("layer_sizes", [3, 1, 2], [3, 1, 2]),
        ("head_dims", {str(i): i + 8 for i in range(6)}, {"0": 8, "1": 9, "2": 11, "3": 13}),
        ("vision_feature_layers", [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
        (
            "linear_attn_config",  # Kimi's, whose layers count from 1
            {"full_attn_layers": [3, 6], "kda_layers": [1, 2, 4, 5]},
            {"full_attn_layers": [4], "kda_layers": [1, 2, 3]},
        ),
    ],
)
def test_every_way_to_number_layers_follows(field, before, after):
    config = {"model_type": "own_code", "num_hidden_layers": 6, "num_nextn_predict_layers": 1, field: before}
    assert shorter_config(config, [0, 1, 3, 5])[field] == after


def test_a_number_of_layers_under_a_name_of_its_class_follows():
    text = {"model_type": "kosmos_2_text_model", "layers": 6, "embed_dim": 32, "attention_heads": 4}
    written = shorter_config({"model_type": "kosmos-2", "text_config": text}, [0, 3])
    assert written["text_config"]["layers"] == 2


def test_how_to_generate_follows_the_layers_that_it_names():
    config = {"assistant_early_exit": 4, "dola_layers": [0, 1, 3, 6], "do_sample": True, "num_beams": 1}
    wanted = {"assistant_early_exit": 3, "dola_layers": [0, 1, 4], "do_sample": True, "num_beams": 1}
    assert shorter_generation(config, [0, 1, 3, 5]) == wanted
    assert shorter_generation({"assistant_early_exit": 2, "dola_layers": [2]}, [3, 5]) == {}


def test_of_several_towers_the_one_is_the_decoder_whose_layers_are_counted():
    keys = [f"model.sam_model.blocks.{i}.attn.qkv.weight" for i in range(2)]
    keys += [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(6)]
    assert find_language_model(keys, config={"num_hidden_layers": 6}).prefix == "model.layers."
    with pytest.raises(UserError, match="several decoders; choose one with --layer-prefix"):
        find_language_model(keys)


def test_lists_that_number_no_layers_stay_whatever_their_length():
    config = {"model_type": "llama", **BASE, "eos_token_id": [1, 2, 3, 4, 5, 6], "architectures": ["x"] * 6}
    shorter = shorter_config(config, [0, 5])
    assert shorter["eos_token_id"] == [1, 2, 3, 4, 5, 6] and shorter["architectures"] == ["x"] * 6
    assert shorter["num_hidden_layers"] == 2
    # two ends of a time step, a multiplier for each of five parts
    parts = {"mlp_multipliers": [1.0, 2.0], "ssm_multipliers": [1.0] * 5, "time_step_limit": [0.0, 1.0]}
    for name, count in (("mamba2", 2), ("falcon_h1", 2), ("falcon_h1", 5)):
        own = {part: value for part, value in parts.items() if name == "falcon_h1" or part[0] == "t"}
        written = shorter_config({"model_type": name, **BASE, "num_hidden_layers": count, **own}, [1])
        assert {part: written[part] for part in own} == own


@torch.no_grad()
def test_layers_that_predict_further_tokens_are_kept_behind_the_last(tmp_path):
    model = pruning_zoo.make("glm4_moe", ZOO["glm4_moe"])
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    ahead = {k.replace("layers.5.", "layers.6."): v.clone() for k, v in tensors.items() if "layers.5." in k}
    save_file({**tensors, **ahead}, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    folder = prune(tmp_path / "source", tmp_path / "out")
    written = load_file(folder / "model.safetensors")
    for key, value in ahead.items():
        assert torch.equal(written[key.replace("layers.6.", "layers.4.")], value)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(loaded(input_ids=IDS).logits, skipped(model, DROP), atol=1e-5)


def test_a_model_that_transformers_does_not_know_needs_a_word(tmp_path):
    pruning_zoo.make("llama", {}).save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own_code"}))
    with pytest.raises(UserError, match="does not know model_type 'own_code'"):
        prune(tmp_path / "source", tmp_path / "out")
    folder = prune(tmp_path / "source", tmp_path / "out", DROP, "--unchecked")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_tensors_outside_the_layers_that_number_them_are_no_strangers(tmp_path, monkeypatch):
    """The class would take those of the first layers, and have no place for the last."""
    model = pruning_zoo.make("inkling2_text", {**ZOO["inkling2_text"], "layer_types": ["hybrid_sliding"] * 6})
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(prune_llm, "OF_LAYER", {})
    with pytest.raises(UserError, match="query has no place in it"):
        prune(tmp_path / "source", tmp_path / "out")


def test_what_is_written_is_read_back_before_it_is_there(tmp_path, monkeypatch):
    pruning_zoo.make("llama", {}).save_pretrained(tmp_path / "source")
    original = prune_llm.plain_entries

    def one_lost(*args):
        weights, adapter = original(*args)
        return {k: v for k, v in weights.items() if "layers.3.mlp.up_proj" not in k}, adapter

    monkeypatch.setattr(prune_llm, "plain_entries", one_lost)
    with pytest.raises(UserError, match="model.layers.3.mlp.up_proj.weight is missing"):
        prune(tmp_path / "source", tmp_path / "out")
    assert not list((tmp_path / "out").glob("hf_*"))


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_names_of_a_quantized_folder_are_read_back_and_codes_are_no_values(nested, tmp_path, monkeypatch):
    """Tiny FP8, as the class of its configuration takes it, or named in the decoder's own part."""
    kind = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    config = (
        AutoConfig.for_model("llava", **SEEING["llava"]) if nested else AutoConfig.for_model("llama", **BASE)
    )
    kind.from_config(config).save_pretrained(tmp_path / "source")
    file = tmp_path / "source/model.safetensors"
    tensors = load_file(file)
    prefix = next(
        key.split("layers.")[0] for key in tensors if "self_attn.q_proj" in key and "vision" not in key
    )
    for key in [
        k for k in tensors if k.startswith(prefix + "layers.") and "proj" in k and "layers.1." not in k
    ]:
        scale = tensors[key].abs().max() / 448
        tensors[key + "_scale_inv"] = scale.reshape(1, 1)
        tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / "source/config.json").read_text())
    whole = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    whole["modules_to_not_convert"] = [
        "lm_head",
        "vision_tower",
        "multi_modal_projector",
        f"{prefix}layers.1",
    ]
    (settings["text_config"] if nested else settings)["quantization_config"] = whole
    (tmp_path / "source/config.json").write_text(json.dumps(settings))

    folder = prune(tmp_path / "source", tmp_path / "out")
    model, loaded = (
        kind.from_pretrained(path, dtype=torch.float32).eval() for path in (tmp_path / "source", folder)
    )
    assert torch.equal(loaded(input_ids=IDS).logits, skipped(model, DROP))
    with pytest.raises(UserError, match="--llm-dtype has no effect for a quantized model"):
        prune(tmp_path / "source", tmp_path / "other", DROP, "--llm-dtype", "bfloat16")

    original, own = prune_llm.plain_entries, f"{prefix}layers.3.mlp.up_proj.weight_scale_inv"
    lost = "layers.3.mlp.up_proj.weight_scale_inv of the source is lost"

    def another(name, *args):
        weights, adapter = original(*args)
        moved = [(name if key == own else key, entry) for key, entry in weights.items()]
        return {key: entry for key, entry in moved if key}, adapter

    for name, more in ((None, ";"), (own.replace("up_", "upper_"), ", and 1 more;")):
        monkeypatch.setattr(prune_llm, "plain_entries", partial(another, name))
        with pytest.raises(UserError, match=lost + more):
            prune(tmp_path / "source", tmp_path / "wrong")
        assert not list((tmp_path / "wrong").glob("hf_*"))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_bigcode", "qwen3_next", "diffllama", "opt"])
def test_with_v_off_attention_returns_the_projection_of_nothing(name):
    settings = {"gpt2": {**GPT, "scale_attn_weights": True}, "diffllama": {}, "qwen3_next": {**LINEAR}}
    model = pruning_zoo.make(name, settings.get(name, ZOO.get(name, {})))
    variants = [v for v in scan_methods.list_variants(model, ["v"]) if v.mode == "v"]
    prompt = {"name": "a", "input_ids": IDS}
    naive, fast = (
        [v["kl"] for v in scan_methods.scan_batch(model, [prompt], variants, ("kl",), method)[0]["variants"]]
        for method in ("naive", "wavefront")
    )
    assert fast == pytest.approx(naive, rel=1e-4) and min(naive) > 0


# ---------------------------------------- branches and experts


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt", "bloom", "bert"])
def test_a_branch_that_is_off_on_disk_is_off_for_everyone(name, part, tmp_path):
    model = pruning_zoo.make(name, ZOO[name])
    model.save_pretrained(tmp_path / "source")
    with masked(model, 3, part):
        wanted = skipped(model, [1])
    folder = prune(tmp_path / "source", tmp_path / "out", [1], f"--off-{part}", "3")
    assert folder.name == f"hf_drop1_1_off{part}3"
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(loaded(input_ids=IDS, use_cache=False).logits, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--off-mlp", "2"], "layer 2 is dropped"),
        (["--off-mlp", "9"], "--off-mlp 9: the model has layers 0-5"),
        (["--off-attention", "5-3"], "--off-attention '5-3': the range 5-3 descends"),
    ],
)
def test_branches_that_are_not_there_are_refused(words, message, tmp_path):
    pruning_zoo.make("llama", {}).save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        prune(tmp_path / "source", tmp_path / "out", DROP, *words)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_an_expert_that_is_removed_is_the_one_that_does_nothing(name, tmp_path):
    model = pruning_zoo.make(name, ZOO[name])
    for key, p in model.named_parameters():
        if key.endswith(("experts.down_proj", "experts.down_proj_bias")):
            p[[0, 2]] = 0
    every_word = torch.arange(3, 63)[None]  # an expert that no token chooses writes nothing either
    kept = prune_width.prune_experts(model, [{"name": "a", "input_ids": every_word}], 0.5)
    assert kept and all(some == [1, 3] for some in kept)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-5)


def test_experts_that_cannot_go_are_refused():
    prompt = [{"name": "a", "input_ids": IDS}]
    with pytest.raises(UserError, match="1 of 4 experts would be left, a token is sent to 2"):
        prune_width.prune_experts(pruning_zoo.make("mixtral", ZOO["mixtral"]), prompt, 0.75)
    with pytest.raises(UserError, match="too small to remove any of 4 experts"):
        prune_width.prune_experts(pruning_zoo.make("mixtral", ZOO["mixtral"]), prompt, 0.1)
    with pytest.raises(UserError, match="no one number of stacked experts"):
        prune_width.prune_experts(pruning_zoo.make("llama", {}), prompt, 0.5)


# ---------------------------------------- zeros and numbers


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3_moe", "gpt_oss", "phi3", "bloom"])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_every_matrix_that_a_layer_multiplies_with_gets_the_asked_zeros(name, sparsity, method):
    model = pruning_zoo.make(name, ZOO[name])
    prompts = [{"name": str(n), "input_ids": IDS[:, :n]} for n in (9, 5)]
    prune_width.prune_unstructured(model, prompts, method, sparsity)
    for key, parameter in decoder_layers(model).named_parameters():
        if parameter.dim() in (2, 3) and not key.endswith("bias"):
            assert (parameter == 0).float().mean().item() == pytest.approx(0.5, abs=0.02), key
    zeros, weights = prune_width.check_share(model, sparsity)
    assert zeros / weights == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
def test_a_share_that_was_not_reached_is_said_and_nothing_is_written():
    model = pruning_zoo.make("llama", {})
    for layer in decoder_layers(model):
        layer.self_attn.q_proj.weight.zero_()
    with pytest.raises(UserError, match="of the layers' weights are zero.*nothing is written"):
        prune_width.check_share(model, "0.5")
    with pytest.raises(UserError, match="--sparsity 0.01: is too small to make any weight zero"):
        prune_width.check_share(pruning_zoo.make("llama", {}), "0.01")


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoehybrid"])
def test_padding_has_no_part_in_what_an_expert_is_judged_by(name):
    alone, padded = (pruning_zoo.make(name, ZOO[name]) for _ in range(2))
    short = {"name": "a", "input_ids": IDS[:, :5]}
    prune_width.prune_unstructured(alone, [short, short], "wanda", "0.5")
    real = prune_width.calibration_batch

    def longer(model, prompts):
        batch, mask = real(model, prompts)
        more = torch.zeros(len(mask), 4, dtype=torch.long)
        return {"input_ids": torch.cat([batch["input_ids"], more], 1)}, torch.cat([mask, more.bool()], 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_width, "calibration_batch", longer)
        prune_width.prune_unstructured(padded, [short, short], "wanda", "0.5")
    for a, b in zip(alone.parameters(), padded.parameters()):
        assert torch.equal(a == 0, b == 0)


def counted(folder, name, settings) -> dict:
    """What count_params.py finds in a tiny model, at 16 tokens."""
    pruning_zoo.make(name, settings).save_pretrained(folder)
    return count_params.describe(folder, count_params.parse_args([str(folder), "--context", "16"]))["total"]


def test_flops_of_experts_and_the_cache_of_latent_attention(tmp_path):
    mixtral, latent = (counted(tmp_path / name, name, ZOO[name]) for name in ("mixtral", "deepseek_v2"))
    attention, expert = 32 * 8 * (4 + 2 + 2 + 4), 3 * 32 * 48
    active = 6 * (attention + 32 * 4 + 2 * expert) + 96 * 32
    assert mixtral["FLOPs per token at 16 tokens"] == 2 * active + 6 * 4 * 4 * 8 * 16
    assert latent["KV-cache of 16 tokens, bytes"] == 6 * (8 + 4) * 4 * 16


@torch.no_grad()
@pytest.mark.parametrize("name", ["bloom", "deepseek_v3", "mimo_v2_flash", "mixtral", "opt"])
def test_flops_and_cache_are_those_of_a_pass(name, tmp_path):
    model, ids = pruning_zoo.make(name, ZOO[name]), torch.arange(3, 19)[None]
    model.set_attn_implementation("eager")
    prune_width.show_experts(model)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    found = counted(tmp_path, name, ZOO[name])
    assert found["FLOPs per token at 16 tokens"] == pytest.approx(counter.get_total_flops() / 16, rel=0.01)
    if name not in (
        "bloom",
        "deepseek_v3",
    ):  # a stray field counts heads; transformers keeps no latent vector
        past = model(input_ids=ids, use_cache=True).past_key_values
        kept = sum(part.nbytes for layer in past.layers for part in (layer.keys, layer.values))
        assert found["KV-cache of 16 tokens, bytes"] == kept


@pytest.mark.parametrize(
    "name, kept",
    [
        ("mamba2", 0),
        ("nemotron_h", 2 * 2 * 2 * 8),  # two of its six layers attend: keys and values, two heads of 8
        # two of six borrow; a window of 4 in half of the rest, heads of 512 in the other
        ("gemma4_text", 2 * 4 * 2 * 2 * 8 + 2 * 16 * 2 * 2 * 512),
        ("llama4_text", (4 * 4 + 2 * 16) * 2 * 2 * 8),  # pieces of 4 tokens in four of six
        ("jetmoe", None),
    ],
)
def test_layers_without_keys_cost_no_cache_and_stacked_experts_count_once(name, kept, tmp_path):
    found = counted(tmp_path, name, ZOO[name])
    if kept is not None:
        tokens = 16 if name == "nemotron_h" else 1
        assert found["KV-cache of 16 tokens, bytes"] == 4 * kept * tokens
    else:
        model = pruning_zoo.make(name, ZOO[name])
        stacked = sum(p.numel() for p in decoder_layers(model).parameters() if p.dim() == 3)
        flat = sum(p.numel() for p in decoder_layers(model).parameters() if p.dim() == 2)
        scores = 6 * 2 * 4 * 8 * 16
        wanted = 2 * (flat + stacked // 2 + 96 * 32) + 2 * scores
        assert found["FLOPs per token at 16 tokens"] == pytest.approx(wanted, rel=0.05)


def test_a_pruned_model_is_counted_by_its_own_kinds_of_layers(tmp_path, capsys):
    whole = counted(tmp_path / "whole", "gemma2", ZOO["gemma2"])
    pruning_zoo.call(
        prune_llm, "--ckpt", tmp_path / "whole", "--out-dir", tmp_path / "out", "--drop-layers", "0-1"
    )
    words = [tmp_path / "out/hf_drop0_1", "--context", "16", "--config", tmp_path / "whole"]
    found = count_params.describe(words[0], count_params.parse_args([*map(str, words)]))["total"]
    name = "KV-cache of 16 tokens, bytes"
    assert found[name] == whole[name] * 4 // 6  # one of the windows, and one layer without

    # a model without a cache has nothing to compare there
    counted(tmp_path / "mamba", "mamba", ZOO["mamba"])
    pruning_zoo.call(count_params, tmp_path / "mamba", "--compare", tmp_path / "mamba")
    assert "0.0% less" in capsys.readouterr().out


def test_a_mixture_may_count_its_experts_layer_by_layer():
    assert count_params.active_experts({"num_experts": 8, "moe_topk": [2, 2]}) == (8, 0.25)


@torch.no_grad()
def test_a_fingerprint_sees_every_value_and_its_place():
    model = pruning_zoo.make("llama", {})
    before = fingerprint(model)
    weight = decoder_layers(model)[3].mlp.up_proj.weight
    weight[-1, -1] += 1e-3
    changed = fingerprint(model)
    weight[-1, -1] -= 1e-3
    weight[[0, 1]] = weight[[1, 0]]
    assert len({before, changed, fingerprint(model)}) == 3
