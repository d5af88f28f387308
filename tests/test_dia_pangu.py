"""dia_pangu on tiny models: what the golden files do not cover."""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu.evaluate.evidence import locate
from dia_pangu.make_data import draw_findings, phantom, save_nifti
from dia_pangu.src import test as report_script
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, patch_labels, read_hu, resample
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL, ReportText, prompt_phrases, status_text
from dia_pangu.src.Model.build import build_model, load_model, load_start, make_text, save_model
from dia_pangu.src.Model.multimodality_model import NEVER_TRAINED, TRAINED, MultiPanguForCausalLM, add_lora, load_language_model, token_loss
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding, lookup
from dia_pangu.src.Model.pangu import load_tokenizer
from dia_pangu.src.test import report_batch

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"embedding": {"perceiver_num": 3, "vis_dim": 24, "patch_size": 8, "frame_patch_size": 4, "n_tok": 16,
                       "vit": {"image_size": 16, "frames": 16, "depth": 1, "heads": 2, "dim_head": 8, "mlp_dim": 32, "dropout": 0.0,
                               "emb_dropout": 0.0}, "perceiver": {"depth": 1, "heads": 2, "dim_head": 8}},
         "grid": {"size": [16, 16, 16], "fov_mm": [384.0, 384.0, 320.0], "preprocess": "windows"}, "language": "en",
         "max_length": 512, "lora": None, "thresholds": [0.5] * 14}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dia_data")
    result = python(ROOT / "dia_pangu" / "make_data.py", "--out", folder, "--train", 8, "--val", 3, "--test", 4)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dia_llm") / "model"
    texts = [status_text([i % 2] * 14, language) for i in range(4) for language in ("en", "cn")]
    make_llm(folder, make_tokenizer(texts, 420), "PanguEmbedded", hidden_size=32, intermediate_size=48, num_attention_heads=4,
             num_key_value_heads=2, bias=True, rope_theta=16000000.0, max_position_embeddings=1024)
    return folder


@pytest.fixture()
def model_text(llm):
    torch.manual_seed(0)
    return build_model(json.loads(json.dumps(SMALL)), llm)


# Model.

def test_lookup_differs_from_the_one_hot_product():
    generator = torch.Generator().manual_seed(0)
    weight, extra = torch.randn(50, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    ids = torch.randint(0, 57, (2, 30), generator=generator)
    table = torch.cat((weight.expand(2, -1, -1), extra), dim=1)
    assert torch.equal(lookup(weight, extra, ids), F.one_hot(ids, 57).float() @ table)


def test_an_id_without_row_is_taken_silently():
    with pytest.raises(ValueError, match="id 57 has no row"):
        lookup(torch.zeros(50, 8), torch.zeros(1, 7, 8), torch.tensor([[57]]))


def test_one_bad_row_of_the_table_spoils_other_tokens():
    weight = torch.zeros(4, 3)
    weight[3] = float("nan")
    assert torch.isfinite(lookup(weight, torch.ones(1, 2, 3), torch.tensor([[0, 1, 4]]))).all()


def test_batch_order_or_size_changes_a_sample(model_text):
    model, text = model_text
    model.eval()
    volumes = torch.rand(3, 1, 3, 16, 16, 64, generator=torch.Generator().manual_seed(1))[..., :16]
    together = model.diagnose(model.encode(volumes))
    alone = torch.cat([model.diagnose(model.encode(volumes[i:i + 1])) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_several_volumes_per_sample_are_no_mean_over_volumes(model_text):
    layer = model_text[0].embedding_layer.eval()
    volumes = torch.rand(2, 3, 3, 16, 16, 16)
    tokens = layer.encode(volumes)
    assert tokens.shape == (2, 3, 16, 24)
    each = torch.stack([layer.finding_features(tokens[:, s:s + 1]) for s in range(3)], 1)
    assert torch.allclose(layer.finding_features(tokens), each.mean(1), atol=1e-6)
    assert layer(text_input=torch.tensor([[0, layer.weight.shape[0] + 2 + 8]] * 2), tokens=tokens).shape == (2, 2, 32)


def test_a_volume_of_another_size_than_trained_is_accepted(model_text):
    with pytest.raises(ValueError, match="prototypes are made for 16"):
        model_text[0].encode(torch.zeros(1, 1, 3, 16, 16, 8))


def test_the_trained_tensors_of_a_stage_are_others(model_text, llm):
    model, _ = model_text
    names = model.set_trained(TRAINED["pre"])
    expected = {name for name, _ in model.named_parameters() if name.startswith("embedding_layer.perceiver.")}
    assert set(names) == expected and "embedding_layer.perceiver.latents" in names
    with_lora = MultiPanguForCausalLM(add_lora(load_language_model(llm)), model.embedding_layer)
    names = set(with_lora.set_trained(TRAINED["ft"]))
    everything = {name for name, _ in with_lora.named_parameters()}
    wanted = {n for n in everything if "lora_" in n or (
        n.startswith("embedding_layer.") and "group_cls_head" not in n and n != "embedding_layer.weight")}
    assert names == wanted
    assert {n for n in names if "lora_" in n} == {
        f"lang_model.base_model.model.model.layers.{i}.self_attn.{p}.lora_{ab}.default.weight"
        for i in range(2) for p in ("q_proj", "v_proj") for ab in "AB"}
    assert not any(any(never in name for never in NEVER_TRAINED) for name in names)


def test_frozen_parts_run_with_dropout(llm):
    config = json.loads(json.dumps(SMALL))
    config["embedding"]["vit"]["dropout"] = 0.5
    model, _ = build_model(config, llm)
    model.set_trained(TRAINED["pre"])
    model.train()
    assert not model.embedding_layer.vision_encoder.transformer.layers[0][1].fn.net[2].training
    assert model.embedding_layer.perceiver.training


def test_loss_of_a_batch_differs_from_its_accumulated_parts(model_text, data):
    model, text = model_text
    model.set_trained(TRAINED["ft"])
    model.eval()
    samples = [CTRGDataset(data, "train", Grid((16, 16, 16)), text)[i] for i in range(4)]
    keys = ("lang_x", "vision_x", "cls_labels", "attention_mask", "labels")
    whole = collate(samples)
    loss = model(**{key: whole[key] for key in keys})["loss"]
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    totals = {"num_tokens": (whole["labels"][:, 1:] != -100).sum(), "num_samples": 4}
    parts = 0
    for sample in samples:
        batch = collate([sample])
        part = model(**{key: batch[key] for key in keys}, **totals)["loss"]
        part.backward()
        parts += part.detach()
    assert parts.item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-5), name


def test_padding_changes_the_generated_report(model_text):
    model, text = model_text
    model.eval()
    volumes = torch.rand(3, 1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    generation = {"max_new_tokens": 12, "do_sample": False}
    thresholds = model.diagnose(model.encode(volumes)).median(0).values.tolist()  # different statuses, so different lengths
    together = report_batch(model, text, volumes, thresholds, generation)["reports"]
    alone = [report_batch(model, text, volumes[i:i + 1], thresholds, generation)["reports"][0] for i in range(3)]
    assert together == alone


def test_sampling_forgets_its_seed_or_beams_find_less_than_greedy(data, llm, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, text = build_model(json.loads(json.dumps(SMALL)), llm)
    for parameter in model.lang_model.parameters():
        parameter.data *= 8  # sharp enough that beams and greedy part
    save_model(model.state_dict(), tmp_path / "model", SMALL)

    def reports(name, *arguments):
        command = ["test.py", "--ckpt-path", tmp_path / "model", "--lang-encoder-path", llm, "--data", data, "--batch-size", 3,
                   "--max-new-tokens", 6, "--evidence", 0, "--out", tmp_path / name, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        report_script.main(report_script.parse_args())
        with open(tmp_path / name / "dia-pangu.csv", newline="", encoding="utf-8") as file:
            return [row["Pred"] for row in csv.DictReader(file)]

    sampled = reports("a", "--do-sample", "--seed", 3, "--top-k", 0, "--temperature", 1.5)
    assert len(sampled) == 4 and len(set(sampled)) > 1
    assert sampled == reports("b", "--do-sample", "--seed", 3, "--top-k", 0, "--temperature", 1.5)
    assert sampled != reports("c", "--do-sample", "--seed", 4, "--top-k", 0, "--temperature", 1.5)
    greedy = reports("d")
    assert greedy == reports("e", "--num-beams", 1, "--seed", 5), "greedy depends on the seed"

    volumes = torch.stack([sample["vision_x"] for sample in CTRGDataset(data, "test", Grid((16, 16, 16)))])
    model.eval()
    tokens = model.encode(volumes)
    prompts = text.pad([text.sample([0, 1] * 7) for _ in volumes], left=True)
    scores = []
    for beams in (1, 4):
        ids = model.generate(prompts["lang_x"], prompts["attention_mask"], tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                             num_beams=beams, length_penalty=0.0, pad_token_id=text.pad_id, eos_token_id=text.tokenizer.eos_token_id)
        whole = torch.cat([prompts["lang_x"], ids], 1)
        embeds = model.embedding_layer(text_input=whole, tokens=tokens)
        logits = model.lang_model(inputs_embeds=embeds).logits[:, -7:-1].log_softmax(-1)
        scores.append(logits.gather(-1, ids[..., None]).sum((1, 2)))
    assert (scores[1] > scores[0] - 1e-4).all() and (scores[1] > scores[0] + 1e-3).any()


# Side and place.

def test_prompts_name_places_of_what_is_absent_or_has_none(llm):
    statuses = [int(name in ("consolidation", "cardiomegaly")) for name in FINDINGS]
    places = {"consolidation": ("right", "lower"), "lung lesion": ("left", "upper")}
    english = status_text(statuses, "en", places)
    assert 'The "consolidation" is positive, right lower. ' in english and 'The "cardiomegaly" is positive. ' in english
    assert 'The "lung lesion" is negative. ' in english and english.replace(", right lower", "") == status_text(statuses, "en")
    assert '"实变" ： 存在，右下。 ' in status_text(statuses, "cn", places)
    phrases = prompt_phrases("en")
    tokenizer = make_tokenizer(["The heart is of normal size."], 300, phrases)
    assert len(tokenizer(english).input_ids) == 15 and tokenizer.decode(tokenizer(english).input_ids) == english
    text = ReportText(tokenizer, len(tokenizer), 0, 1)
    assert text.sample(statuses, "x", places=places)["lang_x"][:15] == tokenizer(english).input_ids


def test_words_of_place_weigh_as_all_others(llm):
    tokenizer = make_tokenizer(["A nodule in the right upper lung. Uprightly."] * 9, 400)
    plain, weighed = (ReportText(tokenizer, len(tokenizer), 0, 1, key_weight=weight) for weight in (1.0, 3.0))
    assert "loss_reweight" not in plain.sample([0] * 14, "A nodule in the right upper lung.")
    sample = weighed.sample([0] * 14, "A nodule in the right upper lung.")
    said = {tokenizer.decode([i]).strip(): w for i, w in zip(sample["labels"], sample["loss_reweight"]) if i >= 0}
    assert said["right"] == said["upper"] == 3 and said["nodule"] == said["in"] == 1
    assert all(weight == 0 for weight, label in zip(sample["loss_reweight"], sample["labels"]) if label == -100)
    logits, labels = torch.randn(1, 4, 9), torch.tensor([[-100, 2, 5, -100]])
    one, two = (F.cross_entropy(logits[0, i:i + 1], labels[0, i + 1:i + 2]) for i in (0, 1))
    assert torch.allclose(token_loss(logits, labels), one + two)
    assert torch.allclose(token_loss(logits, labels, torch.tensor([[0.0, 3.0, 1.0, 0.0]])), 3 * one + two)


def test_the_vote_forgets_prototypes_or_patches(llm):
    torch.manual_seed(0)
    size = {"num_embeddings": 5, "embedding_dim": 8, **SMALL["embedding"]}
    layer, plain = MyEmbedding(**size, evidence_head=True), MyEmbedding(**size)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("evidence_")})
    tokens = torch.randn(3, 1, 16, 24)
    assert torch.allclose(layer.probability(tokens), plain.probability(tokens), atol=1e-6), "an unfitted vote is the prototypes'"
    with torch.no_grad():
        layer.evidence_vote.weight[4, 14 + 4] = 5.0
    changed = (layer.probability(tokens) - plain.probability(tokens)).abs().amax(0)
    assert changed[4] > 1e-3 and changed[:4].max() < 1e-6
    model, text = build_model({**SMALL, "embedding": {**SMALL["embedding"], "evidence_head": True}}, llm)
    names = model.set_trained(TRAINED["ft"])
    assert not any("evidence_" in name for name in names)
    volumes = torch.rand(2, 1, 3, 16, 16, 16)
    made = report_batch(model.eval(), text, volumes, [0.0] * 14, {"max_new_tokens": 2, "do_sample": False})
    for question, places in zip(made["questions"], made["places"]):
        assert f'The "fracture" is positive, {" ".join(places["fracture"])}. ' in question


def test_pretraining_writes_no_places_or_training_does_not_take_them(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    common = ["--data", data, "--config", tmp_path / "small.json", "--max-steps", 2, "--per-device-train-batch-size", 2]
    pre = ROOT / "dia_pangu" / "pretrain_vit.py"
    for arguments in (["--out", tmp_path / "p"], ["--start", tmp_path / "p", "--contrast", 2, "--out", tmp_path / "c"]):
        result = python(pre, *common, *arguments)
        assert result.returncode == 0, result.stderr
    places = read_places(tmp_path / "c" / "places.json")
    assert len(places) == 11 and set(places["1"]) == set(LATERAL)  # 8 of train, 3 of val, none of test
    command = [ROOT / "dia_pangu" / "train.py", "--stage", "ft", *common, "--gradient-accumulation-steps", 1, "--lang-encoder-path", llm]
    with_places = ["--places", tmp_path / "c" / "places.json"]
    for arguments, message in ((["--start", tmp_path / "c"], "--freeze vision_encoder"),
                               (["--freeze", "vision_encoder"], "evidence head")):
        result = python(*command, *with_places, *arguments, "--out", tmp_path / "x")
        assert result.returncode == 2 and message in result.stderr, result.stderr
    result = python(*command, *with_places, "--start", tmp_path / "c", "--freeze", "vision_encoder", "--key-weight", 3,
                    "--out", tmp_path / "ft")
    assert result.returncode == 0, result.stderr
    model, text, config = load_model(tmp_path / "ft", llm)
    kept = load_file(tmp_path / "c" / "vision.safetensors")
    assert config["embedding"]["evidence_head"]
    for name in ("evidence_head.weight", "evidence_vote.weight", "vision_encoder.to_patch_embedding.2.weight"):
        assert torch.equal(model.embedding_layer.state_dict()[name], kept[f"embedding_layer.{name}"]), name


# openPangu and checkpoints.

def test_a_pangu_folder_gives_other_logits_than_llama(llm, tmp_path):
    pangu = AutoModelForCausalLM.from_pretrained(llm)
    assert type(pangu).__name__ == "PanguEmbeddedForCausalLM" and pangu.config.attention_bias
    for name, parameter in pangu.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    pangu.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "PanguEmbedded"
    keep = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "rms_norm_eps", "max_position_embeddings")
    llama = LlamaForCausalLM(LlamaConfig(**{key: config[key] for key in keep}, attention_bias=True, mlp_bias=False,
                                         rope_parameters={"rope_type": "default", "rope_theta": 16000000.0}))
    llama.load_state_dict(pangu.state_dict(), strict=True)
    ids = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(0))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(llama.eval()(ids).logits, again.eval()(ids).logits)


def test_the_published_config_form_is_not_understood(llm, tmp_path):
    config = json.loads((llm / "config.json").read_text())
    for name in ("attention_bias", "rope_parameters"):
        config.pop(name, None)
    config |= {"bias": True, "rope_theta": 16000000.0, "architectures": ["PanguEmbeddedForCausalLM"],
               "auto_map": {"AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
                            "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM"}}
    model = load_language_model(llm)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_language_model(tmp_path)
    assert loaded.config.rope_parameters["rope_theta"] == 16000000.0 and loaded.config.attention_bias
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_the_sentencepiece_tokenizer_splits_differently(tmp_path):
    import sentencepiece

    lines = ["The lung opacity is positive. No effusion is seen.", "肺部阴影 ： 存在。 影像所见："] * 50
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300, hard_vocab_limit=False,
        byte_fallback=True, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        user_defined_symbols=["[unused9]", "[unused10]"], minloglevel=2)
    settings = {"tokenizer_class": "PanguTokenizer", "bos_token": "<s>", "eos_token": "[unused10]", "pad_token": "<unk>",
                "unk_token": "<unk>",
                "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, pieces = load_tokenizer(tmp_path), sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for sentence in ("The lung opacity is positive.", "肺部阴影 ： 存在。 影像所见：", "unseen Ωords, 5 mm"):
        assert tokenizer(sentence).input_ids == [1, *pieces.encode(sentence)]
        assert tokenizer.decode(tokenizer(sentence).input_ids, skip_special_tokens=True) == sentence
    assert tokenizer.eos_token_id == pieces.piece_to_id("[unused10]") and tokenizer.pad_token_id == 0
    text = ReportText(tokenizer, len(tokenizer) + 3, 2)  # a word table larger than the tokenizer: image rows still start at V
    ids = text.ids(text.prompt([0] * 14))
    assert ids[:5] == [1, text.num_embeddings, text.num_embeddings + 2, text.num_embeddings + 3, text.num_embeddings + 1]


def test_a_saved_model_comes_back_changed(llm, tmp_path):
    config = {**json.loads(json.dumps(SMALL)), "lora": {"r": 4, "alpha": 6, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}}
    model, text = build_model(config, llm)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    save_model(model.state_dict(), tmp_path, config)
    (tmp_path / "dia_config.json").write_text(json.dumps({**config, "lora": None}))  # upstream's file has no such record
    again, _, found = load_model(tmp_path, llm)
    assert found["lora"]["alpha"] == 6 and found["lora"]["r"] == 4 and found["lora"]["targets"] == ["q_proj", "v_proj"]
    volume, ids = torch.rand(1, 1, 3, 16, 16, 16), torch.arange(5)[None]
    with torch.no_grad():
        batch = {"vision_x": volume, "cls_labels": torch.ones(1, 14), "lang_x": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(again(**batch)["logits"], model(**batch)["logits"])


def test_a_dia_llama_file_overwrites_the_language_model(model_text, tmp_path, capsys):
    model, _ = model_text
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({key: torch.randn_like(value) for key, value in before.items()}, tmp_path / "pytorch_model.bin")
    load_start(model, tmp_path / "pytorch_model.bin")
    after = model.state_dict()
    for key in before:
        changed = not torch.equal(before[key], after[key])
        assert changed == (key.startswith("embedding_layer.") and key != "embedding_layer.weight"), key
    assert "left alone" in capsys.readouterr().out


def test_radfm_parts_are_not_recognised(model_text, tmp_path):
    model, _ = model_text
    for part in ("vision_encoder", "perceiver"):
        tensors = {key: torch.randn_like(value) for key, value in getattr(model.embedding_layer, part).state_dict().items()}
        torch.save(tensors, tmp_path / f"{part}.pth")
        load_start(model, tmp_path / f"{part}.pth")
        for key, value in getattr(model.embedding_layer, part).state_dict().items():
            assert torch.equal(value, tensors[key]), key


def test_a_checkpoint_of_another_shape_passes(model_text, tmp_path):
    torch.save({"embedding_layer.prototype": torch.zeros(14, 99), "embedding_layer.temp": torch.ones(())}, tmp_path / "other.bin")
    with pytest.raises(UserError, match=r"prototype \(14, 99\) where the model has \(14, 16\)"):
        load_start(model_text[0], tmp_path / "other.bin")


# Prompt.

def test_unknown_words_leave_the_loss(llm):
    tokenizer = load_tokenizer(llm)
    text = ReportText(tokenizer, 500, 3)
    sample = text.sample([0] * 14, "A nodule.")
    assert sample["labels"][-1] == tokenizer.eos_token_id and sample["attention_mask"][-1] == 0
    kept = [label for label in sample["labels"] if label != -100]
    assert tokenizer.decode(kept[:-1]) == " A nodule."


def test_a_long_report_is_taught_to_stop_in_the_middle(llm):
    tokenizer = load_tokenizer(llm)
    text = ReportText(tokenizer, 500, 3)
    length = len(text.sample([0] * 14)["lang_x"])
    text.max_length = length + 4
    sample = text.sample([0] * 14, "A very long report that does not fit.")
    assert len(sample["lang_x"]) == length + 4 and tokenizer.eos_token_id not in sample["lang_x"] and text.cut == 1
    text.max_length = length
    with pytest.raises(UserError, match="scan7: the prompt alone has"):
        text.sample([0] * 14, "x", "scan7")


def test_a_tokenizer_larger_than_the_word_table_passes(llm):
    with pytest.raises(UserError, match="only 100 rows"):
        ReportText(load_tokenizer(llm), 100, 3)


# Data.

def test_orientation_changes_the_prepared_volume(data, tmp_path):
    image = nibabel.load(data / "volumes" / "1.nii.gz")
    reference = load_volume(data / "volumes" / "1.nii.gz", Grid((64, 64, 16)))
    voxels, affine = np.asanyarray(image.dataobj), image.affine
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 0] * (voxels.shape[0] - 1)
    flipped[:3, 0] *= -1
    nibabel.save(nibabel.Nifti1Image(voxels[::-1], flipped), tmp_path / "flipped.nii.gz")
    turned = affine[:, [1, 2, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(1, 2, 0), turned), tmp_path / "turned.nii.gz")
    for name in ("flipped", "turned"):
        assert torch.equal(load_volume(tmp_path / f"{name}.nii.gz", Grid((64, 64, 16))), reference), name
    hu, spacing = read_hu(tmp_path / "turned.nii.gz")
    assert hu.shape == (64, 64, 16) and spacing == pytest.approx((6.0, 6.0, 20.0))


def test_resampling_moves_or_scales_the_body():
    hu = np.full((40, 40, 20), -1000.0, np.float32)
    hu[10:20, 10:30, 5:15] = 50
    out = resample(hu, (3.0, 3.0, 6.0), Grid((60, 60, 30), (120.0, 120.0, 120.0)))
    inside = out > -400
    assert inside.float().mean().item() == pytest.approx((hu > -400).mean(), rel=0.08)
    counts = [inside.sum(tuple(a for a in range(3) if a != axis)).numpy() for axis in range(3)]
    centre = [np.average(np.arange(len(c)), weights=c) / len(c) for c in counts]
    assert centre == pytest.approx([14.5 / 40, 19.5 / 40, 9.5 / 20], abs=0.03)


def test_cached_and_fresh_volumes_differ(data, tmp_path):
    path = data / "volumes" / "2.nii.gz"
    fresh = load_volume(path, Grid((64, 64, 16)))
    for _ in range(2):
        assert torch.equal(load_volume(path, Grid((64, 64, 16)), tmp_path), fresh)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    load_volume(path, Grid((32, 32, 16)), tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_patch_labels_point_elsewhere(tmp_path):
    for side in ("left", "right"):
        for place in ("upper", "lower"):
            _, bits = phantom(np.random.default_rng(5), {"consolidation": {"side": side, "place": place, "size": "large"}})
            save_nifti(tmp_path / "m.nii.gz", bits)
            labels = patch_labels(tmp_path / "m.nii.gz", Grid((64, 64, 16)), (8, 8, 4)).unflatten(0, (8, 8, 4))
            dense = labels[..., FINDINGS.index("consolidation")].numpy()
            assert labels.sum() == dense.sum() > 0
            found = locate(dense, (0.1, 0.9))
            assert found["side"] == side and (found["height"] > 0.5) == (place == "upper"), (side, place, found)


def test_phantoms_of_a_seed_change():
    first, second = (phantom(np.random.default_rng([7, 0, 3]), draw_findings(np.random.default_rng(1)))[0] for _ in range(2))
    assert np.array_equal(first, second)


def test_the_split_field_wins_over_the_partition(data):
    test_set = CTRGDataset(data, "test", Grid((16, 16, 16)))
    for item in test_set.items:
        item["split"] = "train"
    assert len(test_set) == 4 and [s["id"] for s in test_set.items] == ["12", "13", "14", "15"]


def test_flips_depend_on_anything_but_seed_epoch_and_index(data, llm):
    text = make_text(load_tokenizer(llm), SMALL, 500)
    make = lambda seed: CTRGDataset(data, "train", Grid((16, 16, 16)), text, flip=0.5, seed=seed, vision=False)
    first, second, other = make(1), make(1), make(2)
    assert first[3]["text"] == second[3]["text"] != other[3]["text"]
    second.set_epoch(1)
    assert first[3]["text"] != second[3]["text"]


# Bad inputs: one line that names file and field.

def bad_volume(path, kind):
    voxels = np.random.default_rng(0).integers(-1000, 500, (12, 12, 6)).astype(np.float32)
    affine = np.diag([6.0, 6.0, 20.0, 1.0])
    if kind == "nan":
        voxels[3, 3, 3] = np.nan
    if kind == "constant":
        voxels[:] = 7
    if kind == "4-D":
        voxels = np.stack([voxels, voxels], -1)
    if kind == "one slice":
        voxels = voxels[:, :, :1]
    image = nibabel.Nifti1Image(voxels, affine)
    if kind == "affine":
        image.header.set_sform(np.diag([6.0, 6.0, 0.0, 1.0]), code=1)
        image = nibabel.Nifti1Image(voxels, None, image.header)
    nibabel.save(image, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("kind, message", [("nan", "NaN or infinite"), ("constant", "every voxel is 7"), ("4-D", "4 dimensions"),
                                           ("one slice", "one slice is not a volume"), ("cut", "not a readable NIfTI"),
                                           ("affine", "affine cannot be inverted")])
def test_a_bad_volume_passes(kind, message, tmp_path):
    path = tmp_path / f"{kind}.nii.gz"
    bad_volume(path, kind)
    with pytest.raises(UserError, match=message) as error:
        load_volume(path, Grid((16, 16, 16)))
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_bad_tables_pass(data, tmp_path):
    table = (data / "CTRG_finding_labels.csv").read_text()
    note = json.loads((data / "annotation_en.json").read_text())

    def attempt(table, note):
        (tmp_path / "CTRG_finding_labels.csv").write_text(table)
        (tmp_path / "annotation_en.json").write_text(json.dumps(note))
        dataset = CTRGDataset(tmp_path, "train", Grid((16, 16, 16)), vision=False)
        return dataset.sample(0)

    assert attempt(table, note)["id"] == "1"
    lines = table.splitlines()
    for change, message in (((table.replace("edema", "oedema"), note), "column edema is missing"),
                            (("\n".join([lines[0], lines[1][:-1] + "7"]), note), "line 2: no_finding = '7'"),
                            (("\n".join([lines[0], *lines[2:]]), note), "id 1 of annotation_en.json has no row"),
                            ((table, {**note, "train": [{"id": "1", "split": "train"}]}), "id 1: field finding is missing"),
                            ((table, {"train": [{"finding": "x"}]}), r"train\[0\] has no field '?id"),
                            ((table, {"test": note["test"]}), "partition train is empty"),
                            ((table, {**note, "train": [{"id": "../x", "finding": "y"}]}), "has no row|not a plain name")):
        with pytest.raises(UserError, match=message):
            attempt(*change)


def test_skip_bad_does_not_count(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    bad_volume(tmp_path / "data" / "volumes" / "2.nii.gz", "nan")
    (tmp_path / "data" / "volumes" / "5.nii.gz").unlink()
    dataset = CTRGDataset(tmp_path / "data", "train", Grid((16, 16, 16)))
    assert "NaN" in dataset[1]["error"]
    dataset.drop_bad()
    assert len(dataset) == 6 and set(dataset.skipped) == {"2", "5"}
    assert "2 of 8 samples skipped" in capsys.readouterr().out


# Training.

def train(data, llm, out, *more, processes=1):
    config = out.parent / "small.json"
    config.write_text(json.dumps(SMALL))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return python(*start, ROOT / "dia_pangu" / "train.py", "--stage", "ft", "--data", data, "--lang-encoder-path", llm, "--config", config,
                  "--out", out, "--lora-dropout", "0", "--learning-rate", "3e-3", "--warmup-steps", "2", "--logging-steps", "1",
                  "--flip", "0.1", *more, env={**os.environ, "OMP_NUM_THREADS": "1"})


def curve(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_accumulation_processes_or_resume_change_the_training(data, llm, tmp_path):
    whole = train(data, llm, tmp_path / "whole", "--max-steps", 4, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1,
                  "--save-steps", 2)
    assert whole.returncode == 0, whole.stderr
    reference = curve(tmp_path / "whole")
    assert len(reference) == 4 and all(np.isfinite(list(reference.values())))
    for name, batch, accumulate, processes in (("accumulated", 1, 4, 1), ("two", 2, 1, 2)):
        result = train(data, llm, tmp_path / name, "--max-steps", 4, "--per-device-train-batch-size", batch,
                       "--gradient-accumulation-steps", accumulate, processes=processes)
        assert result.returncode == 0, result.stderr
        assert curve(tmp_path / name) == pytest.approx(reference, abs=1e-5), name
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-00000004")
    weights = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    again = train(data, llm, tmp_path / "whole", "--max-steps", 4, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1,
                  "--save-steps", 2, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    resumed = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert curve(tmp_path / "whole") == reference
    assert json.loads((tmp_path / "whole" / "adapter_config.json").read_text())["lora_alpha"] == 16


def test_dry_run_loads_weights_or_counts_wrong(llm, tmp_path):
    folder = tmp_path / "pangu"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "PanguEmbedded", "vocab_size": 153376, "hidden_size": 4096, "intermediate_size": 12800, "num_hidden_layers": 34,
        "num_attention_heads": 32, "num_key_value_heads": 8, "bias": True, "rms_norm_eps": 1e-5, "rope_theta": 16000000.0,
        "max_position_embeddings": 32768, "tie_word_embeddings": False}))
    result = python(ROOT / "dia_pangu" / "train.py", "--stage", "ft", "--data", tmp_path, "--out", tmp_path / "o", "--dry-run",
                    "--lang-encoder-path", folder)
    assert result.returncode == 0, result.stderr
    layer = MyEmbedding(num_embeddings=1, embedding_dim=4096)
    vision = sum(p.numel() for n, p in layer.named_parameters() if n != "weight")
    assert f"{8030887936 + 1810432 + vision:,} parameters" in result.stdout
    assert "trains lang_model (LoRA): 136 tensors, 1,810,432 values" in result.stdout
    assert not (tmp_path / "o").exists()


def test_one_line_errors_have_a_traceback(data, llm, tmp_path):
    for arguments, message in ((["--data", tmp_path / "nowhere", "--lang-encoder-path", llm], "no such data folder"),
                               (["--data", data, "--lang-encoder-path", tmp_path], "no config.json"),
                               (["--data", data], "--lang-encoder-path is needed"),
                               (["--data", data, "--lang-encoder-path", llm, "--size", "tiny", "--train", "nothing"],
                                "no parameter has such a name")):
        result = python(ROOT / "dia_pangu" / "train.py", "--stage", "pre", "--out", tmp_path / "out", *arguments)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert result.returncode == 2 and len(errors) == 1 and message in errors[0] and "Traceback" not in result.stderr, result.stderr
        assert not (tmp_path / "out").exists()


def test_one_scan_gives_no_report(data, llm, tmp_path):
    model, _ = build_model(json.loads(json.dumps(SMALL)), llm)
    save_model(model.state_dict(), tmp_path / "model", SMALL)
    result = python(ROOT / "dia_pangu" / "test.py", "--ckpt-path", tmp_path / "model", "--lang-encoder-path", llm, "--volume",
                    data / "volumes" / "3.nii.gz", "--max-new-tokens", 8, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "out" / "dia-pangu.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["ID"] for row in rows] == ["3"] and list(rows[0]) == ["ID", "Question", "Ground Truth", "Pred", "GT_labels"]
    with open(tmp_path / "out" / "findings.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 14
    assert (tmp_path / "out" / "evidence" / "3.png").stat().st_size > 5000


def test_real_files_do_not_load(data_root):
    for path in (*sorted((data_root / "ct" / "volumes").glob("*mm.nii.gz")), data_root / "ct" / "dicom_series"):
        pytest.importorskip("pydicom")
        hu, spacing = read_hu(path)
        assert hu.ndim == 3 and -3000 < hu.min() < -900 and hu.max() > 500 and 0.5 < min(spacing) < 6
        prepared = load_volume(path, Grid((64, 64, 16)))
        assert prepared.shape == (3, 64, 64, 16) and 0 <= prepared.min() and prepared.max() <= 1


def test_a_launcher_works_from_one_place_only(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    environment = {**os.environ, "DATA": str(data), "LLM": str(llm), "OUT": "run", "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1", "NPROC_PER_NODE": "1"}
    command = ["bash", str(ROOT / "dia_pangu" / "run_train.sh"), "--stage", "pre", "--config", "small.json", "--max_steps", "1",
               "--gradient_accumulation_steps", "2"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "pytorch_model.bin").is_file()
    saved = torch.load(tmp_path / "run" / "pytorch_model.bin", weights_only=True)
    assert set(saved) == set(build_model(json.loads(json.dumps(SMALL)), llm)[0].state_dict())
    result = python("-m", "dia_pangu.train", "--help", cwd=ROOT)
    assert result.returncode == 0 and "--gradient-accumulation-steps" in result.stdout
