"""flmm: bases, rows, heads, checkpoints, conversation."""

import http.client
import importlib.util
import io
import itertools
import json
import re
import socket
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from common.errors import UserError
from common.weights import read_weights
from flmm import check_base, diagnose_image_grid_thw, draw
from flmm.build import FAMILIES
from flmm.conversation import (
    Grounder,
    KeywordSelector,
    answer_then_ground,
    noun_phrases,
    runs,
    spans_of_noun_phrases,
)
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.data.scenes import make_scene
from flmm.data.transforms import LlavaImageProcessor, QwenImageProcessor
from flmm.draw import colours, overlay
from flmm.models.flmm import FLMM, confidence, extract
from flmm.models.frozen_base import FrozenBase
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, load_sam, original_keys, sam_from_original
from flmm.models.tiny import ROPE, qwen_tokens, save_base, text_config, tiny_sam, tiny_tokenizer
from flmm.models.tiny_bases import tiny_base
from flmm.scripts.deepspeed2torch_state_dict import main as deepspeed2torch
from flmm.scripts.demo.page import make_server
from flmm.scripts.visual_cot import visual_cot
from flmm.scripts.visual_cot.visual_cot import chain_of_thought, tokens_in_box, visual_cot_resample
from tests import forked

ROOT = Path(__file__).resolve().parents[1]
ALL = ["llava", "llava_next", "deepseek_vl", "qwen"]
SMALL = {"base_channels": 4, "upsample_input": 16}


def scene_samples(base, count=2):
    build, scenes = SampleBuilder.of(base), [make_scene(1, i) for i in range(count)]
    return [build({**scene, "image": Image.fromarray(scene["image"])}) for scene in scenes]


@pytest.mark.slow
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("merge", ["mean", "max"])
def test_rows_equal_full_matrices_alone_and_in_a_left_padded_batch(family, merge):
    base = tiny_base(family, merge=merge)
    samples = scene_samples(base, 3)
    assert len({len(s["input_ids"]) for s in samples}) > 1  # so that something is padded
    wanted = check_base.reread(base, samples, "eager")
    for got in ([base([s])[0] for s in samples], base(samples)):
        for key in ("mask_attentions", "hidden_states"):
            assert check_base.distance(got, wanted, key) < 1e-5
        assert all(torch.equal(ours["mask_ids"], theirs["mask_ids"]) for ours, theirs in zip(got, wanted))
    assert wanted[0]["mask_attentions"].shape[1] == base.channels


def test_qwen_without_token_types_would_differ():
    base = tiny_base("qwen")
    [sample] = scene_samples(base, 1)
    right = base([sample])[0]["mask_attentions"]
    build = base.build_inputs
    base.build_inputs = lambda *args: {k: v for k, v in build(*args).items() if k != "mm_token_type_ids"}
    assert (base([sample])[0]["mask_attentions"] - right).abs().max() > 1e-5


@pytest.mark.parametrize("family", ALL)
def test_one_pass_after_generation_gives_the_rows_of_generation(family):
    base, eager = tiny_base(family), tiny_base(family, attention="eager")
    [sample] = scene_samples(base, 1)
    prompt = torch.tensor(base.encode_prompt())
    ids = base.generate({**sample, "input_ids": prompt}, 6, eos_token_id=[])
    full = eager.expand(prompt, sample)[None]
    extra = eager.build_inputs([sample], full, torch.ones_like(full))
    extra.pop("position_ids", None)
    out = eager.model.generate(
        input_ids=full,
        attention_mask=torch.ones_like(full),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=[],
        return_dict_in_generate=True,
        output_attentions=True,
        **extra,
    )
    assert out.sequences[0, full.shape[1] :].tolist() == ids  # SDPA and eager write the same answer
    columns = (full[0] == base.image_token_id).nonzero().flatten()
    probe = {
        **sample,
        "input_ids": torch.cat([prompt, torch.tensor(ids)]),
        "mask_ids": torch.cat([torch.full_like(prompt, -1), torch.arange(len(ids))]),
    }
    rows = base([probe])[0]["mask_attentions"]
    for step in range(1, len(ids)):  # the row *of* token i comes with step i + 1, when it is the query
        maps = [layer[0][:, -1:, columns] for layer in out.attentions[step]]
        torch.testing.assert_close(
            rows[step - 1], base.to_grid(maps, base.grid(sample))[0], atol=1e-6, rtol=0
        )


def test_training_a_head_leaves_every_weight_of_the_base_unchanged():
    base, sam = tiny_base("llava"), tiny_sam()
    encoder, model = SAMImageEncoder(sam), FLMM(*base.dims, sam, SMALL)
    frozen = [base.model, encoder.encoder]
    before = [{k: v.clone() for k, v in part.state_dict().items()} for part in frozen]
    samples = scene_samples(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        parts = model.compute_loss(model(extract(base, encoder, samples)), [s["masks"] for s in samples])
        parts["loss"].backward()
        optimizer.step()
    assert not base.model.training
    for part, old in zip(frozen, before):
        assert all(torch.equal(value, old[key]) for key, value in part.state_dict().items())
    assert model.text_layer_weights.grad is not None and model.text_proj.weight.grad.abs().sum() > 0


def test_phrases_decoded_together_equal_phrases_decoded_one_by_one():
    base, sam = tiny_base("llava"), tiny_sam()
    encoder = SAMImageEncoder(sam)
    model = FLMM(*base.dims, sam, SMALL, {"per_phrase_pad": True}).eval()
    image = Image.fromarray(make_scene(3, 0)["image"])
    sample = SampleBuilder.of(base)(
        {"image": image, "pieces": caption_of_phrases(["red small circle", "cross", "blue large", "a"])}
    )
    [feature] = extract(base, encoder, [sample])
    with torch.no_grad():
        [together] = model([feature])
        for k in range(4):
            keep = feature["mask_ids"] == k
            part = {"mask_ids": feature["mask_ids"][keep] * 0}
            part |= {"mask_attentions": feature["mask_attentions"][k : k + 1]}
            part |= {"hidden_states": feature["hidden_states"][:, keep]}
            [alone] = model([{**feature, **part}])
            for name in ("sam_pred_masks", "scores"):
                torch.testing.assert_close(alone[name][0], together[name][k], atol=1e-5, rtol=1e-4)


def test_every_phrase_weighs_the_same_however_many_its_picture_has():
    torch.manual_seed(0)
    model, logits, target = FLMM(6, 3, 16, None, SMALL), torch.randn(4, 8, 8), torch.randint(0, 2, (4, 8, 8))
    [whole], parts = (
        [{"pred_masks": p, "sam_pred_masks": None} for p in logits.split(sizes)] for sizes in ([4], [1, 3])
    )
    one, two = model.compute_loss([whole], [target]), model.compute_loss(parts, target.split([1, 3]))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)


# ---- checkpoints


# the keys of a published head, written out from the specification; {a,b} is one of them
PUBLISHED_KEYS = """
text_layer_weights
text_proj.{weight,bias}
mask_head.conv_seg.{weight,bias}
mask_head.encoder.{0.0,1.1,2.1,3.1}.convs.{0,1}.{conv.weight,gn.weight,gn.bias}
mask_head.decoder.{0,1,2}.conv_block.convs.{0,1}.{conv.weight,gn.weight,gn.bias}
mask_head.decoder.{0,1,2}.upsample.interp_upsample.1.{conv.weight,gn.weight,gn.bias}
sam.model.prompt_encoder.point_embeddings.{0,1,2,3}.weight
sam.model.prompt_encoder.{not_a_point_embed,no_mask_embed}.weight
sam.model.prompt_encoder.mask_downscaling.{0,1,3,4,6}.{weight,bias}
sam.model.mask_decoder.{iou_token,mask_tokens}.weight
sam.model.mask_decoder.transformer.layers.{0,1}.self_attn.{q,k,v,out}_proj.{weight,bias}
sam.model.mask_decoder.transformer.layers.{0,1}.cross_attn_token_to_image.{q,k,v,out}_proj.{weight,bias}
sam.model.mask_decoder.transformer.layers.{0,1}.cross_attn_image_to_token.{q,k,v,out}_proj.{weight,bias}
sam.model.mask_decoder.transformer.layers.{0,1}.norm{1,2,3,4}.{weight,bias}
sam.model.mask_decoder.transformer.layers.{0,1}.mlp.lin{1,2}.{weight,bias}
sam.model.mask_decoder.transformer.final_attn_token_to_image.{q,k,v,out}_proj.{weight,bias}
sam.model.mask_decoder.transformer.norm_final_attn.{weight,bias}
sam.model.mask_decoder.output_upscaling.{0,1,3}.{weight,bias}
sam.model.mask_decoder.output_hypernetworks_mlps.{0,1,2,3}.layers.{0,1,2}.{weight,bias}
sam.model.mask_decoder.iou_prediction_head.layers.{0,1,2}.{weight,bias}
"""


def written_out(pattern):
    """All names of a pattern."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(choice) for choice in itertools.product(*parts)]


def test_a_saved_head_has_exactly_upstreams_keys_and_loads_again(tmp_path):
    model = FLMM(6, 3, 16, tiny_sam(), SMALL)
    state = model.upstream_state()
    assert set(state) == {key for line in PUBLISHED_KEYS.split() for key in written_out(line)}
    nested = {"meta": {"epoch": 1}, "state_dict": {f"module.{k}": v.bfloat16() for k, v in state.items()}}
    nested["state_dict"]["module.llm.lm_head.weight"] = torch.zeros(2)  # base weights may lie in the file too
    torch.save(nested, tmp_path / "published.pth")
    other = FLMM(6, 3, 16, tiny_sam(seed=5), SMALL)
    report = other.load_upstream(read_weights(tmp_path / "published.pth"), "published.pth")
    assert f"loaded {len(state)} tensors, ignored 1" in report
    for key, value in other.upstream_state().items():
        torch.testing.assert_close(value, state[key].bfloat16().float(), atol=0, rtol=0)


def test_a_head_with_missing_keys_is_refused_with_their_names():
    model = FLMM(6, 3, 16, tiny_sam(), SMALL)
    state = model.upstream_state()
    del state["text_proj.bias"], state["mask_head.conv_seg.weight"]
    with pytest.raises(
        UserError, match="2 of .* keys are missing: mask_head.conv_seg.weight, text_proj.bias"
    ):
        model.load_upstream(state, "cut.pth")


def test_a_head_of_another_base_is_refused_by_name_and_shape():
    state = FLMM(6, 3, 16, tiny_sam(), SMALL).upstream_state()
    with pytest.raises(
        UserError,
        match=r"mask_head.encoder.0.0.convs.0.conv.weight is \(4, 6, 3, 3\), this model needs \(4, 8, 3, 3\)",
    ):
        FLMM(8, 3, 16, tiny_sam(), SMALL).load_upstream(state, "head.pth")


def test_the_score_without_sam_is_the_mean_probability_inside_the_mask():
    logits = torch.tensor([[[2.0, -9.0]], [[-9.0, -9.0]], [[2.0, 0.5]]])
    inside = torch.tensor([2.0, 0.5]).sigmoid()
    torch.testing.assert_close(confidence(logits), torch.stack([inside[0], torch.tensor(0.0), inside.mean()]))


@pytest.mark.parametrize(
    "channels,count",
    [(384, 7_403_969), (576, 7_514_561), (784, 7_634_369), (1024, 7_772_609), (2048, 8_362_433)],
)
def test_mask_head_has_the_published_number_of_parameters(channels, count):
    from flmm.models.mask_head.mask_decoder import UNetHead

    with torch.device("meta"):
        assert sum(p.numel() for p in UNetHead(channels).parameters()) == count


def test_sam_loads_alike_from_original_keys_and_from_a_transformers_folder(tmp_path):
    sam = tiny_sam()
    names = original_keys(sam.state_dict())
    originals = {names[k]: v.clone() for k, v in sam.state_dict().items() if not k.startswith("shared_image")}
    torch.save(originals, tmp_path / "sam_vit_tiny.pth")
    sam.save_pretrained(tmp_path / "folder")
    image = [Image.fromarray(make_scene(0, 1)["image"])]
    wanted = SAMImageEncoder(sam)(image)
    for path in ("sam_vit_tiny.pth", "folder"):
        loaded = load_sam(tmp_path / path, read_weights)
        torch.testing.assert_close(SAMImageEncoder(loaded)(image), wanted, atol=1e-6, rtol=0)
    assert sam_from_original(originals, 4).config.vision_config.global_attn_indexes == [2]
    for change in ({"image_encoder.pos_embed": None}, {"mask_decoder.hf_token.weight": torch.ones(1, 4)}):
        torch.save({k: v for k, v in {**originals, **change}.items() if v is not None}, tmp_path / "no.pth")
        with pytest.raises(UserError, match="no.pth: not a readable original SAM checkpoint"):
            load_sam(tmp_path / "no.pth", read_weights)


def test_deepspeed_shards_become_the_fp32_head(tmp_path):
    state = FLMM(6, 3, 16, tiny_sam(), SMALL).upstream_state()
    shapes = {k: v.shape for k, v in state.items()}
    flat = torch.cat([v.flatten() for v in state.values()])
    # padded so that it divides; rank 10 comes after rank 9, not after rank 1
    flat = torch.cat([flat, torch.zeros(-len(flat) % 11)])
    folder = tmp_path / "iter_10.pth"
    folder.mkdir()
    module = {k: v.bfloat16() for k, v in state.items()}
    torch.save({"module": module, "param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(flat.chunk(11)):
        shard = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [part.clone()]}}
        torch.save(shard, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    args = Namespace(folder=folder, output=tmp_path / "head.safetensors")
    deepspeed2torch(args)
    for key, value in read_weights(args.output).items():
        assert torch.equal(value, state[key]), key
    torch.save({"model": {}}, folder / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="model_states.pt: the file has no field 'module'"):
        deepspeed2torch(args)


# ---- conversation


@pytest.fixture(scope="module")
def grounder():
    base, sam = tiny_base("llava"), tiny_sam()
    torch.manual_seed(0)
    head = FLMM(*base.dims, sam, SMALL)
    return Grounder(base, head, SAMImageEncoder(sam))


def test_ground_gives_masks_boxes_rle_and_scores_at_the_size_of_the_picture(grounder):
    from pycocotools import mask as coco

    image = Image.fromarray(make_scene(0, 2)["image"]).resize((90, 50))
    result = grounder.ground(image, ["red circle", "a blue square"])
    assert result["masks"].shape == (2, 50, 90)
    for mask, box, rle, score in zip(result["masks"], result["boxes"], result["rle"], result["scores"]):
        assert np.array_equal(coco.decode(rle).astype(bool), mask)
        assert (box is None) == (not mask.any()) and isinstance(score, float)
    json.dumps(result["rle"])


def test_a_picture_may_be_a_path_an_open_picture_or_an_array(grounder, tmp_path):
    image = Image.fromarray(make_scene(0, 2)["image"])
    image.save(path := tmp_path / "街 a.png")
    wanted = grounder.ground(image, ["red"])["masks"]
    for given in (path, str(path), np.asarray(image), np.asarray(image.convert("RGBA"))):
        assert np.array_equal(grounder.ground(given, ["red"])["masks"], wanted)
    assert grounder.ground(np.asarray(image)[..., 0], ["red"])["masks"].shape == (1, 64, 64)
    assert grounder.converse(path, max_new_tokens=2)["masks"].shape[1:] == (64, 64)
    (tmp_path / "no.png").write_bytes(b"no picture")
    for given, reason in (
        (tmp_path / "none.png", "none.png: no such file"),
        (tmp_path / "no.png", "not a readable picture"),
        (tmp_path, "is a folder, not a readable picture; give the file itself"),
        (np.asarray(image) / 255, r"image is ndarray of shape \(64, 64, 3\) and type float64; give a path"),
        (np.zeros((3, 64, 64), np.uint8), r"image is ndarray of shape \(3, 64, 64\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        ([image, image], r"image is list of shape \(2, 64, 64, 3\)"),
        (None, "image is NoneType"),
        ([[1], [2, 3]], "image: not a readable picture"),
    ):
        with pytest.raises(UserError, match=reason):
            grounder.ground(given, ["red"])
    with pytest.raises(UserError, match="phrases hold 5, which is no text"):
        grounder.ground(image, ["red", 5])


def test_a_phrase_with_a_different_word_gets_a_different_map(grounder):
    image = Image.fromarray(make_scene(0, 2)["image"])
    builder = grounder.builder
    one, two = (
        grounder.base([builder({"image": image, "pieces": caption_of_phrases([p])})])[0]["mask_attentions"]
        for p in ("red", "blue")
    )
    assert (one - two).abs().max() > 1e-4


def test_text_is_cut_at_its_noun_phrases_and_converse_needs_no_terminal(grounder):
    image = Image.fromarray(make_scene(0, 2)["image"])
    result = grounder.ground(image, text="A red circle is beside a blue square.")
    assert result["phrases"] == ["A red circle", "a blue square"]
    spoken = grounder.converse(image, max_new_tokens=5)
    assert spoken["answer"] and len(spoken["phrases"]) == len(spoken["masks"]) >= 1
    both = [image, image.resize((40, 90))]
    later = grounder.converse(both, "And now?", 5, history=[("What?", spoken["answer"])], look=1)
    assert later["masks"].shape[1:] == (90, 40)


@pytest.mark.parametrize("family", ["llava", "deepseek_vl", "qwen"])
def test_resampling_the_whole_picture_is_a_plain_answer_and_a_box_leaves_its_tokens_only(family):
    base = tiny_base(family)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    sample = SampleBuilder.of(base)({"image": image, "pieces": caption_of_phrases(["red circle"])})
    seen = {}
    text = base.model.model.language_model
    hook = text.register_forward_pre_hook(lambda module, args, inputs: seen.update(inputs), with_kwargs=True)
    base([sample])
    hook.remove()
    start = base.encode_prompt().index(base.image_token_id)
    span = slice(start, start + 64)
    embeds, positions = seen["inputs_embeds"][0, span], seen["position_ids"][..., 0, span]
    question = "Which shape is red?"
    plain = base.generate({**sample, "input_ids": torch.tensor(base.encode_prompt(question))}, 8)
    assert (
        visual_cot_resample(base, sample, embeds, positions, [0, 0, 64, 64], question, 8)
        == base.tokenizer.decode(plain).strip()
    )
    # 8-pixel tokens: pixels 10..17 touch columns 1 and 2, 30..31 row 3; a point still has one token
    assert tokens_in_box([10, 30, 17, 31], sample, (8, 8)).tolist() == [25, 26]
    assert tokens_in_box([64, 64, 64, 64], sample, (8, 8)).tolist() == [63]
    blank = embeds.clone()
    blank[[k for k in range(64) if k not in (25, 26)]] = 9.0  # what lies outside the box is never read
    passes = []
    keep = lambda module, args, inputs: passes.append(inputs["position_ids"])
    hook = text.register_forward_pre_hook(keep, with_kwargs=True)
    one = visual_cot_resample(base, sample, embeds, positions, [10, 30, 17, 31], question, 4)
    hook.remove()
    # they keep their places
    assert torch.equal(passes[0][..., 0, start : start + 2], positions[..., [25, 26]])
    assert (passes[0][..., 0, start + 2 :].min() > positions.max()) and len(passes) > 1
    assert visual_cot_resample(base, sample, blank, positions, [10, 30, 17, 31], question, 4) == one


def test_tokens_in_a_box_skip_the_padding_of_a_padded_picture():
    base = tiny_base("llava")
    record = {"image": Image.new("RGB", (128, 64)), "pieces": caption_of_phrases(["sky"])}
    found = tokens_in_box([0, 0, 128, 64], SampleBuilder.of(base)(record), (8, 8))
    assert found.tolist() == list(range(16, 48))  # two rows of padding above and below


def test_chain_of_thought_with_resampling_names_its_box_and_refuses_tiles(grounder, monkeypatch):
    image = Image.fromarray(make_scene(1, 0)["image"])
    result = chain_of_thought(grounder, image, "What is red?", version="v2", resample=True)
    assert set(result) == {"answer", "box", "thought"} and len(result["box"]) == 4
    monkeypatch.setattr(grounder.base, "maps_per_head", 2)
    with pytest.raises(UserError, match="--resample"):
        chain_of_thought(grounder, image, "What is red?", version="v2", resample=True)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--image", "a.png"], "give --image and --question, or --benchmark"),
        (["--benchmark", "{folder}/none.json"], "none.json: holds no question"),
        (["--benchmark", "{folder}/none.json", "--question", "Why?"], "--question has no effect beside"),
        (["--image", "a.png", "--question", "Why?", "--version", "v3", "--resample"], "--resample has no"),
        (["--image", "{folder}/a.png", "--question", "Why?"], "a.png: no such file"),
    ],
)
def test_what_a_chain_of_thought_cannot_use_is_refused(tmp_path, words, reason):
    (tmp_path / "none.json").write_text("[]")
    words = [word.format(folder=tmp_path) for word in ("--config", "c.yaml", "--head", "h.pth", *words)]
    with pytest.raises(UserError, match=reason):
        visual_cot.main(visual_cot.parse_args(words))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16"])
def test_pictures_of_every_mode_can_be_grounded(grounder, mode):
    image = Image.fromarray(make_scene(0, 2)["image"])
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 200)
    else:
        image = image.convert(mode)
    assert grounder.ground(image, ["red"])["masks"].shape == (1, 64, 64)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (10000, 3), (7, 10000)])
def test_pictures_with_extreme_sides_can_be_grounded(grounder, size):
    assert grounder.ground(Image.new("RGB", size, "red"), ["red"])["masks"].shape == (1, size[1], size[0])


@pytest.mark.parametrize("phrases", [[], [""], ["red", "  "]])
def test_empty_phrases_are_refused(grounder, phrases):
    with pytest.raises(UserError, match="empty phrase"):
        grounder.ground(Image.new("RGB", (64, 64)), phrases)
    with pytest.raises(UserError, match="both phrases and a text"):
        grounder.ground(Image.new("RGB", (64, 64)), phrases, "a dog")


def test_more_phrases_than_any_palette_has_colours():
    assert len(set(colours(150))) > 140
    masks = np.zeros((150, 8, 8), bool)
    masks[149, 0, 0] = True
    drawn = overlay(Image.new("RGB", (8, 8)), masks)
    assert drawn.getpixel((0, 0)) != drawn.getpixel((1, 1))


def test_a_phrase_in_chinese_is_written_where_a_font_has_it_and_numbered_elsewhere(monkeypatch):
    import matplotlib

    monkeypatch.setattr(draw, "FONTS", ("no-such-font.ttf",))
    assert draw.label("红色的车", 2) == ("phrase 2", None) and draw.label("café", 1) == ("café", None)
    monkeypatch.setattr(
        draw, "FONTS", ("no-such-font.ttf", matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf")
    )
    text, font = draw.label("红色的车", 2)
    assert text == "红色的车" and font.getname()[0] == "DejaVu Sans"
    strip = draw.labelled_strip(Image.new("RGB", (64, 64)), [("grounded", np.zeros((1, 64, 64)))], [text])
    assert np.asarray(strip)[-16:, 18:].min() < 128  # something is written


def test_selector_joins_neighbours():
    assert runs([True, True, False, True]) == [(0, 2), (3, 4)]
    selector = KeywordSelector(3, 16)
    with torch.no_grad():
        selector.linear.bias.fill_(-5)
    assert selector.spans(torch.zeros(3, 7, 16)) == []
    with torch.no_grad():
        selector.linear.bias.fill_(-0.7)  # a probability of .33: above the paper's threshold
    assert selector.spans(torch.zeros(3, 7, 16)) == [(0, 7)]


class Bytes:
    """A tokenizer whose tokens are bytes, as those of rare characters are."""

    @staticmethod
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("In the image a man holds it near a red car.", ["a man", "a red car"]),
        ("the carpet under the car, a dog", ["the carpet", "the car", "a dog"]),
        ("a dog — a “cat”; an art cart with art", ["a dog", "cat", "an art cart"]),
        ("café au lait and cafe\u0301 - a red car, car", ["café au lait", "cafe\u0301", "a red car"]),
        ("## the sky\n- **A red car**\n1. two dogs", ["the sky", "A red car", "two dogs"]),
        ("1. 红色的球\n2. **蓝色方块**", ["红色的球", "蓝色方块"]),
        ("一辆车和一列火车，汽车", ["一辆车", "火车", "汽车"]),
        ("图中有一辆红色的汽车，旁边站着一个穿白色衬衫的男人。汽车", ["红色的汽车", "白色衬衫的男人"]),
    ],
)
def test_every_noun_phrase_is_read_where_it_stands_to_its_last_byte(text, phrases):
    assert noun_phrases(text) == phrases
    ids = list(text.encode())
    assert [Bytes.decode(ids[start:end]) for start, end in spans_of_noun_phrases(Bytes, ids)] == phrases


# ---- loading


def saved(family, folder):
    """The folder of a tiny base that was written there."""
    base = tiny_base(family)
    save_base(base.model, base.tokenizer, folder)
    return folder


def test_a_base_of_another_class_and_a_missing_class_are_named(tmp_path, monkeypatch):
    saved("qwen", tmp_path / "qwen")
    with pytest.raises(
        UserError, match="holds a Qwen2_5_VL.*, this configuration needs a LlavaForConditionalGeneration"
    ):
        FAMILIES["llava"].load(tmp_path / "qwen")
    with pytest.raises(UserError, match="nowhere"):
        FAMILIES["llava"].load(tmp_path / "nowhere")
    monkeypatch.setattr(FAMILIES["llava"], "architecture", "LlavaFromTheFuture")
    with pytest.raises(UserError, match="has no LlavaFromTheFuture; install a newer one"):
        FAMILIES["llava"].load(tmp_path / "qwen")


PLAIN = {"template": "plain", "question": "Describe."}


def test_a_saved_base_loads_and_answers_alike_and_random_weights_are_another_base(tmp_path):
    base, folder = tiny_base("llava"), saved("llava", tmp_path / "base")
    loaded = FAMILIES["llava"].load(folder, **PLAIN)
    [sample] = scene_samples(base, 1)
    assert torch.equal(loaded([sample])[0]["mask_attentions"], base([sample])[0]["mask_attentions"])
    control = FAMILIES["llava"].load(folder, random_seed=7, **PLAIN)
    assert not torch.equal(control([sample])[0]["mask_attentions"], base([sample])[0]["mask_attentions"])


@pytest.fixture
def page(grounder):
    """A running page: ask(content, path, **headers) -> (status, answer)."""
    server = make_server(grounder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(content=None, path="/ground?text=red", method="POST", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=forked.PATIENCE)
        given = {"Host": f"127.0.0.1:{server.server_port}", **headers}
        connection.putrequest(method, path, skip_host=True)
        if content is not None and "Content-Length" not in given:
            given["Content-Length"] = str(len(content))
        for name, value in given.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        try:
            connection.send(content or b"")
        except OSError:
            pass  # the server need not read what it refuses
        answer = connection.getresponse()
        body = answer.read().decode()
        return answer.status, json.loads(body) if body.startswith("{") else body

    ask.port = server.server_port
    yield ask
    server.shutdown()
    server.server_close()


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_the_page_answers_with_masks_and_refuses_in_one_line(page):
    status, text = page(path="/", method="GET")
    assert status == 200 and "Masks for words" in text
    picture = png_bytes(Image.fromarray(make_scene(0, 2)["image"]))
    status, good = page(picture, "/ground?text=red%20circle%EF%BC%9Bblue")
    assert status == 200 and good["phrases"] == ["red circle", "blue"] and len(good["masks"]) == 2
    assert good["masks"][0].startswith("data:image/png") and good["presence"] is None
    assert page(picture, "/ground?text=")[1]["answer"]
    assert "not a readable picture" in page(b"no picture")[1]["error"]
    assert "empty phrase" in page(picture, "/ground?text=red%EF%BC%9B;")[1]["error"]


def test_the_page_takes_pictures_of_a_sane_length_kind_and_size(page, monkeypatch):
    for length, status in (("x", 411), ("-5", 411), ("", 411), ("\u00b2", 411), ("9" * 5000, 413)):
        assert page(b"", Content_Length=length.encode("utf8"))[0] == status
    assert page(b"", method="POST", Content_Length="0")[1]["error"].startswith("not a readable picture")
    bomb = png_bytes(Image.new("1", (9000, 9000)))  # twelve kilobytes that hold 81 million pixels
    assert "more than 50 million pixels" in page(bomb)[1]["error"]
    tiff = io.BytesIO()
    Image.new("RGB", (8, 8)).save(tiff, "TIFF")
    assert "not a readable picture of the kinds JPEG" in page(tiff.getvalue())[1]["error"]
    assert page(path="/etc/passwd", method="GET")[0] == page(b"", path="/")[0] == 404


def test_a_failure_of_the_model_is_an_answer_and_not_called_a_bad_picture(page, grounder, monkeypatch):
    monkeypatch.setattr(grounder, "ground", lambda *_: 1 / 0)
    status, answer = page(png_bytes(Image.new("RGB", (32, 32))))
    assert status == 500 and answer["error"].startswith("the model failed")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_page_answers_to_itself_alone(page, method):
    host, path = f"localhost:{page.port}", "/" if method == "GET" else "/ground"
    picture = png_bytes(Image.new("RGB", (32, 32)))
    content = None if method == "GET" else picture
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{page.port}"},
        {"Host": "127.0.0.1"},
        {"Host": host, "Origin": "http://evil.example"},
        {"Host": host, "Origin": "null"},
        {"Host": host, "Origin": f"https://{host}"},
    ):
        status, answer = page(content, path, method, **headers)
        assert status == 403 and "its own page" in answer["error"]
    assert page(content, path, method, Host=host, Origin=f"http://{host}")[0] == 200


def test_a_client_that_sends_nothing_keeps_nobody_waiting(page):
    with socket.create_connection(("127.0.0.1", page.port)) as silent:
        silent.sendall(b"POST /ground?text=x HTTP/1.1\r\nHost: localhost:%d\r\n" % page.port)
        with socket.create_connection(("127.0.0.1", page.port)) as slow:
            slow.sendall(
                b"POST /ground HTTP/1.1\r\nHost: localhost:%d\r\nContent-Length: 99\r\n\r\n" % page.port
            )
            assert page(path="/", method="GET")[0] == 200
            assert page(png_bytes(Image.new("RGB", (32, 32))))[0] == 200


def test_the_diagnosis_passes_a_whole_input_and_names_a_lost_grid(monkeypatch, capsys):
    arguments = Namespace(path=None, width=96, height=48)
    diagnose_image_grid_thw.main(arguments)
    assert "72 image tokens" in capsys.readouterr().out
    whole = QwenImageProcessor.__call__
    monkeypatch.setattr(
        QwenImageProcessor,
        "__call__",
        lambda *args: {k: v for k, v in whole(*args).items() if k != "image_grid_thw"},
    )
    with pytest.raises(UserError, match="use the Qwen2-VL image processor"):
        diagnose_image_grid_thw.main(arguments)
    assert "PROBLEM the processor returns image_grid_thw" in capsys.readouterr().out


def test_a_reasoning_query_is_answered_and_the_answer_is_grounded(grounder, monkeypatch):
    base = grounder.base
    [sample] = scene_samples(base, 1)
    sample = {**sample, "mask_infos": [{"text": "Which one is round?"}], "gt_masks": sample["gt_masks"][:1]}
    answered, text = answer_then_ground(base, sample, 5)
    prompt = base.encode_prompt("Which one is round?")
    ids, mask_ids, asked = answered["input_ids"], answered["mask_ids"], len(prompt)
    assert ids[:asked].tolist() == prompt and text == base.tokenizer.decode(ids[asked:]).strip()
    assert (mask_ids[:asked] == -1).all() and (mask_ids[asked:] == 0).all()
    [output] = grounder.head(extract(base, grounder.sam_encoder, [answered]))
    assert output["sam_pred_masks"].shape == (1, 64, 64)
    monkeypatch.setattr(base, "generate", lambda *args: [])
    assert answer_then_ground(base, sample) == (sample, "")  # a silent base: the query itself


def test_a_base_placed_by_device_map_reads_alike_and_stays_where_it_is(tmp_path):
    plain = FAMILIES["llava"].load(saved("llava", tmp_path), **PLAIN)
    placed = FAMILIES["llava"].load(tmp_path, device_map="auto", **PLAIN).to("cpu")
    [a], [b] = plain(scene_samples(plain, 1)), placed(scene_samples(placed, 1))
    assert all(torch.equal(a[name], b[name]) for name in ("mask_attentions", "hidden_states"))


def test_a_base_in_four_bits_reads_nearly_alike_or_names_the_missing_package(tmp_path):
    saved("llava", tmp_path)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="bitsandbytes"):
            FAMILIES["llava"].load(tmp_path, load_in_4bit=True, **PLAIN)
        return
    plain = FAMILIES["llava"].load(tmp_path, **PLAIN)
    small = FAMILIES["llava"].load(tmp_path, load_in_4bit=True, **PLAIN).to("cpu")
    [a], [b] = plain(scene_samples(plain, 1)), small(scene_samples(small, 1))
    assert type(small.model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert 0 < (a["mask_attentions"] - b["mask_attentions"]).abs().max() < 0.02


def readme_bases():
    """The classes of the README's section "A new base", executed as they stand there."""
    section = (ROOT / "flmm/README.md").read_text().split("## A new base")[1].split("\n## ")[0]
    space = {"FrozenBase": FrozenBase, "FrozenQwen": FrozenQwen, "LlavaImageProcessor": LlavaImageProcessor}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, space)
    return space["FrozenQwen2"], space["FrozenInternVL"]


@pytest.mark.parametrize("name", ["qwen2", "internvl"])
def test_the_new_bases_of_the_readme_read_rows_and_answer(name):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>"]})
    text, token, qwen2, internvl = text_config(tokenizer), tokenizer.convert_tokens_to_ids, *readme_bases()
    if name == "qwen2":
        kind, grid, preprocessing = qwen2, (12, 16), {"min_pixels": 1024, "max_pixels": 16384}
        vision = dict(depth=2, embed_dim=32, hidden_size=128, mlp_ratio=2, num_heads=4, patch_size=4)
        config = Qwen2VLConfig(
            text_config={**text, "rope_parameters": ROPE}, vision_config=vision, **qwen_tokens(token)
        )
        model = Qwen2VLForConditionalGeneration(config)
    else:
        kind, grid, preprocessing = internvl, (16, 16), {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        config = InternVLConfig(
            text_config={"model_type": "qwen2", **text},
            vision_config=vision,
            image_token_id=token("<IMG_CONTEXT>"),
        )
        model = InternVLForConditionalGeneration(config)
    base = kind(model, tokenizer, kind.make_processor(model.config, preprocessing))
    samples = [
        check_base.sample(base, (128, 96), phrases) for phrases in (["red circle", "sky"], ["a cross"])
    ]
    rows, full = base(samples), check_base.reread(base, samples, "eager")
    assert check_base.distance(rows, full, "mask_attentions") < 1e-5
    assert all(one["mask_attentions"].shape[1:] == (12, *grid) for one in rows)
    assert len(base.generate(samples[0], 3)) <= 3
