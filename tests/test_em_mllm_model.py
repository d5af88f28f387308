"""em_mllm: the multimodal model, what is trained, saving and loading, language models of several kinds."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common.errors import UserError
from common.tiny_llm import make_llm, make_tokenizer
from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEForPreTraining
from em_mllm.fm9g import fold_to_llama, granite_config
from em_mllm.model import (
    IQ_END,
    IQ_START,
    MultiModalModel,
    build_model,
    load_llm,
    load_model,
    load_starter_kit,
    load_tokenizer,
    save_model,
    set_trainable,
)
from tests.em_world import tiny_sizes

ENCODER = tiny_sizes(32, points=256, patch=8, num_hidden_layers=2, initializer_range=0.2)
FM9G = {
    "model_type": "fm9g",
    "vocab_size": 64,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a tiny Llama and of a tiny encoder as pretrain.py saves it."""
    folder = tmp_path_factory.mktemp("parts")
    make_llm(
        folder / "llm",
        make_tokenizer(["(A) FM (B) AM the answer is 正确答案"] * 3, 300),
        initializer_range=0.2,
    )
    torch.manual_seed(7)
    SiTMAEForPreTraining(SiTMAEConfig(**ENCODER)).save_pretrained(folder / "encoder")
    return folder


def build(parts, **options):
    torch.manual_seed(0)
    model, tokenizer = build_model(parts / "llm", parts / "encoder", **options)
    return model.eval(), tokenizer


def batch(tokenizer, signals=2, points=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    iq = torch.randn(signals, points, 2, generator=g)
    ids = torch.randint(10, 200, (signals, 9), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :5] = -100
    mask[1, 7:], labels[1, 7:] = 0, -100
    return dict(
        iq=iq / iq.abs().amax((1, 2), keepdim=True),
        fs=torch.full((signals,), 20e6),
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
    )


@pytest.mark.parametrize("options", [{}, {"projector": "mlp"}, {"projector": "merlin"}, {"signal_tokens": 3}])
def test_batch_padding_of_signal_and_text_never_changes_the_answer(parts, options):
    model, tokenizer = build(parts, **options)
    b = batch(tokenizer)
    lengths = torch.tensor([64, 40])
    b["iq"][1, 40:] = 0
    together = model(**b, iq_lengths=lengths, all_logits=True)
    one = {k: v[1:] for k, v in b.items()}
    one["iq"] = one["iq"][:, :40]
    one = {k: v[:, :7] if k in ("input_ids", "attention_mask", "labels") else v for k, v in one.items()}
    alone = model(**one, all_logits=True)
    count = alone["logits"].shape[1]
    torch.testing.assert_close(together["logits"][1, :count], alone["logits"][0], atol=2e-5, rtol=1e-4)


def test_a_signals_last_incomplete_patch_is_shown(parts):
    model, _ = build(parts)
    patch = model.signal_encoder.config.patch_size[0]
    iq = torch.randn(2, 4 * patch, 2)
    lengths = torch.tensor([4 * patch, 2 * patch + 1])
    _, valid = model.signal_features(iq, lengths, torch.full((2,), 20e6))
    assert valid.tolist() == [[True] * 4, [True] * 3 + [False]]


def test_logits_only_where_a_label_is_give_the_same_loss_and_gradient(parts):
    results = []
    for everywhere in (True, False):
        model, tokenizer = build(parts)
        out = model(**batch(tokenizer), all_logits=everywhere)
        out["loss"].backward()
        results.append((out["loss"].item(), model.signal_to_hidden.weight.grad, out["logits"].shape[1]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6) and results[1][2] == 4 < results[0][2]
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-4)


def test_layout_is_start_signal_end_text_for_each_signal(parts):
    model, tokenizer = build(parts)
    b = batch(tokenizer)
    embeds, mask, labels, positions = model.embed(
        b["iq"],
        b["input_ids"][:1],
        b["attention_mask"][:1],
        None,
        b["fs"],
        torch.tensor([[1, 0]]),
        b["labels"][:1],
    )
    features, _ = model.signal_features(b["iq"], None, b["fs"])
    vectors = model.signal_to_hidden(features)
    start, end = model.iq_tokens
    text = model.llm.get_input_embeddings()(b["input_ids"][0])
    expected = torch.cat([start[None], vectors[1], end[None], start[None], vectors[0], end[None], text])
    torch.testing.assert_close(embeds[0], expected)
    assert (
        labels[0].tolist() == [-100] * 20 + b["labels"][0].tolist()
        and mask.all()
        and positions[0].tolist() == list(range(29))
    )
    assert min(tokenizer.convert_tokens_to_ids([IQ_START, IQ_END])) >= len(
        model.llm.get_input_embeddings().weight
    )  # the LLM's table is left alone


def test_cached_generation_equals_running_the_whole_prefix_again(parts):
    model, tokenizer = build(parts)
    b = batch(tokenizer)
    inputs = {k: b[k] for k in ("iq", "fs", "input_ids", "attention_mask")}
    cached = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=2)
    for row in range(2):
        ids = b["input_ids"][row : row + 1, : int(b["attention_mask"][row].sum())]
        for step in range(8):
            out = model(b["iq"][row : row + 1], ids, torch.ones_like(ids), fs=b["fs"][:1])
            token = out["logits"][0, -1].argmax()
            assert token == cached[row, step]
            ids = torch.cat([ids, token.reshape(1, 1)], 1)


def test_option_scores_are_log_likelihoods(parts):
    model, tokenizer = build(parts)
    b = batch(tokenizer)
    options = [[[20, 21], [22, 23, 24]], [[25], [26, 27]]]
    scores = model.option_scores(b["iq"], b["input_ids"], b["attention_mask"], options, fs=b["fs"])
    for row in range(2):
        n = int(b["attention_mask"][row].sum())
        for k, choice in enumerate(options[row]):
            ids = torch.cat([b["input_ids"][row, :n], torch.tensor(choice)])[None]
            logits = model(b["iq"][row : row + 1], ids, torch.ones_like(ids), fs=b["fs"][:1])["logits"][
                0
            ].log_softmax(-1)
            expected = sum(logits[-len(choice) - 1 + j, t] for j, t in enumerate(choice))
            assert float(scores[row][k]) == pytest.approx(expected.item(), abs=1e-4)


# ---- what is trained (the README lists the same)


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_freeze_and_lora_train_exactly_the_listed_tensors(parts):
    always = {"iq_tokens", "signal_to_hidden.weight", "signal_to_hidden.bias"}
    for freeze_llm, freeze_encoder, lora in [(f, e, u) for f in (0, 1) for e in (0, 1) for u in (0, 1)]:
        model, _ = build(parts)
        set_trainable(model, bool(freeze_llm), bool(freeze_encoder), bool(lora))
        names = trained(model)
        encoder = {n for n in names if n.startswith("signal_encoder.")}
        llm = {n for n in names if n.startswith("llm.")}
        assert always <= names
        assert encoder == (
            set()
            if freeze_encoder
            else {f"signal_encoder.{n}" for n, _ in model.signal_encoder.named_parameters()}
        )
        if lora:
            adapters = {
                f"llm.base_model.model.model.layers.{i}.self_attn.{t}.lora_{ab}.default.weight"
                for i in (0, 1)
                for t in ("q_proj", "v_proj")
                for ab in "AB"
            }
            assert llm == adapters
        else:
            assert bool(llm) != bool(freeze_llm) and (
                freeze_llm or len(llm) == len(dict(model.llm.named_parameters()))
            )
        assert names == always | encoder | llm


def test_every_trained_tensor_gets_a_gradient_and_the_rest_stays(parts):
    model, tokenizer = build(parts)
    set_trainable(model, True, False, True, {"dropout": 0.0})
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # lora_A moves only once lora_B is not zero
        model(**batch(tokenizer))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = trained(model) - moved
    assert moved <= trained(model) and all(
        n.endswith("key.bias") for n in still
    )  # softmax does not see a shift of all keys


def test_unknown_lora_target_names_the_layers_there_are(parts):
    with pytest.raises(
        UserError,
        match="--lora-targets Wqkv: the language model has no linear module 'Wqkv'; it has .*q_proj",
    ):
        set_trainable(build(parts)[0], False, False, True, {"targets": ["Wqkv"]})


# ---- saving and loading


@pytest.mark.parametrize(
    "freeze_llm, lora, kind", [(False, False, "full"), (True, False, "frozen"), (False, True, "adapter")]
)
def test_saved_model_loads_with_one_call_and_answers_the_same(parts, tmp_path, freeze_llm, lora, kind):
    model, tokenizer = build(parts, signal_tokens=2, projector="mlp")
    set_trainable(model, freeze_llm, False, lora)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    save_model(tmp_path / "model", model, tokenizer, parts / "llm")
    again, tokenizer_again = load_model(tmp_path / "model")
    assert json.loads((tmp_path / "model/multimodal.json").read_text())["llm"] == kind and len(
        tokenizer
    ) == len(tokenizer_again)
    assert (tmp_path / "model/llm/adapter_model.safetensors").exists() == lora and (
        tmp_path / "model/llm"
    ).exists() != (kind == "frozen")
    b = batch(tokenizer)
    torch.testing.assert_close(
        again(**b, all_logits=True)["logits"], model.eval()(**b, all_logits=True)["logits"]
    )
    shutil.rmtree(tmp_path / "model/signal_encoder")
    with pytest.raises(UserError):
        load_model(tmp_path / "model")


def test_starter_kit_checkpoint_loads_and_computes_as_legacy(parts, tmp_path):
    model, tokenizer = build(parts, legacy=True, projector="mlp")
    model.llm.resize_token_embeddings(len(tokenizer))  # the kit keeps the two rows in the LLM's table
    model.iq_tokens.data.copy_(
        model.llm.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids([IQ_START, IQ_END])]
    )
    model.llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.signal_to_hidden.state_dict(), tmp_path / "signal_to_hidden.pt")
    torch.save(model.signal_encoder.state_dict(), tmp_path / "signal_encoder.pt")
    again, _ = load_starter_kit(tmp_path, parts / "llm", SiTMAEConfig(**ENCODER))
    b = batch(tokenizer)
    torch.testing.assert_close(again(**b, all_logits=True)["logits"], model(**b, all_logits=True)["logits"])
    changed = {**b, "iq": b["iq"].clone()}
    changed["iq"][:, :8] += 1  # the kit's defect: the first eight points have no influence
    torch.testing.assert_close(again(**changed)["logits"], again(**b)["logits"])
    assert not torch.allclose(build(parts)[0](**changed)["logits"], build(parts)[0](**b)["logits"])


def test_a_legacy_model_answers_a_question_alike_in_every_batch(parts):
    """Its training keeps the padding behind the text; an answer begins right behind its own question."""
    model, tokenizer = build(parts, legacy=True)
    b = batch(tokenizer)
    asked = {name: b[name] for name in ("iq", "input_ids", "attention_mask")}
    alone = {name: asked[name][1:] for name in asked}
    alone |= {name: alone[name][:, :7] for name in ("input_ids", "attention_mask")}
    options = [[[20, 21], [30, 31, 32]]]
    together = model.option_scores(**asked, options=options * 2)[1]
    torch.testing.assert_close(together, model.option_scores(**alone, options=options)[0])
    how = dict(max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert torch.equal(model.generate(**asked, **how)[1], model.generate(**alone, **how)[0])


def test_pretrained_weights_reach_the_encoder(parts, capsys):
    saved = SiTMAEForPreTraining.from_pretrained(parts / "encoder")
    model, _ = build(parts)
    assert torch.equal(
        model.signal_encoder.encoder.layer[1].w_2.weight, saved.sit.encoder.layer[1].w_2.weight
    )
    assert "loaded 42 of 42 tensors" in capsys.readouterr().out


# ---- language models


def fm9g_folder(parts, folder, model_type="fm9g", **changes):
    """A folder as FM9G-4B has it: config.json of model type fm9g, weights with Llama's names, a tokenizer."""
    tokenizer = load_tokenizer(parts / "llm")
    config = FM9G | {"vocab_size": len(tokenizer), "model_type": model_type} | changes
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(granite_config(config))
    folder.mkdir()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["FM9GForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "modeling_fm9g.FM9GForCausalLM"},
                **config,
            }
        )
    )
    tokenizer.save_pretrained(folder)
    return config, state


@pytest.mark.parametrize("model_type", ["fm9g", "minicpm"])
def test_fm9g_folder_loads_natively_and_equals_the_folded_llama(parts, tmp_path, model_type):
    config, state = fm9g_folder(parts, tmp_path / "9G4B", model_type)
    llm = load_llm(tmp_path / "9G4B").eval()
    llama_config, folded = fold_to_llama(config, state)
    llama = AutoModelForCausalLM.from_config(llama_config).eval()
    llama.load_state_dict(folded)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(llm(ids).logits, llama(ids).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(llm.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_embeddings_are_scaled_once_on_both_fm9g_routes(parts, tmp_path):
    """Text is scaled by scale_emb and signal vectors are not, whichever route computes: FM9G's own
    convention."""
    config, state = fm9g_folder(parts, tmp_path / "9G4B")
    llama_config, folded = fold_to_llama(config, state)
    llama = AutoModelForCausalLM.from_config(llama_config)
    llama.load_state_dict(folded)
    tokenizer = load_tokenizer(tmp_path / "9G4B")
    torch.manual_seed(0)
    encoder = build(parts)[0].signal_encoder
    ids = tokenizer.convert_tokens_to_ids([IQ_START, IQ_END])
    models = [
        MultiModalModel(llm, encoder, "linear", *ids).eval() for llm in (load_llm(tmp_path / "9G4B"), llama)
    ]
    models[1].signal_to_hidden.load_state_dict(models[0].signal_to_hidden.state_dict())
    b = batch(tokenizer)
    torch.testing.assert_close(models[0](**b)["logits"], models[1](**b)["logits"], atol=2e-5, rtol=1e-4)
    prompt = {k: b[k] for k in ("iq", "fs", "input_ids", "attention_mask")}
    assert torch.equal(
        *(
            m.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=2)
            for m in models
        )
    )


def test_longrope_of_an_fm9g_config_is_mapped():
    half = FM9G["hidden_size"] // FM9G["num_attention_heads"] // 2
    config = granite_config(
        FM9G
        | {
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * half, "long_factor": [2.0] * half},
            "max_position_embeddings": 64,
        }
    )
    assert config.rope_parameters["rope_type"] == "longrope" and config.rope_parameters["rope_theta"] == 1e6
    assert torch.isfinite(AutoModelForCausalLM.from_config(config)(torch.arange(8)[None]).logits).all()


def test_full_size_fm9g_has_the_stated_parameters():
    sizes = {"vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400, "num_hidden_layers": 62}
    sizes |= {"num_attention_heads": 40, "num_key_value_heads": 4, "dim_model_base": 256}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(granite_config(FM9G | sizes))
    assert sum(p.numel() for p in model.parameters()) == 4_129_681_920


def test_qwen3_joins_and_learns(parts, tmp_path):
    torch.manual_seed(0)
    tokenizer = load_tokenizer(parts / "llm")
    Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = build_model(tmp_path, parts / "encoder", signal_tokens=2)
    set_trainable(model, False, True, True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch(tokenizer))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_bfloat16_llm_with_float32_encoder(parts):
    model, tokenizer = build(parts, dtype="bfloat16")
    assert (
        torch.isfinite(model(**batch(tokenizer))["loss"])
        and model.signal_encoder.layernorm.weight.dtype == torch.float32
    )


def test_incomplete_llm_folders_are_one_line(parts, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        load_llm(tmp_path)
    shutil.copy(parts / "llm/config.json", tmp_path)
    with pytest.raises(UserError, match="no weights"):
        load_llm(tmp_path)
    with pytest.raises(UserError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)
    remote = tmp_path / "remote"
    shutil.copytree(parts / "llm", remote)
    config = json.loads((remote / "config.json").read_text()) | {
        "model_type": "not_a_model",
        "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"},
    }
    (remote / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_llm(remote)


def test_tokenizer_without_pad_or_end_token(parts, tmp_path):
    shutil.copytree(parts / "llm", tmp_path / "llm")
    path = tmp_path / "llm/tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("pad_token", "eos_token")}
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "llm")
    assert tokenizer.eos_token == "</s>" and tokenizer.pad_token == "</s>"
    assert AutoConfig.from_pretrained(tmp_path / "llm").model_type == "llama"
