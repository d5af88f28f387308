"""flmm: data sets, bad inputs, cached features, scores."""

import itertools
import json
import pickle
import shutil
from argparse import Namespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from common.errors import UserError
from flmm import losses
from flmm.build import FAMILIES, build_dataset, family_of, read_config
from flmm.data.cache import CachedFeatures, halved, write_cache
from flmm.data.phrases import PhraseDataset
from flmm.data.png import PNGDataset
from flmm.data.refcoco import RefCOCODataset, read_refs
from flmm.data.samples import SampleBuilder, decode_segmentation, encode_rle
from flmm.data.scenes import make_scene
from flmm.data.skip import Bad
from flmm.data.transforms import DeepseekImageProcessor, load_image
from flmm.evaluation import RawMaps, other_phrase, phrase_rows, summarise, trivial_controls
from flmm.make_data import main as make_data
from flmm.metrics import average_recall, average_recalls, mask_iou, referring_scores
from flmm.models.flmm import extract
from flmm.models.mask_head.mask_decoder import UNetHead
from flmm.models.mask_head.mask_refiner import SAMImageEncoder
from flmm.models.tiny import tiny_sam
from flmm.models.tiny_bases import tiny_base

CONFIG = "flmm/configs/tiny/scenes.yaml"


@pytest.fixture(scope="module")
def built_in(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_data(Namespace(out=root, train=6, val=2, test=2, overlap=1, side=64, seed=0, base=None))
    return root


@pytest.fixture(scope="module")
def base():
    return tiny_base("llava")


def png(root, split="train", build=None):
    return PNGDataset(
        root / f"png/png_coco_{split}.json",
        root / f"png/panoptic_{split}.json",
        root / f"png/panoptic_{split}",
        root / "png/images",
        build,
    )


def refcoco(root, **options):
    return RefCOCODataset(
        root / "refcoco/instances.json", root / "refcoco/refs(unc).p", root / "png/images", "train", **options
    )


# ---- built-in scenes


def test_a_scene_depends_on_seed_and_index_alone_and_its_captions_tell_no_position():
    one, two = make_scene(3, 17), make_scene(3, 17)
    assert np.array_equal(one["image"], two["image"]) and one["pieces"] == two["pieces"]
    assert not np.array_equal(one["image"], make_scene(4, 17)["image"])
    # x of the object that is named first
    firsts = [make_scene(0, i)["masks"][0].nonzero()[1].mean() for i in range(300)]
    assert abs(np.mean(firsts) - 32) < 3
    for scene in (make_scene(0, i) for i in range(20)):
        assert scene["masks"].sum(0).max() == 1  # a hidden part belongs to the object on top
        # its words are to be seen
        for obj, mask in zip(scene["objects"], scene["masks"]):
            assert (scene["image"][mask].std(0).max() > 15) == (obj["texture"] != "plain")


def test_both_formats_give_back_the_scene(built_in):
    for dataset in (png(built_in), refcoco(built_in, text_mode="select_first")):
        for index in range(3):
            record = dataset.record(index)
            scene = make_scene(0, int(record["file_name"][:-4]))
            assert np.array_equal(np.asarray(record["image"]), scene["image"])
            assert np.array_equal(record["masks"].astype(bool), scene["masks"])
            assert [i["text"] for i in record["mask_infos"]] == scene["phrases"]


# ---- epochs and protocols


def test_expressions_are_drawn_anew_each_epoch_and_never_in_evaluation(built_in):
    train, fixed = refcoco(built_in, text_mode="random"), refcoco(built_in, text_mode="select_first")

    def seen(dataset, epoch):
        dataset.set_epoch(epoch)
        return [dataset.phrases(i) for i in range(len(dataset))]

    assert seen(train, 0) == seen(train, 0)
    assert len({json.dumps(seen(train, e)) for e in range(4)}) > 1
    assert seen(fixed, 0) == seen(fixed, 5)


def test_a_configuration_hands_on_seed_epoch_and_protocol(built_in):
    paths = "ann_file: refcoco/instances.json, split_file: 'refcoco/refs(unc).p', image_path: png/images"
    entry = f"{{type: refcoco, {paths}, split: train}}"
    config = read_config(CONFIG, [f"data.train=[{entry}, {entry}]"])

    def drawn(seed, epoch):
        both = build_dataset(config, "train", built_in, None, seed)
        both.set_epoch(epoch)
        return [part.phrases(i) for part in both.datasets for i in range(len(part))]

    both = build_dataset(config, "train", built_in)
    halves = [part.record(i) for part in both.datasets for i in range(len(part))]
    assert [both.record(i)["file_name"] for i in range(len(both))] == [r["file_name"] for r in halves]
    assert drawn(0, 0) == drawn(0, 0)
    assert len({json.dumps(drawn(seed, 0)) for seed in range(4)}) > 1
    assert len({json.dumps(drawn(0, epoch)) for epoch in range(4)}) > 1


def test_captions_without_a_grounded_phrase_are_left_out_and_nothing_is_substituted(built_in, tmp_path):
    captions = json.loads((built_in / "png/png_coco_train.json").read_text())
    captions[1]["segments"] = [{"utterance": "nothing here", "segment_ids": [], "plural": False}]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    dataset = PNGDataset(
        tmp_path / "captions.json",
        built_in / "png/panoptic_train.json",
        built_in / "png/panoptic_train",
        built_in / "png/images",
    )
    names = [dataset.record(i)["file_name"] for i in range(len(dataset))]
    assert len(names) == 5 == len(set(names)) and f"{int(captions[1]['image_id']):012d}.png" not in names


# ---- bad inputs


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    "content,reason",
    [
        (pickle.dumps([{"sentences": Evil()}]), "builtins.print"),
        (pickle.dumps(np.zeros(3)), "list of references"),
        (b"garbage", "not a readable references file"),
        (pickle.dumps({"a": 1}), "list of references"),
        (b"", "not a readable references file"),
    ],
)
def test_a_refs_file_runs_no_code_and_a_damaged_one_is_named(tmp_path, capsys, content, reason):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        read_refs(path)
    assert str(path) in str(caught.value) and "executed" not in capsys.readouterr().out


def test_polygon_and_both_rle_forms_decode_alike():
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 4:24] = 1
    compressed = encode_rle(mask)
    flat = mask.T.ravel()  # column by column, first run counts zeros
    lengths = [len(list(run)) for _, run in itertools.groupby(flat.tolist())]
    plain = {"size": [20, 30], "counts": lengths if flat[0] == 0 else [0, *lengths]}
    assert np.array_equal(decode_segmentation(compressed, 20, 30, ""), mask)
    assert np.array_equal(decode_segmentation(plain, 20, 30, ""), mask)
    assert decode_segmentation([[4, 5, 24, 5, 24, 15, 4, 15]], 20, 30, "").sum() == mask.sum()
    with pytest.raises(UserError, match="30 x 20 pixels, the picture 31 x 20"):
        decode_segmentation(compressed, 20, 31, "x")


def test_missing_pictures_masks_and_annotations_are_named(built_in, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(built_in, root)
    name = png(root).record(0)["file_name"]
    (root / "png/images" / name).unlink()
    with pytest.raises(UserError, match=f"{name[:-4]}.*no such file"):
        png(root).record(0)
    (root / "png/panoptic_train" / png(built_in).record(1)["file_name"]).unlink()
    with pytest.raises(UserError, match="no such file; check the path of the mask picture"):
        png(root).record(1)
    (root / "png/panoptic_train.json").write_text("{")
    with pytest.raises(UserError, match="panoptic_train.json: not a readable JSON file"):
        png(root)
    (root / "png/png_coco_train.json").unlink()
    nothing = dict.fromkeys(("images", "annotations", "categories"), [])
    (root / "png/panoptic_train.json").write_text(json.dumps(nothing))
    with pytest.raises(UserError, match="png_coco_train.json: no such file"):
        png(root)


def test_masks_of_another_size_and_phrases_without_tokens_are_refused(base):
    builder = SampleBuilder.of(base)
    record = {"image": Image.new("RGB", (64, 48)), "pieces": [("red", 0)], "file_name": "a.jpg"}
    with pytest.raises(UserError, match="a.jpg: masks are 48 x 64 pixels, the picture is 64 x 48"):
        builder({**record, "masks": np.zeros((1, 64, 48))})
    with pytest.raises(UserError, match=r"a.jpg: phrase 0 \('  '\) has no token"):
        builder({**record, "pieces": [("  ", 0)], "masks": np.zeros((1, 48, 64))})
    # phrase 0 is nowhere
    sample = builder({**record, "pieces": [("red", 1)], "masks": np.zeros((2, 48, 64))})
    with pytest.raises(UserError, match="a phrase has no token"):
        base([sample])


def test_exif_rotation_follows_the_annotation(tmp_path):
    image, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)  # upright for people
    assert load_image(tmp_path / "turned.jpg", (40, 20)).size == (40, 20)  # as annotated
    for tag in (b"Exif\0\0garbage", b"Exif\0\0II*\0"):  # a damaged tag damages no pixel
        image.save(tmp_path / "tag.png", exif=tag)
        assert load_image(tmp_path / "tag.png").size == (40, 20)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match="broken.jpg: not a readable picture"):
        load_image(tmp_path / "broken.jpg")


@pytest.mark.parametrize(
    "override,reason",
    [
        ("nonsense", "part.name=value"),
        ("bass.path=x", "part.name=value"),
        ("data.train=[{type: gif}]", "type is 'gif'"),
        ("data.train=[{typ: png}]", r"data.train: \[0\] has no field 'type'"),
        ("data.train=", "names no data for 'train'"),
        ("optim.lr=fast", "optim.lr is text, expected a number"),
        ("optim.rate=1", "optim has no value 'rate'; expected lr, epochs"),
        ("unet.base_channels=[", "base_channels=.*: not a readable value"),
        ("unet.base_channels=0", "unet.base_channels is 0, it must be at least 1"),
        ("optim.batch_size=-1", "optim.batch_size is -1, it must be at least 1"),
        ("optim.lr=.nan", "optim.lr is nan, it must be at least 0"),
    ],
)
def test_wrong_overrides_are_named(built_in, override, reason):
    with pytest.raises(UserError, match=reason):
        build_dataset(read_config(CONFIG, [override]), "train", built_in, None)


@pytest.mark.parametrize(
    "unet,reason",
    [
        ({"num_stages": 5}, "unet.strides is .*, num_stages 5 needs 5 of them"),
        ({"dec_num_convs": [2, 0, 2]}, "unet.dec_num_convs is"),
        ({"base_channels": 5, "num_groups": 2}, "5 does not divide by num_groups 2"),
    ],
)
def test_a_mask_head_of_no_possible_shape_is_named(unet, reason):
    with pytest.raises(UserError, match=reason):
        UNetHead(8, **unet)


@pytest.mark.parametrize("span", [None, [4], [-9, -5], [7, 4], [90, 99], [1, 2]])
def test_a_phrase_of_a_caption_needs_a_span_of_words(tmp_path, span):
    phrase = {"caption": 0, "text": "dog", "segment_ids": [1], "span": span}
    image = {"id": 1, "file": "1.png", "captions": ["a dog sits"], "segments": [{"id": 1, "isthing": 1}]}
    good = {**phrase, "span": [2, 5]}
    content = {"images": [{**image, "phrases": [good]}, {**image, "phrases": [phrase]}]}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="needs its caption 0 and a span"):
        PhraseDataset(tmp_path)
    assert len(PhraseDataset(tmp_path, bad=Bad(skip=True))) == 1


def test_masks_of_two_folders_belong_to_their_own_pictures(tmp_path):
    images, segments = [], [{"id": 1, "isthing": 1}]
    for k, name in enumerate(("a/1.jpg", "b/1.jpg")):
        for kind, file in (("images", name), ("masks", name[:-4] + ".png")):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
            values = np.zeros((8, 8), np.uint8)
            values[: k + 1] = 1
            Image.fromarray(values).save(tmp_path / kind / file)
        phrase = {"caption": -1, "text": "dog", "segment_ids": [1]}
        images.append({"id": k, "file": name, "segments": segments, "phrases": [phrase]})
    (tmp_path / "annotations.json").write_text(json.dumps({"images": images}))
    data = PhraseDataset(tmp_path)
    assert [int(data.record(k)["masks"].sum()) for k in (0, 1)] == [8, 16]
    assert len(PhraseDataset(tmp_path, limit=1)) == 1


def test_a_number_without_a_dot_is_a_number_and_a_file_that_includes_itself_is_refused(tmp_path):
    assert read_config(CONFIG, ["optim.lr=2e-4", "base.question=e2"])["optim"]["lr"] == 2e-4
    (tmp_path / "loop.yaml").write_text("include: loop.yaml")
    with pytest.raises(UserError, match="loop.yaml: not a readable configuration"):
        read_config(tmp_path / "loop.yaml")


@pytest.mark.parametrize("option", ["template", "merge", "attention"])
def test_an_unknown_way_to_read_a_base_is_named(base, option):
    with pytest.raises(UserError, match=f"base.{option} is 'other', expected one of"):
        FAMILIES["llava"](base.model, **{"template": "plain", option: "other"})


def test_every_published_configuration_reads_and_names_a_known_family():
    from pathlib import Path

    files = sorted(Path("flmm/configs").glob("*/frozen_*_unet_sam_l_refcoco_png.yaml"))
    named = [family_of(read_config(f)) for f in files]  # no configuration that cannot run
    assert set(named) == set(FAMILIES.values()) - {FAMILIES["efficientnet"]}
    config = read_config("flmm/configs/qwen/frozen_qwen2_5_vl_3b_instruct_unet_sam_l_refcoco_png.yaml")
    recipe = {"lr": 1e-4, "epochs": 8, "weight_decay": 0.01, "warmup": 0.03, "clip": 1.0}
    assert config["optim"] == {**recipe, "batch_size": 8, "accum": 8}
    assert len(config["data"]["train"]) == 4


def test_deepseek_processor_truncates_where_transformers_rounds():
    processor = DeepseekImageProcessor(384)
    shape = processor(Image.new("RGB", (640, 427)))["meta_data"]["image_shape"]
    assert shape == {"height": 256, "width": 384} and round(427 * 384 / 640) == 256
    assert processor.target(423, 640) == (253, 384) and round(423 * 0.6) == 254


# ---- real photographs


def test_photographs_are_read_with_their_phrases(data_root, base):
    dataset = PhraseDataset(data_root / "grounding/val_panoptic", SampleBuilder.of(base))
    rows, phrases = [], 0
    for i in range(len(dataset)):
        record = dataset.record(i)
        rows += (new := [{} for _ in record["masks"]])
        trivial_controls(torch.from_numpy(record["masks"]), new)
        phrases += len(record["masks"])
        assert all(m.any() for m in record["masks"])
    assert phrases == 304
    assert np.mean([r["iou_whole"] for r in rows]) == pytest.approx(0.243, abs=5e-4)
    assert np.mean([r["iou_centre"] for r in rows]) == pytest.approx(0.158, abs=5e-4)
    sample, record = dataset[0], dataset.record(0)
    words = [t for t, k in record["pieces"] if k == 0]
    ids = sample["input_ids"][sample["mask_ids"] == 0].tolist()
    assert base.tokenizer.decode(ids).strip() == words[0]


# ---- cache


def test_cached_features_equal_live_ones_and_another_origin_is_refused(built_in, base, tmp_path):
    encoder = SAMImageEncoder(tiny_sam())
    dataset = png(built_in, build=SampleBuilder.of(base))
    origin = {"base": "tiny", "seed": [1, 2]}
    write_cache(tmp_path / "c", base, encoder, dataset, origin, Accelerator(), batch_size=4)
    cached = CachedFeatures(tmp_path / "c", {"base": "tiny", "seed": (1, 2)})
    assert len(cached) == len(dataset) and cached.dims == base.dims
    for i in (0, 5):
        sample = dataset[i]
        [live] = extract(base, encoder, [sample])
        for name, rtol, atol in (
            ("mask_attentions", 1e-3, 1e-6),
            ("hidden_states", 2e-3, 2e-3),
            ("image_embedding", 2e-3, 2e-3),
        ):
            torch.testing.assert_close(cached[i][name], live[name], rtol=rtol, atol=atol)
        for name, given in (("masks", sample), ("gt_masks", sample), ("mask_ids", live)):
            assert torch.equal(cached[i][name], given[name])
    # numbers beyond half precision, as in some bases' deep layers, stay what they are
    large = torch.tensor([1.0, -7e4])
    assert halved(large).tolist() == large.tolist() and halved(large[:1]).dtype == np.float16
    with pytest.raises(UserError, match="was made with base = tiny, now other"):
        CachedFeatures(tmp_path / "c", {"base": "other", "seed": [1, 2]})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/features-00000.h5").write_bytes(next((tmp_path / "c").glob("*.h5")).read_bytes()[:100])
    with pytest.raises(UserError, match="not a feature cache"):
        CachedFeatures(tmp_path / "cut")


# ---- scores


def test_average_recall_is_the_mean_iou_and_empty_masks_count_zero():
    ious = np.random.default_rng(0).random(500)
    assert average_recall(ious) == pytest.approx(ious.mean(), abs=2e-5)
    assert mask_iou(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)))[2] == 0
    with pytest.raises(ValueError, match="predicted masks are"):
        mask_iou(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)))


def test_a_perfect_prediction_scores_one_and_controls_what_they_should():
    gt = torch.zeros(2, 8, 8)
    gt[0, :4], gt[1, 4:] = 1, 1
    output = {"pred_masks": gt * 20 - 10, "sam_pred_masks": None, "scores": torch.ones(2)}
    rows = phrase_rows(output, gt)
    trivial_controls(gt, rows)
    other_phrase(output, gt, rows)
    scores = summarise(rows)
    assert scores["alike"] == 0 and scores["all_objects"] == 0.5  # another mask for every phrase
    assert scores["controls"]["other"] == scores["controls"]["other_coarse"] == 0
    blind, both = [{}, {}], {**output, "pred_masks": gt.amax(0).expand(2, 8, 8) * 20 - 10}
    other_phrase(both, gt, blind)
    assert all(
        row == {"iou_other": 0.5, "iou_other_coarse": 0.5, "alike": 1, "all_objects": 1} for row in blind
    )
    assert scores["mIoU"] == scores["cIoU"] == scores["precision@0.9"] == 1
    assert scores["controls"]["whole"] == scores["controls"]["union"] == 0.5


def test_the_raw_map_control_finds_the_channel_that_holds_the_mask():
    gt = torch.zeros(1, 16, 16)
    gt[0, 4:12, 4:12] = 1
    maps = torch.rand(1, 5, 16, 16) * 0.1
    maps[0, 3] = gt[0] * 0.01
    feature = {"mask_attentions": maps, "unpad": False, "meta_data": None}
    raw = RawMaps()
    raw.fit(feature, gt)
    assert raw.choose().channel == 3
    rows = [{}]
    raw.score(feature, gt, rows)
    assert rows[0]["iou_raw"] == 1


def test_heads_without_training_find_their_object_by_compactness_and_by_contrast():
    gt = torch.zeros(1, 16, 16)
    gt[0, 4:12, 4:12] = 1
    spread, compact = torch.full((16, 16), 1 / 256), gt[0] / gt.sum()
    # heads 1, 4, 6: compact and much of the attention; head 2 is compact but hardly looks, the others spread
    weights = [(0.1, 0), (0.5, 1), (1e-3, 1), (0.2, 0), (0.6, 1), (0.3, 0), (0.7, 1), *[(0.05, 0)] * 5]
    maps = torch.stack([weight * (spread, compact)[kind] for weight, kind in weights])[None]
    feature = {"mask_attentions": maps, "unpad": False, "meta_data": None}
    raw = RawMaps()
    raw.fit(feature, gt)
    assert raw.choose().heads.tolist() == [1, 4, 6]
    rows = [{}]
    raw.score(feature, gt, rows)
    assert rows[0]["iou_heads"] == 1 and rows[0]["iou_mean"] == 1  # a mean of maps that agree
    # a place that every phrase looks at hides the object from the mean, and not from the fusion
    gt, maps = torch.zeros(2, 16, 16), torch.full((2, 5, 16, 16), 1e-3)
    gt[0, :, :4], gt[1, :, 12:] = 1, 1
    maps += gt[:, None] * 0.01
    maps[:, :, 6:8, 6:8] = 0.1
    raw, rows, both = RawMaps(), [{}, {}], {"mask_attentions": maps, "unpad": False, "meta_data": None}
    raw.fit(both, gt)
    raw.choose().score(both, gt, rows)
    assert all(row["iou_fusion"] == 1 and row["iou_mean"] < 0.99 for row in rows)

    gt = torch.zeros(1, 16, 16)
    other = RawMaps()
    other.fit(feature, 1 - gt)
    assert other.choose().heads.tolist() == [1, 4, 6]  # another truth chooses the same heads


def test_scores_of_referring_segmentation_follow_their_definitions():
    """Three masks of IoU 1/2, 9/10 and 0/0: an equal threshold does not count; nothing for nothing is right
    for gIoU and a miss for precision."""
    scores = referring_scores([5, 90, 0], [10, 100, 0])
    assert scores["cIoU"] == pytest.approx(95 / 110)
    assert scores["gIoU"] == pytest.approx((0.5 + 0.9 + 1) / 3)
    thresholds = {0.5: 1, 0.6: 1, 0.7: 1, 0.8: 1, 0.9: 0}
    assert {t: scores[f"precision@{t}"] * 3 for t in thresholds} == pytest.approx(thresholds)


def test_average_recalls_take_each_group_by_itself_and_plurals_are_things():
    recalls = average_recalls([0.2, 0.4, 0.9], [False, True, False], [False, True, True])
    wanted = {"all": 0.5, "singular": 0.55, "plural": 0.4, "thing": 0.65, "stuff": 0.2}
    assert recalls == pytest.approx(wanted, abs=1e-4)
    assert np.isnan(average_recall([]))


def test_losses_equal_their_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    target = (torch.rand(2, 5, 7, generator=generator) > 0.5).float()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(losses.bce_loss(logits, target), plain)
    p = logits.sigmoid()
    dice = [(2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, target)]
    torch.testing.assert_close(losses.dice_loss(logits, target), 1 - torch.stack(dice).mean())
    inside = p > 0.5
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(inside, target.bool())]
    torch.testing.assert_close(losses.average_iou(logits, target), torch.stack(ious).mean())
    assert losses.accuracy(logits, target) == (inside == target.bool()).float().mean()


def test_a_centred_box_has_half_the_sides_and_the_row_of_a_phrase_its_own_numbers():
    gt = torch.zeros(1, 8, 12)
    gt[0, 2:6, 3:9] = 1  # the centred box itself
    rows = [{}]
    trivial_controls(gt, rows)
    assert rows[0] == {"iou_whole": 24 / 96, "iou_centre": 1, "iou_union": 1}
    coarse = torch.full((1, 8, 12), -9.0)
    coarse[0, 2:6, 3:6] = 9  # half of it
    output = {"pred_masks": coarse, "sam_pred_masks": gt * 18 - 9, "scores": torch.tensor([0.7])}
    [row] = phrase_rows(output, gt)
    assert (row["inter"], row["union"], row["iou"], row["accuracy"]) == (24, 24, 1, 1)
    assert (row["inter_coarse"], row["union_coarse"], row["iou_coarse"]) == (12, 24, 0.5)
    assert row["accuracy_coarse"] == pytest.approx(84 / 96) and row["score"] == pytest.approx(0.7)
