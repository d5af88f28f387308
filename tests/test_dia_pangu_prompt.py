"""dia_pangu: prompts and labels, side and place in them, and the vote that decides what they say."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

from common.errors import UserError
from common.tiny_llm import make_tokenizer
from dia_pangu.evaluate.evidence import locate_all
from dia_pangu.src import train
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Dataset.prompt import FINDINGS, LATERAL, ReportText, prompt_phrases, status_text
from dia_pangu.src.Dataset.verdict import Verdict
from dia_pangu.src.Model.build import build_model, load_model, make_text
from dia_pangu.src.Model.multimodality_model import TRAINED, token_loss
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from dia_pangu.src.Model.pangu import load_tokenizer
from dia_pangu.src.test import report_batch
from studies.dia_pangu import pretrain_vit
from tests import forked
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL, call


def test_unknown_words_stay_in_the_loss(llm):
    tokenizer = load_tokenizer(llm)
    text = ReportText(tokenizer, 500, 3)
    sample = text.sample([0] * 14, "A nodule.")
    assert sample["labels"][-1] == tokenizer.eos_token_id and sample["attention_mask"][-1] == 0
    kept = [label for label in sample["labels"] if label != -100]
    assert tokenizer.decode(kept[:-1]) == " A nodule."


def test_a_report_that_is_cut_gets_no_eos(llm):
    tokenizer = load_tokenizer(llm)
    text = ReportText(tokenizer, 500, 3)
    length = len(text.sample([0] * 14)["lang_x"])
    text.max_length = length + 4
    sample = text.sample([0] * 14, "A very long report that does not fit.")
    assert (
        len(sample["lang_x"]) == length + 4
        and tokenizer.eos_token_id not in sample["lang_x"]
        and text.cut == 1
    )
    text.max_length = length
    with pytest.raises(UserError, match="scan7: the prompt alone has"):
        text.sample([0] * 14, "x", "scan7")


def count_cut_reports(data, llm):
    text = make_text(load_tokenizer(llm), SMALL, 500)
    text.max_length = len(text.sample([1] * 14)["lang_x"]) + 12
    samples = CTRGDataset(data, "train", Grid((16, 16, 16)), text, vision=False)
    expected = sum(
        sample["text"]["attention_mask"][-1] for sample in samples
    )  # a cut report has no eos behind it
    assert text.cut == expected > 0
    batches = list(DataLoader(samples, 4, num_workers=1, collate_fn=collate))
    assert len(batches) == 2 and text.cut == 2 * expected


@pytest.mark.slow
def test_reports_cut_in_a_loader_worker_are_counted(data, llm):
    forked.check(count_cut_reports, data, llm)


def test_a_tokenizer_larger_than_the_word_table_is_refused(llm):
    with pytest.raises(UserError, match="only 100 rows"):
        ReportText(load_tokenizer(llm), 100, 3)


def test_prompts_name_places_of_present_findings_only(llm):
    statuses = [int(name in ("consolidation", "cardiomegaly")) for name in FINDINGS]
    places = {"consolidation": ("right", "lower"), "lung lesion": ("left", "upper")}
    english = status_text(statuses, "en", places)
    assert (
        'The "consolidation" is positive, right lower. ' in english
        and 'The "cardiomegaly" is positive. ' in english
    )
    assert 'The "lung lesion" is negative. ' in english and english.replace(
        ", right lower", ""
    ) == status_text(statuses, "en")
    assert '"实变" ： 存在，右下。 ' in status_text(statuses, "cn", places)
    phrases = prompt_phrases("en")
    tokenizer = make_tokenizer(["The heart is of normal size."], 300, phrases)
    assert (
        len(tokenizer(english).input_ids) == 15 and tokenizer.decode(tokenizer(english).input_ids) == english
    )
    text = ReportText(tokenizer, len(tokenizer), 0, 1)
    assert text.sample(statuses, "x", places=places)["lang_x"][:15] == tokenizer(english).input_ids


def test_short_prompts_name_what_is_present_alone(llm):
    text = ReportText(load_tokenizer(llm), 500, 0, layout="positives")
    shown = text.prompt([int(name in ("edema", "fracture")) for name in FINDINGS])
    assert shown == 'The "edema" is positive. The "fracture" is positive. Imaging findings:'
    assert text.prompt([0] * 13 + [1]) == 'The "no finding" is positive. Imaging findings:'
    # The layout belongs to the weights.
    assert make_text(load_tokenizer(llm), {**SMALL, "prompt": "positives"}, 500).layout == "positives"
    assert make_text(load_tokenizer(llm), SMALL, 500).layout == "all"


def test_words_of_place_have_the_key_weight(llm):
    tokenizer = make_tokenizer(["A nodule in the right upper lung. Uprightly."] * 9, 400)
    plain, weighed = (ReportText(tokenizer, len(tokenizer), 0, 1, key_weight=weight) for weight in (1.0, 3.0))
    assert "loss_reweight" not in plain.sample([0] * 14, "A nodule in the right upper lung.")
    sample = weighed.sample([0] * 14, "A nodule in the right upper lung.")
    said = {
        tokenizer.decode([i]).strip(): w for i, w in zip(sample["labels"], sample["loss_reweight"]) if i >= 0
    }
    assert said["right"] == said["upper"] == 3 and said["nodule"] == said["in"] == 1
    assert all(
        weight == 0 for weight, label in zip(sample["loss_reweight"], sample["labels"]) if label == -100
    )
    logits, labels = torch.randn(1, 4, 9), torch.tensor([[-100, 2, 5, -100]])
    one, two = (F.cross_entropy(logits[0, i : i + 1], labels[0, i + 1 : i + 2]) for i in (0, 1))
    logits, labels = logits[:, :-1], labels[:, 1:]
    assert torch.allclose(token_loss(logits, labels), one + two)
    assert torch.allclose(token_loss(logits, labels, torch.tensor([[3.0, 1.0, 0.0]])), 3 * one + two)


def test_the_vote_joins_prototypes_and_patches(llm):
    torch.manual_seed(0)
    size = {"num_embeddings": 5, "embedding_dim": 8, **SMALL["embedding"]}
    layer, plain = MyEmbedding(**size, evidence_head=True), MyEmbedding(**size)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("evidence_")})
    tokens = torch.randn(3, 1, 16, 24)
    assert torch.allclose(layer.probability(tokens), plain.probability(tokens), atol=1e-6), (
        "an unfitted vote is the prototypes'"
    )
    with torch.no_grad():
        layer.evidence_vote.weight[4, 14 + 4] = 5.0
    changed = (layer.probability(tokens) - plain.probability(tokens)).abs().amax(0)
    assert changed[4] > 1e-3 and changed[:4].max() < 1e-6
    patches = layer.evidence_head(tokens)[:, 0]  # (3, 16 patches, 14 findings)
    assert torch.equal(layer.patch_logits(tokens), patches.max(1).values)
    odds = layer.prototype_logits(tokens)
    assert torch.allclose(odds.sigmoid(), plain.probability(tokens), atol=1e-6)
    assert torch.equal(layer.vote_inputs(tokens), torch.cat((odds, patches.max(1).values), 1))
    model, text = build_model({**SMALL, "embedding": {**SMALL["embedding"], "evidence_head": True}}, llm)
    names = model.set_trained(TRAINED["ft"])
    assert not any("evidence_" in name for name in names)
    volumes = torch.rand(2, 1, 3, 16, 16, 16)
    made = report_batch(model.eval(), text, volumes, [0.0] * 14, {"max_new_tokens": 2, "do_sample": False})
    for question, places in zip(made["questions"], made["places"]):
        assert f'The "fracture" is positive, {" ".join(places["fracture"])}. ' in question
    # Where left and right are unknown the prompt names no side.
    verdicts = [Verdict("NIfTI", side=side) for side in ("known", "unknown")]
    _, places = locate_all(model.embedding_layer, model.encode(volumes), volumes, "windows", verdicts)
    assert all(all(side for side, _ in places[i].values()) == (i != 1) for i in range(2))
    assert [place for _, place in places[1].values()] == [p for _, p in made["places"][1].values()]
    hidden = report_batch(
        model, text, volumes, [0.0] * 14, {"max_new_tokens": 2, "do_sample": False}, hide_places=True
    )
    assert (
        all('The "fracture" is positive. ' in question for question in hidden["questions"])
        and hidden["places"] == made["places"]
    )


def test_hidden_places_leave_the_statuses_alone(data, llm):
    text = make_text(load_tokenizer(llm), SMALL, 500)
    seen = {str(number): {name: ("left", "upper") for name in LATERAL} for number in range(1, 9)}

    def prompts(share, epoch=0):
        options = {"flip": 0.3, "seed": 1, "vision": False, "places": seen, "hide_places": share}
        samples = CTRGDataset(data, "train", Grid((16, 16, 16)), text, **options)
        samples.set_epoch(epoch)
        rows = [zip(sample["text"]["lang_x"], sample["text"]["labels"]) for sample in samples]
        return [
            text.tokenizer.decode(
                [token for token, label in row if label == -100 and token < text.num_embeddings]
            )
            for row in rows
        ]

    named, hidden, some = prompts(0.0), prompts(1.0), prompts(0.5)
    assert all("left upper" in prompt for prompt in named) and not any("upper" in prompt for prompt in hidden)
    assert [prompt.replace(", left upper", "") for prompt in named] == hidden
    said = sum(prompt.count("upper") for prompt in some) / sum(prompt.count("upper") for prompt in named)
    assert 0.2 < said < 0.8 and some == prompts(0.5) and some != prompts(0.5, epoch=1)


@pytest.mark.slow
def test_pretraining_writes_places_that_training_takes(data, llm, tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    common = ["--data", data, "--config", tmp_path / "small.json", "--max-steps", 2, "--batch-size", 2]
    log = tmp_path / "log.txt"
    for arguments in (
        ["--out", tmp_path / "p"],
        ["--start", tmp_path / "p", "--contrast", 2, "--out", tmp_path / "c"],
    ):
        done = call(pretrain_vit, *common, *arguments, log=log)
        assert done.returncode == 0, done.text
    places = read_places(tmp_path / "c" / "places.json")
    assert len(places) == 11 and set(places["1"]) == set(LATERAL)  # 8 of train, 3 of val, none of test
    command = ["--stage", "ft", *common, "--accum", 1, "--lang-encoder-path", llm]
    command += ["--places", tmp_path / "c" / "places.json"]
    started = ["--start", tmp_path / "c"]
    for arguments, message in (
        (started, "--freeze vision_encoder"),
        (["--freeze", "vision_encoder"], "evidence head"),
        ([*started, "--freeze", "vision_encoder", "proj."], "no LoRA is left to train"),
    ):
        done = call(train, *command, *arguments, "--out", tmp_path / "x", log=log)
        assert done.returncode == 2 and message in done.text, done.text
    frozen = [*started, "--freeze", "vision_encoder", "--key-weight", 3]
    done = call(train, *command, *frozen, "--out", tmp_path / "ft", log=log)
    assert done.returncode == 0, done.text
    model, text, config = load_model(tmp_path / "ft", llm)
    kept = load_file(tmp_path / "c" / "vision.safetensors")
    assert config["embedding"]["evidence_head"]
    for name in ("evidence_head", "evidence_vote", "vision_encoder.to_patch_embedding.2"):
        name = f"{name}.weight"
        assert torch.equal(model.embedding_layer.state_dict()[name], kept[f"embedding_layer.{name}"]), name
