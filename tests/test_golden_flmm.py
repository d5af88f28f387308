"""Every reference file of GOLDEN_DIR/flmm, by kind (file-name prefix); the configuration comes from the
file's metadata."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from common.train import lr_at
from flmm import losses, metrics
from flmm.conversation import find_interval, process_noun_chunks
from flmm.data.png import PNGDataset
from flmm.data.refcoco import RefCOCODataset
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.data.transforms import (
    DeepseekImageProcessor,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    Pad2Square,
)
from flmm.models.attention_rows import merge_rows
from flmm.models.flmm import FLMM
from flmm.models.frozen_llava import FrozenLlava
from flmm.models.frozen_llava_next import FrozenLlavaNext
from flmm.models.frozen_mgm import mgm_maps
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.mask_head.mask_decoder import UNetHead
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, SAMWrapper, original_keys, sam_from_original
from flmm.scripts.visual_cot.visual_cot import mask_to_crop
from flmm.train import warmup_steps
from tests.golden import golden_files


def load(path):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    group = {"param": {}, "in": {}, "out": {}}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        group[kind][name] = value
    return config, group["param"], SimpleNamespace(**group)


def close(ours, theirs, atol, name):
    assert ours.shape == theirs.shape, name
    worst = (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0
    assert worst <= atol, f"{name}: differs by {worst:.2e}, allowed {atol:.0e}"


def close_relative(ours, theirs, rtol, name):
    close(ours, theirs, rtol * theirs.abs().max().item(), name)


def sam_parameters(path, params):
    """SAM's weights of a file, or of the file that its metadata names."""
    found = {
        k.removeprefix("sam.model.").removeprefix("model."): v
        for k, v in params.items()
        if re.search(r"(^|\.)(image_encoder|prompt_encoder|mask_decoder)\.", k)
    }
    if not found:
        config, _, _ = load(path)
        found = sam_parameters(
            path.parent / config["sam_params_from"], load(path.parent / config["sam_params_from"])[1]
        )
    return found


def decoder_heads(config):
    """Number of attention heads of the reference SAM's decoder: no weight tells it, so the metadata may."""
    return config["sam"].get("dheads", 4)


def check_unet_head(path):
    config, params, t = load(path)
    head = UNetHead(**config["config"], num_groups=config["num_groups"])
    head.load_state_dict(params)
    x = t.__dict__["in"]["x"].requires_grad_()
    y = head(x)
    y.backward(t.__dict__["in"]["grad_out"])
    close(y, t.out["y"], 1e-5, "y")
    close_relative(x.grad, t.out["grad_x"], 1e-4, "grad_x")
    close_relative(head.conv_seg.weight.grad, t.out["grad_conv_seg_weight"], 1e-4, "grad_conv_seg_weight")
    close_relative(head.encoder[0][0].convs[0].conv.weight.grad, t.out["grad_enc0"], 1e-4, "grad_enc0")


@torch.no_grad()
def check_sam_refiner(path):
    config, params, t = load(path)
    given, originals = t.__dict__["in"], sam_parameters(path, params)
    sam = sam_from_original(originals, decoder_heads(config))
    assert set(original_keys(sam.state_dict()).values()) - {
        "shared_image_embedding.positional_embedding"
    } == set(originals)
    image = Image.fromarray(given["image"].numpy())
    size, coarse = (image.height, image.width), given["coarse_logits"]
    texts = [given[f"text_embed_{k}"] for k in range(len(coarse))]
    embedding = SAMImageEncoder(sam)([image])
    close(embedding[..., ::2, ::2], t.out["image_embedding_s2"], 1e-5, "image_embedding")
    default = SAMWrapper(sam)
    close(default.dense_pe()[..., ::8, ::8], t.out["dense_pe"], 1e-5, "dense_pe")
    close(default.prompt_masks(coarse, size)[0], t.out["prompt_mask_0"], 1e-5, "prompt_mask_0")
    close(default.boxes(coarse, size), t.out["boxes_1024"], 1e-5, "boxes_1024")
    binary = (
        torch.nn.functional.interpolate(coarse[:, None].sigmoid(), size=size, mode="bilinear")[:, 0] > 0.5
    )
    close(binary.sum((1, 2)), t.out["binary_mask_area"], 0, "binary_mask_area")
    options = {
        "default": {},
        "no_text": {"use_text": False},
        "no_box": {"use_box": False},
        "no_mask": {"use_mask": False},
        "multimask": {"multimask_output": True},
    }
    names = [k.removeprefix("sam_mask_") for k in t.out if k.startswith("sam_mask_")]
    assert names
    for name in names:
        [(masks, _)] = SAMWrapper(sam, **options[name])([embedding[0]], [size], [coarse], [texts])
        close(masks, t.out[f"sam_mask_{name}"], 1e-4, name)


def check_flmm(path):
    config, params, t = load(path)
    given, L = t.__dict__["in"], config["L"]
    originals = sam_parameters(path, params)
    sam = sam_from_original(originals, decoder_heads(config))
    unet = {k: v for k, v in config["unet"].items() if k != "in_channels"}
    model = FLMM(config["unet"]["in_channels"], L, config["hidden"], sam, unet)
    model.load_upstream({**params, **{f"sam.model.{k}": v for k, v in originals.items()}}, path.name)
    rows, mask_ids = given["row_index"], given["mask_ids"].flatten()
    phrases, attention = mask_ids[rows], given["attn_rows"]
    assert torch.equal((mask_ids >= 0).nonzero().flatten(), rows)
    columns = torch.arange(attention.shape[-1])
    if "image_mask" in given:
        columns = given["image_mask"].flatten().bool().nonzero().flatten()
    elif "ids" in config:
        columns = (given["input_ids"].flatten() == config["ids"]["image_pad"]).nonzero().flatten()
    maps = [merge_rows(layer[..., columns], phrases, config.get("merge", "mean")) for layer in attention]
    family, grid = (
        (FrozenLlavaNext, (config["coarse"], config["fine"]))
        if "fine" in config
        else (FrozenLlava, tuple(config["grid"]))
    )
    image = Image.fromarray(given["image"].numpy())
    feature = {
        "mask_attentions": family.to_grid(None, maps, grid),
        "hidden_states": given["hidden_states"][-L:][:, rows],
        "mask_ids": phrases,
        "image_embedding": SAMImageEncoder(sam)([image])[0],
        "image_size": (image.height, image.width),
        "meta_data": config.get("meta_data"),
        "unpad": family.unpad,
    }
    [output] = model([feature])
    parts = model.compute_loss([output], [given["masks"]])
    parts["loss"].backward()
    close(output["pred_masks"], t.out["pred_masks"], 1e-4, "pred_masks")
    close(output["sam_pred_masks"], t.out["sam_pred_masks"], 1e-4, "sam_pred_masks")
    close(model.weigh_hidden(given["hidden_states"][-L:]), t.out["hidden_states"], 1e-5, "hidden_states")
    close(parts["loss"], t.out["loss_total"], 1e-5, "loss_total")
    for name, value in t.out.items():
        if name.startswith("loss."):
            close(parts[name.removeprefix("loss.")], value, 1e-5, name)
    theirs, parameters = {v: k for k, v in model.upstream_names().items()}, dict(model.named_parameters())
    for name, value in t.out.items():
        if name.startswith("grad."):
            close_relative(parameters[theirs[name.removeprefix("grad.")]].grad, value, 1e-4, name)
    if "ground_spans" in given:  # spans of a generated answer: hidden states are weighted already
        spans = given["ground_spans"].tolist()
        which = torch.cat([torch.full((end - start,), k) for k, (start, end) in enumerate(spans)])
        at = torch.cat([torch.arange(start, end) for start, end in spans])
        attention = given["ground_attention_maps"]  # (channels, T, gh, gw)
        feature |= {
            "mask_attentions": torch.stack([attention[:, s:e].mean(1) for s, e in spans]),
            "mask_ids": which,
        }
        with torch.no_grad():
            coarse = model.coarse([feature])
            words = model.text_proj(given["ground_hidden_states"][at])
            [(refined, _)] = model.sam(
                [feature["image_embedding"]],
                [feature["image_size"]],
                coarse,
                [[words[which == k] for k in range(len(spans))]],
            )
            coarse = torch.nn.functional.interpolate(
                coarse[0][None], size=feature["image_size"], mode="bilinear"
            )[0]
        close(coarse, t.out["ground_pred_masks"], 1e-4, "ground_pred_masks")
        close(refined, t.out["ground_sam_pred_masks"], 1e-4, "ground_sam_pred_masks")


def check_losses(path):
    _, _, t = load(path)
    cases = [k.removeprefix("logits_") for k in t.__dict__["in"] if k.startswith("logits_")]
    assert cases
    for i in cases:
        logits, target = t.__dict__["in"][f"logits_{i}"].requires_grad_(), t.__dict__["in"][f"target_{i}"]
        dice, bce = losses.dice_loss(logits, target), losses.bce_loss(logits, target)
        (dice + bce).backward()
        for name, value in (
            ("dice", dice),
            ("bce", bce),
            ("grad", logits.grad),
            ("accuracy", losses.accuracy(logits, target)),
            ("aiou", losses.average_iou(logits, target)),
        ):
            close(value, t.out[f"{name}_{i}"], 1e-6, f"{name}_{i}")


def check_metrics(path):
    config, _, t = load(path)
    given = t.__dict__["in"]
    recalls = metrics.average_recalls(given["ious"], given["plural"], given["isthing"])
    for name, value in zip(config["order"], t.out["average_accuracy"]):
        assert recalls[name] == pytest.approx(value.item(), abs=1e-9)
    assert (given["ious"].numpy() > 0.5).mean() == pytest.approx(t.out["acc_at_05"].item(), abs=1e-6)
    close(
        torch.from_numpy(metrics.mask_iou(given["iou_a"], given["iou_b"])[2]),
        t.out["mask_iou"],
        1e-6,
        "mask_iou",
    )
    parts = [
        metrics.mask_iou(given[k], given[k.replace("pred", "gt")]) for k in given if k.startswith("pred_")
    ]
    scores = metrics.referring_scores(*(np.concatenate([p[i] for p in parts]) for i in (0, 1)))
    assert 100 * scores["cIoU"] == pytest.approx(t.out["cIoU"].item(), rel=1e-6)
    assert 100 * scores["mIoU"] == pytest.approx(t.out["mIoU"].item(), rel=1e-6)


def check_lr_schedule(path):
    config, _, t = load(path)
    for i, case in enumerate(config["cases"]):
        total, lr = case["max_epochs"] * case["epoch_length"], case["lr"]
        warmup = warmup_steps(case["warmup_ratio"], total)
        ours = [
            lr * lr_at(step, total, warmup, ramp="mmengine", first=case["start_factor"])
            for step in range(total)
        ]
        theirs = t.out[f"lr_{i}"].double().numpy()
        if warmup != 1:
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        # upstream's trap, mended: after a warm-up of one step its rate stays that small for the whole run
        else:
            assert theirs.max() == pytest.approx(lr * case["start_factor"]) and max(ours) > 0.9 * lr


def check_processors(path):
    config, _, t = load(path)
    processors = {
        "llava": LlavaImageProcessor(config["llava"]["size"]),
        "deepseek": DeepseekImageProcessor(config["deepseek"]["image_size"]),
        "llava_next": LlavaNextImageProcessor(
            config["llava_next"]["size"], config["llava_next"]["pinpoints"]
        ),
        "pad2square": Pad2Square(),
    }
    for name, meta in config["meta_data"].items():
        kind, i = name.rsplit("_", 1)
        ours = processors[kind](Image.fromarray(t.__dict__["in"][f"image_{i}"].numpy()))
        close(
            ours["pixel_values"], t.out[f"{kind}.pixel_values_{i}"], 0 if kind == "pad2square" else 1e-5, name
        )
        assert {**ours["meta_data"], "image_sizes": list(ours["image_sizes"])} == meta, name


def check_datasets(path):
    config, _, t = load(path)
    root = path.parent / "dataset"

    def tokenizer(text, add_special_tokens=True):
        ids = [config["vocab"][word] for word in re.findall(config["regex"], text)]
        return SimpleNamespace(input_ids=[config["bos"]] * add_special_tokens + ids)

    def same(sample, prefix):
        for key, value in t.out.items():
            if key.startswith(prefix + "."):
                ours = torch.as_tensor(sample[key.removeprefix(prefix + ".")])
                assert ours.shape == value.shape and torch.equal(ours.long(), value.long()), key

    prompt = tokenizer(config["template"]["INSTRUCTION"].format(input=config["prompt"])).input_ids
    image_token, gt = config["vocab"]["<image>"], t.__dict__["in"]["refcoco_gt"].numpy()
    side = max(t.out["png.llava.padded_masks"].shape[1:])
    for kind, processor in (("llava", LlavaImageProcessor(side)), ("pad2square", Pad2Square())):
        marked = SampleBuilder(
            tokenizer, prompt, processor, (image_token, -200) if kind == "pad2square" else None
        )
        png = PNGDataset(root / "png.json", root / "panoptic.json", root / "pan", root / "img", marked)
        sample, info = png[0], config["infos"][f"png.{kind}"]
        same(sample, f"png.{kind}")
        assert [{k: m[k] for k in ("plural", "isthing")} for m in sample["mask_infos"]] == info["mask_infos"]
        assert sample["meta_data"] == info["meta"]
        build, picture = SampleBuilder(tokenizer, prompt, processor), sample["image"]
        texts = config.get("refcoco_text") or config["infos"]["refcoco_text"]
        same(build({"image": picture, "pieces": caption_of_phrases(texts), "masks": gt}), f"refcoco.{kind}")
        for i, text in enumerate(texts):
            same(
                build({"image": picture, "pieces": caption_of_phrases([text]), "masks": gt[i : i + 1]}),
                f"refcoco_split.{kind}.{i}",
            )
    for name, items in config["infos"].items():
        if not name.startswith("refcoco."):
            continue
        data = RefCOCODataset(
            root / "instances.json",
            next(root.glob("refs*.p")),
            root / "img",
            "val",
            name.removeprefix("refcoco."),
        )
        ours = [
            {"img_path": data.images[i]["file_name"], "img_id": i, "text": data.phrases(k), "n": len(objects)}
            for k, (i, objects) in enumerate(data.items)
        ]  # upstream's order is that of a Python set
        assert sorted(ours, key=lambda item: item["img_id"]) == sorted(
            items, key=lambda item: item["img_id"]
        ), name


# transformers 4 names -> 5; hub loading renames by itself
RENAMES = [
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("image_newline", "model.image_newline"),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
]


def renamed(params):
    def rename(key):
        old, new = next(((o, n) for o, n in RENAMES if key.startswith(o)), ("", ""))
        return new + key.removeprefix(old)

    return {rename(k): v for k, v in params.items()}


def check_rows(base, sample, t):
    """Every phrase row on its own: mask_ids numbered one by one, so that nothing is merged."""
    rows, seen = (sample["mask_ids"] >= 0).nonzero().flatten(), []
    sample["mask_ids"][rows] = torch.arange(len(rows))
    to_grid = type(base).to_grid
    base.to_grid = lambda maps, grid: (seen.extend(maps), to_grid(base, maps, grid))[1]
    [out] = base([sample])
    close(torch.stack(seen), t.out["attn_rows"], 1e-5, f"attn_rows ({base.attention})")
    hidden = t.out["hidden_states"][-base.num_layers :][:, t.out["row_index"]]
    close(out["hidden_states"], hidden, 1e-5, f"hidden_states ({base.attention})")


def check_llava_tiny(path):
    config, params, t = load(path)
    given, fine = t.__dict__["in"], "pinpoints" in config
    drop = {"transformers_version"}
    options = dict(
        text_config={k: v for k, v in config["text"].items() if k not in drop},
        vision_config={k: v for k, v in config["vision"].items() if k not in drop},
        vision_feature_layer=config.get("vision_feature_layer", -2),
        vision_feature_select_strategy=config.get("strategy", "default"),
    )
    # the image token stands once in the ids and is the only one not below the others' range
    image_token = config.get("image_token_index", int(given["input_ids"].max()))
    if fine:
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                **options, image_token_index=image_token, image_grid_pinpoints=config["pinpoints"]
            )
        )
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**options, image_token_index=image_token))
    assert not any(model.load_state_dict(renamed(params), strict=False))
    for attention in ("rows", "eager"):
        base = (FrozenLlavaNext if fine else FrozenLlava)(model, attention=attention)
        sample = {
            "input_ids": given["input_ids"][0],
            "mask_ids": given["mask_ids"][0].clone(),
            "pixel_values": given["pixel_values"][0],
        }
        if fine:
            image = Image.fromarray(given["image"].numpy())
            sample |= LlavaNextImageProcessor(config["vision"]["image_size"], config["pinpoints"])(image)
            close(sample["pixel_values"], given["pixel_values"][0], 1e-5, "pixel_values")
            assert base.grid(sample)[1] == tuple(t.out["fine_shape"].tolist())
        else:
            h, w = given["pixel_values"].shape[-2:]
            sample["meta_data"] = {"padded_shape": {"height": h, "width": w}}
            expanded = base.expand(sample["input_ids"], sample, sample["mask_ids"], fill=-1)
            assert torch.equal(expanded, t.out["mask_ids_expanded"].flatten())
        check_rows(base, sample, t)


def check_qwen_tiny(path):
    config, params, t = load(path)
    given, text = t.__dict__["in"], dict(config["text"])
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": config["rope_scaling"]["mrope_section"],
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=config["vision"], **config["ids"]
        )
    )
    assert not any(model.load_state_dict(renamed(params), strict=False))
    for attention in ("rows", "eager"):
        check_rows(
            FrozenQwen(model, attention=attention),
            {
                "input_ids": given["input_ids"][0],
                "mask_ids": given["mask_ids"].flatten().clone(),
                "pixel_values": given["pixel_values"],
                "image_grid_thw": given["image_grid_thw"],
            },
            t,
        )


def check_mgm_attention(path):
    config, _, t = load(path)
    for i, (grid, use_global) in enumerate(config["cases"]):
        close(
            mgm_maps(t.__dict__["in"][f"attn_{i}"], grid, use_global, tuple(config["clip_shape"])),
            t.out[f"map_{i}"],
            1e-6,
            f"map_{i}",
        )


def check_vcot_mask2box(path):
    _, _, t = load(path)
    given = t.__dict__["in"]
    ours = torch.tensor(
        [mask_to_crop(mask, float(scale)) for mask, scale in zip(given["masks"], given["scale"])]
    )
    assert torch.equal(ours, t.out["box"].long())


def check_text_utils(path):
    cases = json.loads(path.read_text())
    for case in cases["process_noun_chunks"]:
        assert process_noun_chunks(case["inp"]) == case["out"]
    for case in cases["find_interval"]:
        assert find_interval([tuple(i) for i in case["intervals"]], case["idx"]) == case["out"]


KINDS = {
    "unet_head": check_unet_head,
    "sam_refiner": check_sam_refiner,
    "flmm_": check_flmm,
    "losses": check_losses,
    "metrics": check_metrics,
    "lr_schedule": check_lr_schedule,
    "processors": check_processors,
    "datasets": check_datasets,
    "llava_tiny": check_llava_tiny,
    "llava_next_tiny": check_llava_tiny,
    "qwen_tiny": check_qwen_tiny,
    "mgm_attention": check_mgm_attention,
    "vcot_mask2box": check_vcot_mask2box,
    "text_utils": check_text_utils,
}


@pytest.mark.parametrize("path", golden_files("flmm"))
def test_equals_upstream(path):
    if path.parent.name in ("dataset", "img", "pan"):
        return  # read by check_datasets
    kinds = [k for k in KINDS if path.name.startswith(k)]
    assert kinds, f"{path.name}: a reference file that no check knows"
    KINDS[max(kinds, key=len)](path)
