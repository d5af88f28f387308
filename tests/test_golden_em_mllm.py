"""Every file of GOLDEN_DIR/em_mllm: tensors that upstream's own modules produced. The kind is the start of
the file name, sizes come from the metadata, the tolerance from the golden README. A file of unknown kind, or
an output that is not compared, fails."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from transformers import GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

from em_mllm.dataset import collate_iq, collate_text
from em_mllm.em_foundation.models import (
    SiTForMultiTask,
    SiTMAEConfig,
    SiTMAEForClassification,
    SiTMAEForPreTraining,
    SiTMAEModelWithoutMask,
)
from em_mllm.em_foundation.models.configuration_em import REGRESSION_TASKS
from em_mllm.em_foundation.models.embedder import SiTMAEEmbeddings, gen_attn_mask, sample_id_matrix
from em_mllm.em_foundation.utils.utils import (
    convert_checkpoint,
    load_encoder,
    normalize_data,
    pack_sequence,
    scale_to_peak,
    transform_downstream,
    with_special_patches,
)
from em_mllm.fm9g import fold_to_llama, granite_config
from em_mllm.model import MultiModalModel
from tests.golden import golden_files


class Golden:
    def __init__(self, path):
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            self.config = json.loads(file.metadata()["config"])
        self.path, self.compared = path, set()
        self.param, self.input, self.out = (
            {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)}
            for p in ("param.", "in.", "out.")
        )
        if "sample_ids" in self.input:
            self.ids = self.input["sample_ids"]
            self.lens = self.input["sample_lens"].tolist()
            self.ids_seq = [row[:n] for row, n in zip(self.ids, self.lens)]
            self.valid = torch.arange(self.ids.shape[1]) < self.input["sample_lens"][:, None]
            self.tokens = (self.input["patches"], self.input["patch_positions"], self.ids_seq)

    def numbered(self, name):
        """in.<name>.0, in.<name>.1, ... in order."""
        keys = sorted(
            (k for k in self.input if k.startswith(name + ".")), key=lambda k: int(k.split(".")[-1])
        )
        return [self.input[k] for k in keys]

    def close(self, name, actual, atol=2e-5, rtol=1e-4, where=None):
        expected = self.out[name]
        self.compared.add(name)
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} for {tuple(expected.shape)}"
        if where is not None:
            actual, expected = actual[where], expected[where]
        torch.testing.assert_close(
            actual.detach(), expected, atol=atol, rtol=rtol, msg=lambda m: f"{self.path.name} {name}: {m}"
        )

    def equal(self, name, actual):
        self.compared.add(name)
        assert torch.equal(actual.to(torch.int64), self.out[name].to(torch.int64)), (
            f"{self.path.name} {name} differs"
        )


def load(module, tensors):
    module.load_state_dict(tensors, strict=True)
    return module.eval()


def check_emb(g):
    embeddings = load(SiTMAEEmbeddings(SiTMAEConfig(**g.config)), g.param)
    ids = sample_id_matrix(g.ids_seq, g.ids.shape[1])
    g.close("embeddings", embeddings.embed(*g.tokens[:2]), 1e-5, 0)
    g.equal("attn_mask", gen_attn_mask(ids))
    if "t" in g.input:
        width = g.out["timestep_sinusoid"].shape[1]
        g.close("timestep_sinusoid", embeddings.fs_embedder.timestep_embedding(g.input["t"], width), 1e-5, 0)
        g.close("timestep_mlp", embeddings.fs_embedder(g.input["t"]), 1e-5, 0)


def check_packing(g):
    patch = SiTMAEConfig(**g.config).patch_size[0]
    signals = g.numbered("iq")
    rates = g.input["fs"].tolist() if g.config.get("use_fs", True) else [None] * len(signals)
    tensors = iter([with_special_patches(x, patch, fs) for x, fs in zip(signals, rates)])
    rows = [[next(tensors) for _ in range(n)] for n in g.input["group_sizes"].tolist()]
    patches, positions, ids_seq = pack_sequence(rows, patch, int(g.input["max_seq_len"]))
    g.close("patches", patches, 0, 0)
    g.equal("patch_positions", positions)
    g.equal("sample_ids", sample_id_matrix(ids_seq, patches.shape[1]))
    g.equal("sample_lens", torch.tensor([len(ids) for ids in ids_seq]))


def check_normalize(g):
    iq = g.input["iq"].numpy()
    g.close("abs", torch.tensor(normalize_data(iq, "abs")), 1e-9, 0)
    g.close("std", torch.tensor(normalize_data(iq, "std")), 1e-9, 0)
    g.close("seed_maxabs", torch.stack([torch.tensor(scale_to_peak(x)) for x in iq]), 1e-6, 0)
    patch = SiTMAEConfig(**g.config).patch_size[0]
    for name in [k for k in g.out if k.startswith("transform_")]:
        _, method, rate = name.split("_")
        out = transform_downstream(
            {"iq": iq, "fs": g.input["fs"].numpy()}, patch, rate == "fs", norm_method_iq=method
        )
        iq_part = torch.ones(out["iq"].shape, dtype=torch.bool)
        iq_part[:, :, patch : 2 * patch] = rate != "fs"
        g.close(name, torch.tensor(out["iq"]), 1e-9, 0, where=iq_part)
        g.close(
            name, torch.tensor(out["iq"]), 1e-6, 0
        )  # in.fs is float32: the rate patch is no more exact than that


def check_encoder_outputs(g, config, state):
    for attention in ("eager", "sdpa", "fa2"):
        model = SiTMAEModelWithoutMask(SiTMAEConfig(**{**config, "attention_type": attention}))
        load(model, convert_checkpoint(state, model.state_dict()))
        out = model(*g.tokens, output_hidden_states=True, output_attentions=attention == "eager")
        g.close("last_hidden_state_ln", out.last_hidden_state, where=g.valid)
        g.close(
            "last_hidden_state_no_ln",
            model(*g.tokens, apply_layernorm=False).last_hidden_state,
            where=g.valid,
        )
        for name in [k for k in g.out if k.startswith("hidden_states.")]:
            g.close(name, out.hidden_states[int(name.split(".")[1])], where=g.valid)
        if attention == "eager":
            for name in [k for k in g.out if k.startswith("attn.")]:
                g.close(
                    name,
                    out.attentions[int(name.split(".")[1])],
                    where=g.valid[:, None, :].expand(-1, config["num_attention_heads"], -1),
                )
        if "head_mask" in g.input:
            masked = model(*g.tokens, head_mask=g.input["head_mask"], apply_layernorm=False)
            g.close("head_masked_no_ln", masked.last_hidden_state, where=g.valid)
    return model


def check_sit_nomask(g):
    check_encoder_outputs(g, g.config, g.param)


def check_sit_fused_qkv(g):
    model = check_encoder_outputs(g, g.config, g.param)
    flat = model(*g.tokens).last_hidden_state[
        g.valid
    ]  # upstream returns valid tokens only, in bf16 attention
    g.close("fa2_flat_ln_bf16", flat, 5e-2, 0)


def check_mae(g):
    model = load(SiTMAEForPreTraining(SiTMAEConfig(**g.config)), g.param)
    encoded = model.sit(*g.tokens, noise=g.input["noise"])
    visible = model.sit.embeddings.hide(
        model.sit.embeddings.embed(*g.tokens[:2]),
        sample_id_matrix(g.ids_seq, g.ids.shape[1]),
        g.input["noise"],
    )
    out = model(*g.tokens, noise=g.input["noise"])
    kept = visible[1] >= 0
    g.equal("ids_restore", out.ids_restore)
    g.close("mae_mask", out.mae_mask, 0, 0)
    g.equal("encoder_attn_mask", encoded.attn_mask)
    g.close("visible_embeddings", visible[0], 5e-5, 0)
    g.close("latent", encoded.last_hidden_state, 5e-5, 0, where=kept)
    g.close("logits", out.logits, 5e-5, 0, where=g.valid)
    g.close("loss", out.loss, 0, 1e-4)
    out.loss.backward()
    gradients = dict(model.named_parameters())
    for name in [k for k in g.out if k.startswith("grad.")]:
        g.close(name, gradients[name.removeprefix("grad.")].grad, 5e-5, 0)
    g.compared |= {
        "upstream_logits",
        "upstream_loss",
    }  # upstream's defect with rows of unequal length, not ours to repeat


def check_cls_head(g):
    model = load(SiTMAEForClassification(SiTMAEConfig(**g.config)), g.param)
    out = model(*g.tokens, labels=g.input["labels"])
    g.close("logits", out.logits, where=g.valid)
    g.close("cls_logits", out.logits[:, 0])
    g.close("cls_loss", out.loss)
    g.close("token_loss", model(*g.tokens, labels=g.input["token_labels"]).loss)


def check_multitask_head(g):
    model = load(SiTForMultiTask(SiTMAEConfig(**g.config)), g.param)
    labels = {k.removeprefix("labels."): v for k, v in g.input.items() if k.startswith("labels.")}
    out = model(*g.tokens, labels=labels)
    for name in labels:
        g.close(f"logits.{name}", out.logits[name], where=g.valid)
        g.close(f"loss_details.{name}", out.loss_details[name])
    g.close("loss", out.loss)
    for name in REGRESSION_TASKS:
        if f"logits.{name}" in g.out:
            g.close(f"logits.{name}", out.logits[name], where=g.valid)


def check_loader(g, tmp_path):
    from safetensors.torch import save_file

    save_file(g.param, tmp_path / "model.safetensors")
    model = SiTMAEModelWithoutMask(SiTMAEConfig(**g.config)).eval()
    load_encoder(model, tmp_path)
    g.close("position_embeddings", model.embeddings.position_embeddings, 0, 0)
    g.close(
        "last_hidden_state_no_ln", model(*g.tokens, apply_layernorm=False).last_hidden_state, where=g.valid
    )
    g.close("last_hidden_state_ln", model(*g.tokens).last_hidden_state, where=g.valid)


def build_mm(g, legacy):
    c = g.config
    llm = LlamaForCausalLM(LlamaConfig(**c["llm"]))
    encoder = SiTMAEModelWithoutMask(SiTMAEConfig(**c["encoder"]))
    model = MultiModalModel(llm, encoder, c["projector"], c["iq_start_id"], c["iq_end_id"], legacy=legacy)
    rows = g.param["llm.model.embed_tokens.weight"][[c["iq_start_id"], c["iq_end_id"]]]
    return load(model, {**g.param, "iq_tokens": rows})


def check_mm_legacy(g):
    model = build_mm(g, legacy=True)
    iq, _ = collate_iq(
        [scale_to_peak(x) for x in g.numbered("iq")], model.signal_encoder.config.patch_size[0]
    )
    texts = [torch.cat(pair).tolist() for pair in zip(g.numbered("question"), g.numbered("answer"))]
    ids, mask, _ = collate_text(texts, [0] * len(texts), g.config["pad_id"])
    g.close("collated_iq", iq, 0, 0)
    g.equal("collated_input_ids", ids)
    g.equal("collated_attention_mask", mask)
    out = model(iq, ids, mask, labels=ids, all_logits=True)
    g.close("inputs_embeds", out["inputs_embeds"], 5e-5, 0)
    g.equal("attention_mask", out["attention_mask"])
    labels = torch.cat(
        [torch.full((len(ids), iq.shape[1] // model.signal_encoder.config.patch_size[0] + 2), -100), ids], 1
    )
    g.equal("labels", labels)
    assert torch.equal(out["labels"], labels[:, 1:])
    g.close("logits", out["logits"], 5e-5, 0)
    g.close("loss", out["loss"], 5e-5, 0)


def check_mm_native(g):
    model = build_mm(g, legacy=False)
    config = model.signal_encoder.config
    patch, special = config.patch_size[0], config.num_special
    signals = [scale_to_peak(x) for x in g.numbered("iq")]
    iq, _ = collate_iq(signals, patch)
    rates = torch.full((len(iq),), float(g.input["fs"]) * 1e6)
    texts = [torch.cat(pair).tolist() for pair in zip(g.numbered("question"), g.numbered("answer"))]
    ids, mask, labels = collate_text(texts, [len(q) for q in g.numbered("question")], g.config["pad_id"])
    # The reference keeps whole patches of batch padding as signal where its attention mask says so.
    shown = g.out["attention_mask"].sum(1) - mask.sum(1) - 2
    lengths = shown * patch
    seen = {}
    model.signal_encoder.register_forward_pre_hook(lambda m, a: seen.update(patches=a[0], positions=a[1]))
    features, _ = model.signal_features(iq, lengths, rates)
    g.close("patches", seen["patches"], 0, 0)
    g.equal("patch_positions", seen["positions"])
    g.close("features", features, 5e-5, 0)
    assert seen["patches"].shape[1] == special + iq.shape[1] // patch
    out = model(iq, ids, mask, labels, lengths, rates, all_logits=True)
    g.close("inputs_embeds", out["inputs_embeds"], 5e-5, 0, where=g.out["attention_mask"].bool())
    g.equal("attention_mask", out["attention_mask"])
    g.close("logits", out["logits"], 5e-5, 0, where=g.out["attention_mask"].bool())
    g.close("loss", out["loss"], 5e-5, 0)
    assert torch.equal(out["labels"], g.out["labels"][:, 1:])
    g.compared.add("labels")
    g.close(
        "loss", model(iq, ids, mask, labels, lengths, rates)["loss"], 5e-5, 0
    )  # logits only where a label is: the same loss


def check_fm9g(g):
    granite = load(GraniteForCausalLM(granite_config(g.config)), with_head(g.param))
    config, folded = fold_to_llama(g.config, g.param)
    llama = load(LlamaForCausalLM(config), folded)
    ids, mask, where = g.input["input_ids"], g.input["attention_mask"], g.input["attention_mask"].bool()
    for model in (granite, llama):
        out = model(input_ids=ids, attention_mask=mask, labels=g.input["labels"])
        g.close("logits", out.logits, 1e-5, 0, where=where)
        g.close("loss", out.loss, 1e-5, 0)
    g.close("scaled_embeds", llama.model.embed_tokens(ids), 1e-5, 0)
    g.close("scaled_embeds", granite.model.embed_tokens(ids) * granite.config.embedding_multiplier, 1e-5, 0)


def with_head(tensors):
    return (
        tensors
        if "lm_head.weight" in tensors
        else {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    )


CHECKS = {
    "emb": check_emb,
    "packing": check_packing,
    "normalize": check_normalize,
    "sit_nomask": check_sit_nomask,
    "sit_fused": check_sit_fused_qkv,
    "mae": check_mae,
    "cls_head": check_cls_head,
    "multitask_head": check_multitask_head,
    "loader": check_loader,
    "mm_legacy": check_mm_legacy,
    "mm_native": check_mm_native,
    "fm9g": check_fm9g,
}


@pytest.mark.parametrize("path", golden_files("em_mllm"))
def test_same_numbers_as_upstream(path, tmp_path):
    assert path.suffix == ".safetensors", f"{path.name}: unknown kind of golden file"
    kind = next(
        (k for k in CHECKS if re.match(k + r"(_|\.|-|\d|[a-z]*_|$)", path.name) or path.name.startswith(k)),
        None,
    )
    assert kind is not None, f"{path.name}: unknown kind of golden file; known are {', '.join(CHECKS)}"
    golden = Golden(path)
    CHECKS[kind](golden, *([tmp_path] if kind == "loader" else []))
    assert golden.compared >= set(golden.out), (
        f"{path.name}: outputs never compared: {sorted(set(golden.out) - golden.compared)}"
    )
