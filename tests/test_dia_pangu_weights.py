"""dia_pangu: openPangu's classes and tokenizer without remote code; published checkpoints in, our own out
and back."""

import json
import shutil
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from common.errors import UserError
from common.llm import load_llm
from dia_pangu.src.Dataset.prompt import ReportText
from dia_pangu.src.Model.build import (
    build_model,
    check_preparation,
    load_model,
    load_start,
    make_embedding,
    read_config,
    save_model,
    settle_preparation,
)
from dia_pangu.src.Model.pangu import load_tokenizer
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL


def test_a_pangu_folder_gives_the_logits_of_llama(llm, tmp_path):
    pangu = AutoModelForCausalLM.from_pretrained(llm)
    assert type(pangu).__name__ == "PanguEmbeddedForCausalLM" and pangu.config.attention_bias
    for name, parameter in pangu.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    pangu.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "PanguEmbedded"
    sizes = {key: config[key] for key in config if key.endswith(("_size", "_layers", "_heads", "_eps"))}
    rope = {"rope_type": "default", "rope_theta": 16000000.0}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=False, rope_parameters=rope))
    llama.load_state_dict(pangu.state_dict(), strict=True)
    ids = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(0))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(llama.eval()(ids).logits, again.eval()(ids).logits)


def test_the_published_config_form_is_understood(llm, tmp_path):
    config = json.loads((llm / "config.json").read_text())
    for name in ("attention_bias", "rope_parameters"):
        config.pop(name, None)
    config |= {
        "bias": True,
        "rope_theta": 16000000.0,
        "architectures": ["PanguEmbeddedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
            "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
        },
    }
    model = load_llm(llm)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = load_llm(tmp_path)
    assert loaded.config.rope_parameters["rope_theta"] == 16000000.0 and loaded.config.attention_bias
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_the_tokenizer_splits_as_sentencepiece_does(tmp_path):
    import sentencepiece

    lines = ["The lung opacity is positive. No effusion is seen.", "肺部阴影 ： 存在。 影像所见："] * 50
    (tmp_path / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=["[unused9]", "[unused10]"],
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "PanguTokenizer",
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<unk>",
        "unk_token": "<unk>",
        "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer, pieces = (
        load_tokenizer(tmp_path),
        sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")),
    )
    for sentence in ("The lung opacity is positive.", "肺部阴影 ： 存在。 影像所见：", "unseen Ωords, 5 mm"):
        assert tokenizer(sentence).input_ids == [1, *pieces.encode(sentence)]
        assert tokenizer.decode(tokenizer(sentence).input_ids, skip_special_tokens=True) == sentence
    assert tokenizer.eos_token_id == pieces.piece_to_id("[unused10]") and tokenizer.pad_token_id == 0
    text = ReportText(
        tokenizer, len(tokenizer) + 3, 2
    )  # a word table larger than the tokenizer: image rows still start at V
    ids, rows = text.ids(text.prompt([0] * 14)), text.num_embeddings
    assert ids[:5] == [1, rows, rows + 2, rows + 3, rows + 1]


def test_a_saved_model_comes_back_unchanged(llm, tmp_path):
    config = {**SMALL, "lora": {"r": 4, "alpha": 6, "dropout": 0.0, "targets": ["q_proj", "v_proj"]}}
    model, text = build_model(config, llm)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval()
    save_model(model.state_dict(), tmp_path, config)
    (tmp_path / "dia_config.json").write_text(
        json.dumps({**config, "lora": None})
    )  # upstream's file has no such record
    again, _, found = load_model(tmp_path, llm)
    lora = found["lora"]
    assert lora["alpha"] == 6 and lora["r"] == 4 and lora["targets"] == ["q_proj", "v_proj"]
    volume, ids = torch.rand(1, 1, 3, 16, 16, 16), torch.arange(5)[None]
    with torch.no_grad():
        batch = {
            "vision_x": volume,
            "cls_labels": torch.ones(1, 14),
            "lang_x": ids,
            "labels": ids,
            "attention_mask": torch.ones_like(ids),
        }
        assert torch.equal(again(**batch)["logits"], model(**batch)["logits"])


def test_a_dia_llama_file_leaves_the_language_model_alone(model_text, tmp_path, capsys):
    model, _ = model_text
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(
        {key: torch.randn_like(value) for key, value in before.items()}, tmp_path / "pytorch_model.bin"
    )
    load_start(model, tmp_path / "pytorch_model.bin")
    after = model.state_dict()
    for key in before:
        changed = not torch.equal(before[key], after[key])
        assert changed == (key.startswith("embedding_layer.") and key != "embedding_layer.weight"), key
    assert "left alone" in capsys.readouterr().out


def test_radfm_parts_are_recognised(model_text, tmp_path):
    model, _ = model_text
    for part in ("vision_encoder", "perceiver"):
        tensors = {
            key: torch.randn_like(value)
            for key, value in getattr(model.embedding_layer, part).state_dict().items()
        }
        torch.save(tensors, tmp_path / f"{part}.pth")
        load_start(model, tmp_path / f"{part}.pth")
        for key, value in getattr(model.embedding_layer, part).state_dict().items():
            assert torch.equal(value, tensors[key]), key


def test_a_checkpoint_of_another_shape_is_refused(model_text, tmp_path):
    torch.save(
        {"embedding_layer.prototype": torch.zeros(14, 99), "embedding_layer.temp": torch.ones(())},
        tmp_path / "other.bin",
    )
    with pytest.raises(UserError, match=r"prototype \(14, 99\) where the model has \(14, 16\)"):
        load_start(model_text[0], tmp_path / "other.bin")


@pytest.mark.parametrize(
    "field, value",
    [
        ("grid.preprocess", "hu"),
        ("grid.size", [16, 16]),
        ("grid.fov_mm", [0.0, 384.0, 320.0]),
        ("embedding.n_tok", 17),
        ("embedding.patch_size", "8"),
        ("embedding.sides", 3),
        ("thresholds", [0.5] * 3),
        ("thresholds", [float("nan")] * 14),
        ("language", "fr"),
    ],
)
def test_a_configuration_that_no_model_has_is_refused_in_one_line(field, value, llm, tmp_path):
    config = json.loads(json.dumps(SMALL))
    part, _, name = field.rpartition(".")
    (config[part] if part else config)[name] = value
    (tmp_path / "small.json").write_text(json.dumps(config))
    args = SimpleNamespace(
        config=tmp_path / "small.json", size="tiny", language=None, preprocess=None, _given=()
    )
    with pytest.raises(UserError, match=f"{field}|configuration") as error:
        make_embedding(read_config(args), 50, 32)
    assert "\n" not in str(error.value)


def test_the_preparation_belongs_to_the_weights(data, llm, tmp_path):
    """Published weights imply upstream's preparation, our own folders theirs, and data alone what they
    are."""
    torch.save({"embedding_layer.temp": torch.ones(())}, tmp_path / "dia-llama.bin")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/dia_config.json").write_text(json.dumps(SMALL))

    def settle(*starts, data=data, preprocess=None, config=None):
        args = SimpleNamespace(data=data, preprocess=preprocess, config=config)
        chosen = json.loads(json.dumps(SMALL))
        chosen["grid"]["preprocess"] = preprocess or "windows"
        return settle_preparation(chosen, args, [tmp_path / name for name in starts])

    assert settle()["grid"]["preprocess"] == "windows"
    assert settle("dia-llama.bin")["grid"]["preprocess"] == "upstream"
    assert settle("ours")["grid"]["preprocess"] == "windows"
    with pytest.raises(UserError, match="differ in preparation"):
        settle("ours", "dia-llama.bin")
    # A frozen ViT must see what it was trained on; one that trains may learn another preparation.
    other = settle("dia-llama.bin", preprocess="windows")
    assert other["grid"]["preprocess"] == "windows"
    check_preparation(other, [tmp_path / "dia-llama.bin"], ["embedding_layer.vision_encoder.x"])
    with pytest.raises(UserError, match="trained with upstream and is frozen"):
        check_preparation(other, [tmp_path / "dia-llama.bin"], ["embedding_layer.perceiver.x"])
    # The grid too.
    wide = json.loads(json.dumps(SMALL))
    wide["grid"]["fov_mm"] = [500.0, 500.0, 400.0]
    (tmp_path / "ours/dia_config.json").write_text(json.dumps(wide))
    with pytest.raises(UserError, match="its grid has fov_mm"):
        settle("ours")
    # Grey levels.
    shutil.copytree(data, tmp_path / "grey")
    for path in (tmp_path / "grey/volumes").iterdir():
        voxels = np.asanyarray(nibabel.load(path).dataobj)
        grey = ((voxels + 1350.0) / 1500 * 255).clip(0, 255).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(grey, np.eye(4)), path)
    assert settle(data=tmp_path / "grey")["grid"]["preprocess"] == "upstream"
