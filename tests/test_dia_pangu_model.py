"""dia_pangu: the model from volume to report: rows, pooling, what trains, losses, generation."""

import copy
import csv
import json
import sys

import pytest
import torch
from torch.nn import functional as F

from common.llm import add_lora, load_llm
from dia_pangu.src import test as report_script
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL
from dia_pangu.src.Model.build import build_model, save_model
from dia_pangu.src.Model.multimodality_model import LORA, NEVER_TRAINED, TRAINED, MultiPanguForCausalLM
from dia_pangu.src.Model.my_embedding_layer import lookup
from dia_pangu.src.test import finding_rows, report_batch
from dia_pangu.src.train import loss_counts
from studies.recipe import options
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL


def test_lookup_equals_the_one_hot_product():
    generator = torch.Generator().manual_seed(0)
    weight, extra = torch.randn(50, 8, generator=generator), torch.randn(2, 7, 8, generator=generator)
    ids = torch.randint(0, 57, (2, 30), generator=generator)
    table = torch.cat((weight.expand(2, -1, -1), extra), dim=1)
    assert torch.equal(lookup(weight, extra, ids), F.one_hot(ids, 57).float() @ table)


def test_an_id_without_row_is_refused():
    with pytest.raises(ValueError, match="id 57 has no row"):
        lookup(torch.zeros(50, 8), torch.zeros(1, 7, 8), torch.tensor([[57]]))


def test_one_bad_row_of_the_table_leaves_other_tokens_alone():
    weight = torch.zeros(4, 3)
    weight[3] = float("nan")
    assert torch.isfinite(lookup(weight, torch.ones(1, 2, 3), torch.tensor([[0, 1, 4]]))).all()


def test_diagnosis_is_independent_of_the_batch(model_text):
    model, text = model_text
    model.eval()
    volumes = torch.rand(3, 1, 3, 16, 16, 64, generator=torch.Generator().manual_seed(1))[..., :16]
    together = model.diagnose(model.encode(volumes))
    alone = torch.cat([model.diagnose(model.encode(volumes[i : i + 1])) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_several_volumes_per_sample_are_averaged(model_text):
    layer = model_text[0].embedding_layer.eval()
    volumes = torch.rand(2, 3, 3, 16, 16, 16)
    tokens = layer.encode(volumes)
    assert tokens.shape == (2, 3, 16, 24)
    each = torch.stack([layer.finding_features(tokens[:, s : s + 1]) for s in range(3)], 1)
    assert torch.allclose(layer.finding_features(tokens), each.mean(1), atol=1e-6)
    ids = torch.tensor([[0, layer.weight.shape[0] + 2 + 8]] * 2)
    assert layer(text_input=ids, tokens=tokens).shape == (2, 2, 32)


def test_a_volume_of_another_size_than_trained_is_refused(model_text):
    with pytest.raises(ValueError, match="prototypes are made for 16"):
        model_text[0].encode(torch.zeros(1, 1, 3, 16, 16, 8))


def test_each_stage_trains_its_own_tensors(model_text, llm):
    model, _ = model_text
    names = model.set_trained(TRAINED["pre"])
    expected = {name for name, _ in model.named_parameters() if name.startswith("embedding_layer.perceiver.")}
    assert set(names) == expected and "embedding_layer.perceiver.latents" in names
    with_lora = MultiPanguForCausalLM(add_lora(load_llm(llm), **LORA), model.embedding_layer)
    names = set(with_lora.set_trained(TRAINED["ft"]))
    everything = {name for name, _ in with_lora.named_parameters()}
    vision = {n for n in everything if n.startswith("embedding_layer.") and "group_cls_head" not in n}
    lora = {n for n in everything if "lora_" in n}
    assert names == lora | vision - {"embedding_layer.weight"}
    assert {n for n in names if "lora_" in n} == {
        f"lang_model.base_model.model.model.layers.{i}.self_attn.{p}.lora_{ab}.default.weight"
        for i in range(2)
        for p in ("q_proj", "v_proj")
        for ab in "AB"
    }
    assert not any(any(never in name for never in NEVER_TRAINED) for name in names)


def test_frozen_parts_run_without_dropout(llm):
    config = json.loads(json.dumps(SMALL))
    config["embedding"]["vit"]["dropout"] = 0.5
    model, _ = build_model(config, llm)
    model.set_trained(TRAINED["pre"])
    model.train()
    assert not model.embedding_layer.vision_encoder.transformer.layers[0][1].fn.net[2].training
    assert model.embedding_layer.perceiver.training


def test_loss_of_a_batch_is_the_sum_of_its_shared_parts(model_text, data):
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
    parts = 0
    for sample in samples:
        batch = collate([sample])
        out = model(**{key: batch[key] for key in keys})
        label_share = loss_counts(batch)[0] / loss_counts(whole)[0]
        part = out["lm_loss"] * label_share + model.lambda_ctr * out["ctr_loss"] / len(samples)
        part.backward()
        parts += part.detach()
    assert parts.item() == pytest.approx(loss.item(), abs=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-5), name


def test_padding_does_not_change_a_report(model_text):
    model, text = model_text
    model = copy.deepcopy(model).eval().double()  # an untrained model's choices are near ties in float32
    volumes = torch.rand(3, 1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    generation = {"max_new_tokens": 12, "do_sample": False}
    thresholds = (
        model.diagnose(model.encode(volumes)).median(0).values.tolist()
    )  # different statuses, so different lengths
    together = report_batch(model, text, volumes, thresholds, generation)["reports"]
    alone = [
        report_batch(model, text, volumes[i : i + 1], thresholds, generation)["reports"][0] for i in range(3)
    ]
    assert together == alone


def test_a_control_shows_the_volume_that_it_names(model_text, monkeypatch):
    model, text = model_text
    model.eval()
    volumes = torch.rand(3, 1, 3, 16, 16, 16, generator=torch.Generator().manual_seed(3))
    own, blank, given = model.encode(volumes), model.encode(torch.zeros_like(volumes)), {}
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, ids, mask, tokens, **options: given.update(tokens=tokens) or ids[:, :1],
    )
    for control, diagnosed, shown in (
        ("none", own, own),
        ("swap-visual", own, own.roll(1, 0)),
        ("blank", blank, blank),
        ("swap", own.roll(1, 0), own.roll(1, 0)),
    ):
        made = report_batch(model, text, volumes, [0.5] * 14, {}, control=control)
        assert torch.allclose(made["probability"], model.diagnose(diagnosed), atol=1e-5), control
        assert torch.allclose(given["tokens"], shown, atol=1e-5), control


def test_of_the_candidates_the_one_nearest_to_the_diagnosis_is_kept(model_text, monkeypatch):
    """Only where a report differs from the diagnosis, the first of equals, alike in every batch."""
    model, text = model_text
    told = {  # diagnosis: a nodule and an effusion
        1: "A nodule is seen.",
        2: "The heart is enlarged.",
        3: "A nodule is seen. There is a left pleural effusion.",
        4: "There is a left pleural effusion.",
        5: "Both lungs are clear.",
    }
    drawn = []

    def generate(self, ids, mask, tokens, **options):
        drawn.append((ids.shape, mask.shape, tokens[:, 0].tolist(), options, torch.rand(1).item()))
        return torch.tensor([2, 4, 3, 5])[:, None]

    monkeypatch.setattr(type(model), "generate", generate)
    monkeypatch.setattr(type(text), "decode", lambda self, row: told[int(row[0])])
    statuses = torch.zeros(3, 14, dtype=torch.long)
    statuses[:, [FINDINGS.index("lung lesion"), FINDINGS.index("pleural effusion")]] = 1
    statuses[2, FINDINGS.index("pleural effusion")] = 0
    prompts = {"lang_x": torch.ones(3, 5), "attention_mask": torch.ones(3, 5)}
    tokens = torch.arange(3.0)[:, None]
    for first, kept in ((1, told[3]), (5, told[3])):
        reports = [told[first], told[3], told[1]]
        sampling = {"number": 4, "seed": 7, "top_k": 0}
        report_script.keep_the_nearest(reports, statuses, model, text, prompts, tokens, **sampling)
        assert reports == [kept, told[3], told[1]]
    shapes, masks, shown, options, draw = drawn[0]
    assert shapes == masks == (4, 5) and shown == [0] * 4 and options["do_sample"] and options["top_k"] == 0
    assert len(drawn) == 2 and drawn[1][4] == draw, "the draws depend on more than the seed"
    # All equally far: the report that was there stays.
    monkeypatch.setattr(type(model), "generate", lambda self, ids, *args, **options: torch.full((4, 1), 4))
    reports = [told[1]] * 3
    report_script.keep_the_nearest(reports, statuses, model, text, prompts, tokens, number=4, seed=7)
    assert reports == [told[1]] * 3


def test_only_present_findings_have_a_place():
    statuses = [int(name == "fracture") for name in FINDINGS]
    places = {name: ("left", "upper") for name in LATERAL}
    rows = finding_rows("7", [0.25] * 14, statuses, [0.5] * 14, places)
    told = {row["finding"]: (row["status"], row["side"], row["place"]) for row in rows}
    assert told.pop("fracture") == (1, "left", "upper")
    assert all(row == (0, "", "") for row in told.values())


@pytest.mark.slow
def test_sampling_follows_its_seed_and_beams_find_more_than_greedy(data, llm, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, text = build_model(SMALL, llm)
    for parameter in model.lang_model.parameters():
        parameter.data *= 8  # sharp enough that beams and greedy part
    save_model(model.state_dict(), tmp_path / "model", SMALL)

    def reports(name, *arguments):
        named = {
            "ckpt_path": tmp_path / "model",
            "lang_encoder_path": llm,
            "data": data,
            "out": tmp_path / name,
        }
        sizes = {"batch_size": 3, "max_new_tokens": 6, "evidence": 0}
        command = ["test.py", *options({**named, **sizes}), *arguments]
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
        ids = model.generate(
            prompts["lang_x"],
            prompts["attention_mask"],
            tokens,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            num_beams=beams,
            length_penalty=0.0,
            pad_token_id=text.pad_id,
            eos_token_id=text.tokenizer.eos_token_id,
        )
        whole = torch.cat([prompts["lang_x"], ids], 1)
        embeds = model.embedding_layer(text_input=whole, tokens=tokens)
        logits = model.lang_model(inputs_embeds=embeds).logits[:, -7:-1].log_softmax(-1)
        scores.append(logits.gather(-1, ids[..., None]).sum((1, 2)))
    assert (scores[1] > scores[0] - 1e-4).all() and (scores[1] > scores[0] + 1e-3).any()
