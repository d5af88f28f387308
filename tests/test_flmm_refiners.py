"""flmm: SAM-HQ, SAM 2 and SAM 3's tracker as mask refiners, and pictures that are encoded once."""

import h5py
import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from PIL import Image

from common.errors import UserError
from flmm.data.cache import CachedFeatures, write_cache
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.models.flmm import FLMM, extract
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, SAMWrapper, load_sam
from flmm.models.tiny import tiny_sam
from flmm.models.tiny_bases import tiny_base

KINDS = ("sam_hq", "sam2", "sam3_tracker")
SIZE = (40, 60)  # height x width of the picture
DECODER = dict(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32)
FEATURES = dict(backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=32)


def refiner(kind):
    """A random model of a mask refiner's real class."""
    torch.manual_seed(0)
    prompts = dict(hidden_size=32, image_size=64, patch_size=16, mask_input_channels=8)
    if kind == "sam_hq":
        vision = dict(hidden_size=32, mlp_dim=64, num_hidden_layers=3, num_attention_heads=2, image_size=64)
        vision |= dict(patch_size=4, output_channels=32, num_pos_feats=16, window_size=7)
        vision |= dict(initializer_range=0.1)  # the default of 1e-10 would leave no features
        config = hf.SamHQConfig(
            vision_config={**vision, "global_attn_indexes": [0, 2]},
            prompt_encoder_config={**prompts, "patch_size": 4},
            mask_decoder_config={**DECODER, "vit_dim": 32},
        )
        model = hf.SamHQModel(config)
    elif kind == "sam2":
        tower = dict(model_type="sam2_hiera_det_model", hidden_size=16, image_size=[64, 64])
        tower |= dict(blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[16, 32, 64, 128])
        tower |= dict(window_size_per_stage=[8, 4, 4, 2], global_attention_blocks=[3])
        vision = dict(backbone_config=tower, backbone_channel_list=[128, 64, 32, 16], **FEATURES)
        config = hf.Sam2Config(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER
        )
        model = hf.Sam2Model(config)
    else:
        tower = dict(model_type="sam3_vit_model", hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        tower |= dict(num_attention_heads=2, image_size=56, patch_size=14, pretrain_image_size=56)
        tower |= dict(window_size=2, global_attn_indexes=[1])
        vision = dict(model_type="sam3_vision_model", backbone_config=tower, **FEATURES)
        prompts |= dict(image_size=56, patch_size=14)
        config = hf.Sam3TrackerConfig(
            vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER
        )
        model = hf.Sam3TrackerModel(config)
    # published files hold the same numbers twice
    shared = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding.data.copy_(shared)
    if hasattr(model, "no_memory_embedding"):
        torch.nn.init.normal_(model.no_memory_embedding)
    return model.eval()


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), np.uint8))


@torch.no_grad()
def test_sam_hq_decodes_with_the_features_of_its_first_global_layer():
    """They are the whole of what SAM-HQ adds, and weigh little in a random decoder: these weigh much."""
    model, coarse = refiner("sam_hq"), torch.randn(1, 10, 15)
    for name, weight in model.mask_decoder.named_parameters():
        if weight.ndim > 1 and ("compress_vit" in name or "hq_" in name):
            weight.normal_(std=0.5)
    encoder, wrapper = SAMImageEncoder(model), SAMWrapper(model, use_text=False).eval()
    embedding = encoder([picture()])
    layers = model.vision_encoder(encoder.preprocess(picture())[None]).intermediate_embeddings
    first, last = layers[0].flatten(), layers[1].flatten()
    assert torch.equal(embedding[0].flatten()[-len(first) :], first) and not torch.equal(first, last)

    [(logits, _)] = wrapper(list(embedding), [SIZE], [coarse], [[None]])
    embedding = embedding.clone()
    embedding[0, -len(first) :] = first.flip(0)
    [(changed, _)] = wrapper(list(embedding), [SIZE], [coarse], [[None]])
    assert (logits - changed).abs().max() > 0.1 * logits.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_masks_of_every_refiner_equal_those_of_transformers_own_model(kind):
    model, image, coarse = refiner(kind), picture(), torch.randn(2, 10, 15)
    encoder, wrapper = SAMImageEncoder(model), SAMWrapper(model, use_text=False).eval()
    [(logits, scores)] = wrapper(list(encoder([image])), [SIZE], [coarse], [[None, None]])
    boxes, masks = wrapper.boxes(coarse, SIZE), wrapper.prompt_masks(coarse, SIZE)
    for k in range(2):
        out = model(
            pixel_values=encoder.preprocess(image)[None],
            input_boxes=boxes[k][None, None],
            input_masks=masks[k][None],
            multimask_output=False,
        )
        wanted, _ = wrapper._enlarge(out.pred_masks[:, 0], out.iou_scores[:, 0], coarse[k : k + 1], SIZE)
        torch.testing.assert_close(logits[k], wanted[0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(scores[k], out.iou_scores.flatten()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, options",
    [("sam_hq", {"use_mask": False}), ("sam2", {"use_box": False, "multimask_output": True}), (KINDS[2], {})],
)
def test_a_head_with_another_refiner_learns_is_saved_and_loads(kind, options, tmp_path):
    refiner(kind).save_pretrained(tmp_path)
    base, sam = tiny_base("llava"), load_sam(tmp_path, None)
    encoder = SAMImageEncoder(sam)
    head = FLMM(*base.dims, sam, {"base_channels": 4}, options)
    record = {"image": picture(), "pieces": caption_of_phrases(["red cross", "a small blue ring"])}
    features = extract(base, encoder, [SampleBuilder.of(base, encoder)(record)])
    head.compute_loss(head(features), [torch.ones(2, *SIZE)])["loss"].backward()
    trained = {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"text_proj.weight", "sam.mask_decoder.mask_tokens.weight"} <= trained
    assert not any("conv_s0" in name or "conv_s1" in name for name in trained)  # of the frozen half

    other = FLMM(*base.dims, sam, {"base_channels": 4}, options)
    other.load_upstream(head.upstream_state())
    with torch.no_grad():
        for ours, theirs in zip(head.eval()(features)[0].values(), other.eval()(features)[0].values()):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_a_folder_of_another_model_is_no_refiner(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds a llama; a mask refiner is one of sam,"):
        load_sam(tmp_path, None)


def test_a_picture_is_encoded_once_for_all_records_and_stored_once(tmp_path, monkeypatch):
    base, encoder = tiny_base("llava"), SAMImageEncoder(tiny_sam())
    build, mask = SampleBuilder.of(base, encoder), np.ones((1, *SIZE), np.uint8)
    pictures = [picture(0), picture(1), picture(0), picture(0)]  # equal pixels, other objects
    records = [
        {"image": image, "pieces": [(text, 0)], "masks": mask} for image, text in zip(pictures, "abcd")
    ]
    samples = [build({**record, "file_name": f"{k}.jpg"}) for k, record in enumerate(records)]
    wanted, seen = SAMImageEncoder(tiny_sam())(pictures), []
    inner = encoder.sam.get_image_embeddings
    monkeypatch.setattr(encoder.sam, "get_image_embeddings", lambda p: seen.append(len(p)) or inner(p))

    features = extract(base, encoder, samples[:2]) + extract(base, encoder, samples[2:])
    assert seen == [1, 1]
    for feature, embedding in zip(features, wanted):
        assert torch.equal(feature["image_embedding"], embedding)

    encoder.kept.clear()
    write_cache(tmp_path, base, encoder, samples, {}, Accelerator(cpu=True))
    assert sum(seen) == 4
    with h5py.File(tmp_path / "features-00000.h5") as file:
        stored = [file[f"{k:08d}/image_embedding"] for k in range(4)]
        assert stored[0] == stored[2] == stored[3] != stored[1]
    cached = CachedFeatures(tmp_path)
    for k, embedding in enumerate(wanted):
        torch.testing.assert_close(cached[k]["image_embedding"], embedding, rtol=2e-3, atol=2e-3)
