"""studies/flmm: the recipes at smoke size, and what the report computes."""

import importlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import studies.recipe
from common.errors import UserError
from common.tiny_llm import make_tokenizer
from flmm.data.scenes import all_texts, make_scene
from flmm.models.frozen_efficientnet import EfficientNetLite, EfficientNetLiteConfig
from flmm.models.tiny import TEXT, tiny_sam
from studies.flmm import builtin, model, pilot, real, report
from studies.flmm.pretrain_sam import PromptedSAM, Prompts
from studies.flmm.teach_base import boxes_of
from tests import forked

ROOT = studies.recipe.ROOT


def photographs(folder):
    """Scenes in the plain phrase format in place of photographs: a training and a held-out folder."""
    for name, indices in (("train_a", range(8)), ("val_b", range(8, 10))):
        images = []
        for i in indices:
            scene, segments = make_scene(5, i), np.zeros((64, 64), np.uint8)
            for k, mask in enumerate(scene["masks"]):
                segments[mask] = k + 1
            for kind, array in (("images", scene["image"]), ("masks", segments)):
                (folder / name / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / name / kind / f"{i}.png")
            ids = range(1, len(scene["masks"]) + 1)
            images.append(
                {
                    "id": i,
                    "file": f"{i}.png",
                    "segments": [{"id": k, "category": 1, "isthing": True} for k in ids],
                    "phrases": [
                        {"caption": -1, "text": text, "segment_ids": [k]}
                        for k, text in zip(ids, scene["phrases"])
                    ],
                }
            )
        (folder / name / "annotations.json").write_text(json.dumps({"images": images}))


def tiny_llm(folder):
    """A random language model of SmolLM2's class with a tokenizer, and a random tower's weights."""
    tokenizer = make_tokenizer(all_texts(), 480, [])
    config = LlamaConfig(**TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    torch.save(EfficientNetLite(EfficientNetLiteConfig(64)).state_dict(), folder / "tower.pth")


@pytest.mark.slow
def test_the_recipes_run_from_data_to_report(tmp_path, monkeypatch):
    """Every stage runs in a fork instead of a process of its own, with the options of the command line."""
    runs, stages = tmp_path / "runs", []
    photographs(tmp_path / "real/grounding")
    tiny_llm(tmp_path)

    def stage(script, *arguments, **flags):
        stages.append(script)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        words = [*arguments, *studies.recipe.options(flags)]
        done = forked.call(module, words, tmp_path / f"{len(stages)}.txt")
        assert done.returncode == 0, f"{script}: {done.text[-3000:]}"

    monkeypatch.setattr(studies.recipe, "SMOKE", True)
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
    monkeypatch.setenv("SEEDS", "0")
    monkeypatch.setattr(real, "CONTROLS", ("llm",))  # one of the two, which differ in a word
    for module in (builtin, real):
        monkeypatch.setattr(module, "stage", stage)
        monkeypatch.setattr(module, "RUNS", runs)
        monkeypatch.setattr(module, "OUT", runs / "flmm")
    for module in (model, builtin):
        monkeypatch.setattr(module, "SAM", runs / "flmm/sam/sam_tiny.safetensors")
    monkeypatch.setattr(model, "OUT", runs / "flmm")
    monkeypatch.setattr(builtin, "SCENES", tmp_path / "scenes")
    monkeypatch.setattr(real, "REAL", tmp_path / "real")
    monkeypatch.setattr(real, "smollm2", lambda: tmp_path / "llm")
    monkeypatch.setattr(real, "efficientnet_lite0", lambda: tmp_path / "tower.pth")
    builtin.main()
    real.main()

    assert stages.count("flmm/train.py") == 4 and stages[-1] == "studies/flmm/report.py"
    rows = [json.loads(path.read_text()) for path in (runs / "flmm/results").glob("*.json")]
    assert {row["task"] for row in rows} == {
        "mask head on a frozen tiny llava base",
        "masks refined by SAM, llava base",
        "presence, llava",
        "objects that hide each other, llava",
        "shape words of the base, llava",
        "base untouched, llava",
        "keyword selector, llava",
        "photographs, EfficientNet-lite0 and SmolLM2-135M",
    }
    untouched = next(row for row in rows if row["task"] == "base untouched, llava")
    assert untouched["value"] == 0 and untouched["controls"]["compared"] > 0
    photographed = next(row for row in rows if row["task"].startswith("photographs"))
    expected = {"random llm", "pilot", "whole picture", "another phrase's mask"}
    assert expected <= set(photographed["controls"])
    assert {"random llm", "pilot", "whole picture"} == set(photographed["details"]["intervals"])
    assert not list((runs / "flmm").glob("cache*"))  # features are only kept while a head needs them


def test_the_real_study_needs_folders_to_learn_from_and_to_score(tmp_path, monkeypatch):
    photographs(tmp_path / "grounding")
    (tmp_path / "grounding/train_a").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(real, "REAL", tmp_path)
    with pytest.raises(UserError, match="needs folders train\\*"):
        real.main()
    monkeypatch.setattr(real, "REAL", None)
    with pytest.raises(UserError, match="DATA_ROOT names no folder"):
        real.main()


def test_the_tiny_sam_learns_with_its_image_encoder_and_keeps_its_position_code():
    prompted, samples = PromptedSAM(tiny_sam()), [Prompts(0, 4)[i] for i in range(2)]
    logits, scores = prompted(samples, use_mask=True)
    assert (
        logits.shape == (sum(len(s["masks"]) for s in samples), 64, 64) and scores.shape == logits.shape[:1]
    )
    logits.sum().backward()
    assert prompted.sam.vision_encoder.patch_embed.projection.weight.grad.abs().sum() > 0
    assert prompted.sam.prompt_encoder.shared_embedding.positional_embedding.grad is None
    # a scene is its seed and index
    assert torch.equal(Prompts(0, 4)[3]["blurred"], Prompts(0, 9)[3]["blurred"])


def test_the_box_of_a_phrase_holds_the_cells_between_its_parts():
    masks = torch.zeros(2, 64, 64)
    masks[0, 5, 20], masks[0, 40, 60] = 1, 1  # two pixels, in the cells (0, 1) and (2, 3) of 4 x 4
    box = boxes_of(masks, 4)[0].view(4, 4)
    assert box.nonzero().tolist() == [[row, column] for row in (0, 1, 2) for column in (1, 2, 3)]
    assert not boxes_of(masks, 4)[1].any()


# --- the report


TABLE = [
    {"file": "a", "phrase": "red circle", "iou": "0.8", "score": "0.9"},
    {"file": "a", "phrase": "red cross", "iou": "0.4", "score": "0.5"},
    {"file": "b", "phrase": "blue cross", "iou": "0.3", "score": "0.6"},
]


def test_the_pilot_finds_places_whose_features_go_with_the_words_and_cuts_the_padding():
    torch.manual_seed(0)
    vocabulary = torch.randn(6, 16)
    turn = torch.linalg.qr(torch.randn(16, 16)).Q  # features and words have no direction in common
    border = {"before_height": 0, "after_height": 8, "before_width": 0, "after_width": 0}
    shapes = {"image_shape": {"height": 8, "width": 16}, "padded_shape": {"height": 16, "width": 16}}

    def sample():
        """A picture of two things, one in its left and one in its right half, above padding."""
        words = vocabulary[torch.randperm(6)[:2]]
        halves = (words @ turn).T[:, None].repeat_interleave(4, 2).expand(-1, 8, -1)
        masks = torch.zeros(2, 8, 16)
        masks[0, :, :8] = masks[1, :, 8:] = 1
        meta = {"padding": border, **shapes}
        return {"features": halves, "words": words, "masks": masks, "meta_data": meta}

    learner = pilot.Pilot(16, 16)
    pilot.learn(learner, [sample() for _ in range(24)], 60)
    learner.eval()
    fresh = sample()
    found = pilot.predict(learner, fresh) > 0
    assert found.shape == (2, 8, 16) and (found == fresh["masks"].bool()).float().mean() > 0.9


def test_words_and_confident_masks_are_averaged_over_their_phrases():
    words = report.per_word(TABLE)
    assert words == pytest.approx({"red": 0.6, "circle": 0.8, "cross": 0.35, "blue": 0.3})
    assert report.confident(TABLE) == pytest.approx((1.1 / 3, 2 / 3))  # a score of .5 is not above one half


def test_the_interval_covers_other_pictures_and_keeps_their_phrases_together():
    """Two pictures: the mean is that of one, of the other, or of both; of 1000 draws a quarter is each of the
    first."""
    low, high = report.interval([TABLE], "iou")
    assert (low, high) == pytest.approx((0.3, 0.6))
    # three seeds that have scored one table alike know no more of other pictures than one does
    assert report.interval([TABLE] * 3, "iou") == pytest.approx((low, high))
    one = report.interval([[{"file": "a", "iou": "0.1"}], [{"file": "a", "iou": "0.9"}]], "iou")
    assert one == pytest.approx((0.5, 0.5))


def test_an_average_goes_over_the_seeds():
    parts = [{"controls": {"raw": 0.2}}, {"controls": {"raw": 0.6}}]
    assert report.average(parts, "controls", "raw") == pytest.approx(0.4)
