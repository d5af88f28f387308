"""Every file of GOLDEN_DIR/dia_pangu: modules, losses, gradients, text layout, preprocessing and metrics of
upstream.

Files are recognised by the start of their name and configured from their own metadata.
"""

import csv
import json
import shutil
import zlib

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from common.llm import add_lora
from dia_pangu.src.Model.helpers import PerceiverResampler
from dia_pangu.src.Model.multimodality_model import MultiPanguForCausalLM
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from dia_pangu.src.Model.position_encoding import PositionEmbeddingLearned3d
from dia_pangu.src.Model.vit_3d import ViT
from tests.golden import golden_files
from tests.upstream_dia_pangu import (
    GatedCrossAttentionBlock,
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    TransformerDecoder,
    TransformerDecoderLayer,
)


class Golden:
    """param.*, in.* and out.* of one file, its configuration and its tolerance max |a-b| <= tol * max(1,
    max |b|)."""

    def __init__(self, path):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata()
        self.config, self.tolerance = json.loads(metadata["config"]), float(metadata["tolerance"])
        self.param, self.inputs, self.out = (
            {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
            for start in ("param.", "in.", "out.")
        )
        self.seen = set()

    def load(self, module):
        module.load_state_dict(self.param, strict=True)
        return module.eval()

    def check(self, name, value):
        expected = self.out[name]
        self.seen.add(name)
        value = value.detach()
        assert value.shape == expected.shape, (
            f"{name}: shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
        )
        error = (value.double() - expected.double()).abs().max().item()
        limit = self.tolerance * max(1.0, expected.double().abs().max().item())
        assert error <= limit, f"{name}: off by {error:.2e}, allowed {limit:.2e}"

    def finish(self):
        assert self.seen == set(self.out), f"outputs never compared: {sorted(set(self.out) - self.seen)}"


def vit3d(golden):
    vit = golden.load(ViT(**golden.config))
    for name, video in golden.inputs.items():
        tokens, pos = vit(video)
        golden.check(name.replace("video", "tokens"), tokens)
        golden.check(name.replace("video", "pos"), pos)


def posenc_learned3d(golden):
    table = golden.load(PositionEmbeddingLearned3d(**golden.config))
    for name in list(golden.out):
        sizes = [int(part[1:]) for part in name.split("_")[1:]]  # pos_b1_h4_w5_d3
        golden.check(name, table(*sizes))


def posenc_2d(golden):
    mask = golden.inputs["mask"]
    golden.check("sine", PositionEmbeddingSine(**golden.config["sine"])(mask))
    golden.check("learned", golden.load(PositionEmbeddingLearned(**golden.config["learned"]))(*mask.shape))


def perceiver(golden):
    golden.check("latents", golden.load(PerceiverResampler(**golden.config))(golden.inputs["x"]))


def gated_cross_attention(golden):
    block = golden.load(GatedCrossAttentionBlock(**golden.config))
    x, media, locations = golden.inputs["x"], golden.inputs["media"], golden.inputs["media_locations"].bool()
    golden.check("y_with_locations", block(x, media, locations))
    golden.check("y_no_locations", block(x, media))


def decoder(golden):
    config = dict(golden.config)
    num_layers, intermediate = config.pop("num_layers"), config.pop("return_intermediate")
    has_norm = any(key.startswith("norm.") for key in golden.param)
    model = golden.load(
        TransformerDecoder(
            TransformerDecoderLayer(**config),
            num_layers,
            torch.nn.LayerNorm(config["d_model"]) if has_norm else None,
            intermediate,
        )
    )
    inputs = {key: value.bool() if key.endswith("mask") else value for key, value in golden.inputs.items()}
    result = model(inputs.pop("tgt"), inputs.pop("memory"), **inputs)
    if intermediate:
        return golden.check("hidden", result)
    golden.check("hidden", result[0])
    for i, weights in enumerate(result[1]):
        golden.check(f"attn{i}", weights)


def small_embedding(config):
    """The golden files' names for the sizes that upstream fixes, as constructor arguments."""
    vit = {key: config[key] for key in ("image_size", "frames", "depth", "heads", "dim_head", "mlp_dim")}
    perceiver = {"depth": config["pdepth"], "heads": config["pheads"], "dim_head": config["pdh"]}
    names = "num_embeddings embedding_dim perceiver_num vis_dim patch_size frame_patch_size n_tok mem"
    sizes = {key: config[key] for key in names.split()}
    return MyEmbedding(**sizes, vit=vit, perceiver=perceiver, min_temp=None)


def my_embedding_small(golden):
    layer = golden.load(small_embedding(golden.config))
    x, labels, ids = (golden.inputs[key] for key in ("vision_x", "cls_labels", "text_input"))
    tokens = layer.encode(x)
    golden.check("tokens", tokens.flatten(0, 1))
    similarity = layer(
        x, mode="cls_upstream"
    )  # the reference pools over the wrong axis here; see MyEmbedding.similarity
    golden.check("all_sim_cls", similarity)
    golden.check("pred_labels", (similarity[..., 0] >= similarity[..., 1]).long())
    golden.check("embeds_generate", layer(text_input=ids, tokens=tokens))
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    embeds, sim = layer(x, labels, ids, mode="train")
    ctr_loss = F.cross_entropy(sim, torch.zeros(len(sim), dtype=torch.long))
    probe_loss = (embeds * golden.inputs["grad_probe"]).mean() + 4 * ctr_loss
    for name, value in {"embeds": embeds, "sim": sim, "ctr_loss": ctr_loss, "probe_loss": probe_loss}.items():
        golden.check(name, value)
    probe_loss.backward()
    for name in [key for key in golden.out if key.startswith("grad.")]:
        golden.check(name, layer.get_parameter(name[len("grad.") :]).grad)
    optimizer.step()
    for name in [key for key in golden.out if key.startswith("after_adamw.")]:
        golden.check(name, layer.get_parameter(name[len("after_adamw.") :]))


def my_embedding_realsize(golden):
    config = golden.config
    layer = MyEmbedding(num_embeddings=config["num_embeddings"], embedding_dim=config["embedding_dim"]).eval()
    state = layer.state_dict()
    assert sum(value.numel() for value in state.values()) == config["num_parameters"]
    for key, value in state.items():  # the recipe of the golden README: one stream of random numbers per key
        generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + config["recipe_seed"]) % 2**31)
        r = torch.randn(value.shape, generator=generator)
        scale_like = (
            key.endswith("norm.weight")
            or key
            in ("vision_encoder.to_patch_embedding.1.weight", "vision_encoder.to_patch_embedding.3.weight")
            or ("norm_" in key and key.endswith("weight"))
            or ("perceiver" in key and key.endswith(".1.0.weight"))
        )
        value.copy_(torch.tensor(0.07) if key == "temp" else 1 + 0.05 * r if scale_like else 0.03 * r)
    golden.check("param_checksum_proj_weight", layer.proj.weight.double().sum()[None])
    generator = torch.Generator().manual_seed(config["input_seed"])
    vision_x = torch.rand((1, 1, 3, 256, 256, 64), generator=generator)
    labels = (torch.rand((1, 14), generator=generator) < 0.4).long()
    assert torch.equal(vision_x[0, 0, :, :4, :4, :4], golden.inputs["vision_x_corner"])
    assert torch.equal(labels, golden.inputs["cls_labels"])
    with torch.no_grad():
        tokens = layer.encode(vision_x)
        embeds, sim = layer(
            cls_labels=labels, text_input=golden.inputs["text_input"], mode="train", tokens=tokens
        )
        rows = next(key for key in golden.out if key.startswith("tokens_rows_"))
        golden.check(rows, tokens[0, 0, [int(row) for row in rows.split("_")[2:]]])
        golden.check("embeds", embeds)
        golden.check("sim", sim)
        golden.check("all_sim_cls", layer(mode="cls_upstream", tokens=tokens))


def multimodal_loss(golden):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = golden.config
    llm = LlamaForCausalLM(LlamaConfig(**config["llama"]))
    lora = config["lora"]
    llm = add_lora(llm, lora["r"], lora["lora_alpha"], 0.1, targets=lora["target_modules"])
    model = MultiPanguForCausalLM(llm, small_embedding(config["embedding"]), lambda_ctr=config["lambda_ctr"])
    model.load_state_dict(golden.param, strict=True)
    model.set_trained(("",), never=("group_cls_head.",))
    model.eval()
    out = model(**golden.inputs)
    embeds, sim = model.embedding_layer(
        golden.inputs["vision_x"], golden.inputs["cls_labels"], golden.inputs["lang_x"], mode="train"
    )
    for name, value in {**out, "embeds": embeds, "sim": sim}.items():
        if name != "probability":  # ours alone
            golden.check(name, value)
    out["loss"].backward()
    for name in [key for key in golden.out if key.startswith("grad.")]:
        golden.check(name, model.get_parameter(name[len("grad.") :]).grad)


def volume_preprocess(golden):
    from dia_pangu.src.Dataset.preprocess import to_test_grid, upstream_image

    for i in range(len(golden.inputs)):
        image = upstream_image(golden.inputs[f"volume{i}"].numpy())
        assert image.dtype == torch.float32
        golden.check(f"image{i}_shape", torch.tensor(image.shape))
        golden.check(f"image{i}_c0_sub", image[0, ::31, ::29, ::5])
        golden.check(f"image{i}_mean", image.double().mean()[None])
        if f"test_vision{i}_sub" in golden.out:
            golden.check(f"test_vision{i}_sub", to_test_grid(image)[0, 0, ::17, ::13, ::7])


def text_layout(path):
    from transformers import PreTrainedTokenizerFast

    from dia_pangu.src.Dataset.prompt import GUIDES, ReportText

    golden = json.loads(path.read_text(encoding="utf-8"))
    tokenizer_file = path.with_name(golden.get("tokenizer", "char_tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
    assert len(tokenizer) == golden["base_vocab_size"]
    names = golden["image_token_ids"]
    count = 1 + max(int(name[6:-1]) for name in names if name not in ("<image>", "</image>"))
    for case in golden["cases"]:
        text = ReportText(
            tokenizer,
            golden["base_vocab_size"],
            image_tokens=count,
            language=case["lang"],
            max_length=case["max_seq"],
            skip_unknown=True,
        )
        assert {name: text.tokenizer.convert_tokens_to_ids(name) for name in names} == names
        statuses = [int(code == 1) for code in case["labels_csv"]]
        assert statuses == case["cls_labels"]
        assert text.prompt(statuses) == case["question_with_image"]
        assert GUIDES[case["lang"]] == case["guide"] == case["test_guide"]
        assert text.prompt(statuses) == case["test_question"].strip() + case["question"]
        sample = text.sample(statuses, case["answer"])
        padded = text.pad([sample], length=case["max_seq"])
        for key in ("lang_x", "attention_mask", "labels"):
            assert padded[key][0].tolist() == case[key], f"{case['lang']} {case['index']}: {key}"
        assert (padded["labels"][0] != -100).float().tolist() == case["loss_reweight"]
        assert case["key_words_query"] == []


def nlg_(path):
    from dia_pangu.evaluate.nlg_eval import bleu, cider, meteor, published_scores, rouge_l

    golden = json.loads(path.read_text(encoding="utf-8"))
    with open(path.with_name(golden["csv"]), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == golden["rows"]
    truths, predictions = [row["Ground Truth"] for row in rows], [row["Pred"] for row in rows]
    scores, samples = published_scores(truths, predictions)
    expected = golden["metrics"]
    for name in ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr"):
        assert scores[name] == pytest.approx(expected[name], abs=1e-9, rel=0), name
    for name in [key for key in expected if "_first" in key]:
        metric, count = name.split("_first")
        assert samples[metric][: int(count)] == pytest.approx(expected[name], abs=1e-9, rel=0), name
    if shutil.which("java"):
        assert scores["METEOR"] == pytest.approx(expected["METEOR_jar"], abs=1e-3)
    else:
        assert scores["METEOR"] is None and meteor(truths, predictions) is None
    for name, case in golden.get("edge", {}).items():
        assert name == "one_empty_prediction", f"edge case {name} is not known"
        # Which row was emptied is not recorded: exactly one of them must give the stored scores.
        hits = 0
        for i in range(len(rows)):
            emptied = predictions[:i] + [""] + predictions[i + 1 :]
            if bleu(truths, emptied)[0] == pytest.approx(case["BLEU"], abs=1e-9, rel=0):
                hits += 1
                assert rouge_l(truths, emptied)[0] == pytest.approx(case["ROUGE_L"], abs=1e-9, rel=0)
                assert cider(truths, emptied)[0] == pytest.approx(case["CIDEr"], abs=1e-9, rel=0)
        assert hits == 1


def char_tokenizer(path):
    layouts = [json.loads(p.read_text(encoding="utf-8")) for p in path.parent.glob("text_layout*.json")]
    assert layouts, f"{path.name}: no text_layout file uses it"


def results_(path):
    named = {json.loads(p.read_text(encoding="utf-8"))["csv"] for p in path.parent.glob("nlg_*.json")}
    assert path.name in named, f"{path.name}: no nlg file names it, so it is never compared"


PARTS = (vit3d, posenc_learned3d, posenc_2d, perceiver, gated_cross_attention, decoder)
WHOLES = (my_embedding_small, my_embedding_realsize, multimodal_loss, volume_preprocess)
MODULES = {check.__name__: check for check in (*PARTS, *WHOLES)}
FILES_OF_TEXT = {check.__name__: check for check in (text_layout, nlg_, char_tokenizer, results_)}


@pytest.mark.parametrize("path", golden_files("dia_pangu", slow=("my_embedding_realsize", "nlg_")))
def test_reference_file_is_reproduced(path):
    checks = MODULES if path.suffix == ".safetensors" else FILES_OF_TEXT
    kinds = [kind for kind in checks if path.name.startswith(kind)]
    assert kinds, f"{path.name}: no check knows this kind of file"
    check = checks[max(kinds, key=len)]
    if checks is FILES_OF_TEXT:
        check(path)
    else:
        golden = Golden(path)
        check(golden)
        golden.finish()
