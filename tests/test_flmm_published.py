"""flmm: published data as it is published, the protocols of the papers, faults in data, words that look like
control tokens."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from common.errors import UserError
from flmm.build import FAMILIES, build_dataset, read_config
from flmm.data.cache import CachedFeatures, write_cache
from flmm.data.phrases import ReasonSegDataset
from flmm.data.png import PNGDataset
from flmm.data.polygons import polygon
from flmm.data.refcoco import RefCOCODataset
from flmm.data.samples import SampleBuilder, decode_segmentation, rle_counts
from flmm.data.skip import Bad, SkipBad, keep_good
from flmm.data.text import control_tokens, encode_text
from flmm.data.transforms import LlavaNextImageProcessor, load_image
from flmm.evaluation import RawMaps, phrase_rows, summarise, trivial_controls
from flmm.models.flmm import FLMM
from flmm.models.tiny import tiny_sam, tiny_tokenizer
from flmm.models.tiny_bases import tiny_base
from flmm.train import validate

SHIPPED = "flmm/configs/llava/frozen_llava_1_5_vicuna_7b_unet_sam_l_refcoco_png.yaml"
WIDTH, HEIGHT = 40, 30


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def references(folder, refs, segmentations, name="refs(unc).p"):
    """A RefCOCO folder of one picture, 7.jpg; segmentations: {annotation id: COCO segmentation}."""
    (folder / "train2014").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "train2014/7.jpg")
    write_json(
        folder / "instances.json",
        {
            "images": [{"id": 7, "file_name": "7.jpg", "height": HEIGHT, "width": WIDTH}],
            "annotations": [{"id": i, "image_id": 7, "segmentation": s} for i, s in segmentations.items()],
        },
    )
    if name.endswith(".json"):
        write_json(folder / name, refs)
    else:
        (folder / name).write_bytes(pickle.dumps(refs))
    return dict(ann_file=folder / "instances.json", split_file=folder / name, image_path=folder / "train2014")


def ref(number, ann, *sentences, split="val", **more):
    texts = [{"raw": text, "sent": text.lower()} for text in sentences]
    return {"ref_id": number, "ann_id": ann, "image_id": 7, "split": split, "sentences": texts, **more}


# ---- upstream's tree


def upstream_tree(root):
    """data/coco as upstream's README has it, one picture in every part."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / split / "000000000007.jpg")
        (root / f"annotations/panoptic_{split}").mkdir(parents=True)
        png = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        png[:10, :, 0] = 5
        Image.fromarray(png).save(root / f"annotations/panoptic_{split}/000000000007.png")
        segments = [{"id": 5, "category_id": 1, "area": 400, "iscrowd": 0, "bbox": [0, 0, 40, 10]}]
        write_json(
            root / f"annotations/panoptic_{split}.json",
            {
                "images": [{"id": 7, "file_name": "000000000007.jpg", "height": HEIGHT, "width": WIDTH}],
                "annotations": [{"image_id": 7, "file_name": "000000000007.png", "segments_info": segments}],
                "categories": [{"id": 1, "name": "sky", "isthing": 0, "supercategory": "sky"}],
            },
        )
        parts = [
            {"utterance": "the sky", "segment_ids": ["5"], "plural": False, "noun": True},
            {"utterance": "is blue", "segment_ids": [], "plural": False, "noun": False},
        ]
        write_json(
            root / f"annotations/png_coco_{split}.json", [{"image_id": "000000000007", "segments": parts}]
        )
    splits = ["train", "val", "testA", "testB", "test"]
    refs = [ref(k, k + 1, "Left one", split=s) for k, s in enumerate(splits)]
    for name, file in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        segmentations = {k + 1: [square(k, k, 9)] for k in range(5)}
        paths = references(root / name, refs, segmentations, f"refs({file}).p")
        shutil.rmtree(root / "train2014", ignore_errors=True)
        shutil.move(paths["image_path"], root / "train2014")


@pytest.mark.parametrize("links", [False, True])
def test_upstreams_data_tree_opens_whether_or_not_its_folders_are_links(tmp_path, links):
    root = tmp_path / "data/coco"
    upstream_tree(root)
    if links:  # as on a cluster: every folder, and a folder of a folder, leads elsewhere
        for name in ("annotations/panoptic_val2017", "annotations", "train2014", "val2017", "refcoco+"):
            away = tmp_path / "elsewhere" / name.replace("/", "_")
            away.parent.mkdir(exist_ok=True)
            shutil.move(root / name, away)
            (root / name).symlink_to(away)
        (tmp_path / "coco").symlink_to(root)
        root = tmp_path / "coco"
    config = read_config(SHIPPED)
    for split in config["data"]:
        if not split.startswith(("reasonseg", "grefcoco")):
            dataset = build_dataset(config, split, root, lambda record: record)
            assert len(dataset) == (4 if split == "train" else 1)
            assert all(dataset[i]["masks"].any() for i in range(len(dataset)))


def test_names_inside_data_files_do_not_leave_their_folder(tmp_path):
    paths = references(tmp_path, [ref(1, 1, "a")], {1: [square(1, 1, 9)]})
    content = json.loads((tmp_path / "instances.json").read_text())
    content["images"][0]["file_name"] = "../../secret.jpg"
    write_json(tmp_path / "instances.json", content)
    with pytest.raises(UserError, match="lies outside"):
        RefCOCODataset(**paths, split="val").record(0)


def test_paths_of_a_configuration_are_of_the_repository_then_of_the_file_then_of_here(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    (tmp_path / "c/one.yaml").write_text("sam: {path: weights.pth}\nbase: {path: flmm/configs}")
    (tmp_path / "c/two.yaml").write_text("include: one.yaml")
    assert read_config(tmp_path / "c/two.yaml")["sam"]["path"] == "weights.pth"  # nowhere: left as it is
    (tmp_path / "weights.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert read_config(tmp_path / "c/two.yaml")["sam"]["path"] == str(tmp_path / "weights.pth")
    (tmp_path / "c/weights.pth").touch()
    config = read_config(tmp_path / "c/two.yaml")
    assert config["sam"]["path"] == str(tmp_path / "c/weights.pth")
    assert config["base"]["path"].endswith("flmm/configs") and config["base"]["path"].startswith("/")
    # what is typed is looked for where one is
    assert read_config(tmp_path / "c/two.yaml", ["sam.path=weights.pth"])["sam"]["path"] == str(
        tmp_path / "weights.pth"
    )


# ---- ReasonSeg


def put(folder, name, text, shapes, encoding="utf8", size=(64, 48)):
    Image.new("RGB", size).save(folder / f"{name}.jpg")
    shapes = [{"label": label, "points": points} for label, points in shapes]
    content = json.dumps({"text": text, "is_sentence": True, "shapes": shapes}, ensure_ascii=False)
    (folder / f"{name}.json").write_bytes(content.encode(encoding))


def box(x, y, right, bottom):
    return [[x, y], [right, y], [right, bottom], [x, bottom]]


def reasonseg(folder, **options):
    dataset = ReasonSegDataset(folder, **options)
    return {dataset.record(i)["file_name"]: dataset.record(i) for i in range(len(dataset))}


def test_reasonseg_takes_the_first_wording_and_the_smaller_polygon_wins(tmp_path):
    put(tmp_path, "a", ["first", "second"], [("target", box(0, 0, 40, 40)), ("ignore", box(5, 5, 20, 20))])
    put(tmp_path, "b", ["where"], [("ignore", box(0, 0, 40, 40)), ("target", box(5, 5, 20, 20))])
    put(tmp_path, "c", "alone", [("Flag", box(0, 0, 9, 9)), ("target", [[3, 3]]), ("my_Ignored", [[5, 5]])])
    records = reasonseg(tmp_path)
    assert [r["mask_infos"][0]["text"] for r in records.values()] == ["first", "where", "alone"]
    assert [int(r["masks"].sum()) for r in records.values()] == [41 * 41 - 256, 256, 1]
    assert [int(r["ignore"].sum()) for r in records.values()] == [256, 41 * 41 - 256, 1]
    assert len(ReasonSegDataset(tmp_path, wordings="all")) == 4
    with pytest.raises(UserError, match="wordings is 'some'"):
        ReasonSegDataset(tmp_path, wordings="some")


def test_reasonseg_leaves_ignored_pixels_out(tmp_path):
    shapes = [("target", box(0, 0, 9, 9)), ("ignore", box(8, 8, 19, 19))]
    put(tmp_path, "a", ["what flies?"], shapes, size=(20, 20))
    record = ReasonSegDataset(tmp_path).record(0)
    gt, ignore, everything = torch.from_numpy(record["masks"]), record["ignore"], torch.full((1, 20, 20), 9.0)
    output = {"pred_masks": everything, "sam_pred_masks": None, "scores": torch.ones(1)}
    [row] = phrase_rows(output, gt, ignore)
    # 144 pixels lie in the ignored square; the target is the smaller one and keeps the four that they share
    assert record["masks"].sum() == 100 and row["union"] == 400 - 140 and row["inter"] == 100
    # what no word is read for is counted on the same pixels: the whole picture is the mask above
    raw, feature = RawMaps(), {"mask_attentions": torch.ones(1, 1, 20, 20), "unpad": False, "meta_data": None}
    raw.fit(feature, gt)
    raw.choose().score(feature, gt, [row], ignore)
    trivial_controls(gt, [row], ignore)
    assert row["iou"] == row["iou_whole"] == pytest.approx(row["iou_raw"]) == 100 / 260
    assert row["accuracy"] == pytest.approx(100 / 260)


def test_validation_and_a_cache_leave_ignored_pixels_out_too(tmp_path):
    shapes = [("target", box(0, 0, 9, 9)), ("ignore", box(8, 8, 19, 19))]
    put(tmp_path, "a", ["what flies?"], shapes, size=(20, 20))
    base, accelerator = tiny_base("llava"), Accelerator()
    samples = ReasonSegDataset(tmp_path, build=SampleBuilder.of(base))
    write_cache(tmp_path / "cache", base, None, samples, {}, accelerator)
    everything = torch.full((1, 20, 20), 9.0)
    output = {"pred_masks": everything, "sam_pred_masks": None, "scores": torch.ones(1)}

    class Everything(torch.nn.Module):
        def forward(self, features):
            return [output] * len(features)

    for sample in (samples[0], CachedFeatures(tmp_path / "cache")[0]):
        found = validate(Everything(), [[sample]], lambda samples: samples, accelerator)
        assert found["val_miou"] == found["val_miou_coarse"] == pytest.approx(100 / 260)


def test_reasonseg_reads_windows_files_and_names_what_is_no_question(tmp_path):
    put(tmp_path, "d", ["caf\u00e9 \u2019"], [("target", box(1, 1, 5, 5))], "cp1252")
    assert ReasonSegDataset(tmp_path).items[0][2] == "caf\u00e9 \u2019"
    put(tmp_path, "d", ["caf\u00e9"], [], "utf-8-sig")  # a byte order mark
    assert ReasonSegDataset(tmp_path).items[0][2] == "caf\u00e9"
    put(tmp_path, "e", [], [])
    with pytest.raises(UserError, match="e.json: text"):
        ReasonSegDataset(tmp_path)
    assert len(ReasonSegDataset(tmp_path, bad=(bad := Bad(skip=True)))) == 1 and len(bad.faults) == 1


def test_polygons_are_drawn_as_opencv_draws_them():
    """Areas and position-weighted sums of forty random polygons by cv2 5.0 (fillPoly and polylines)."""
    # fmt: off
    areas = [756, 305, 471, 631, 1, 23, 856, 292, 1, 649, 140, 681, 65, 220, 335, 632, 243, 228, 478, 1037,
             390, 1, 284, 360, 404, 15, 572, 578, 845, 1, 121, 204, 668, 1, 41, 23, 1, 14, 1, 259]
    sums = [94104, 38184, 63298, 76863, 75, 4425, 107294, 40940, 88, 90309, 17797, 84494, 7442, 29010, 43427,
            79199, 28124, 27241, 59150, 126229, 45388, 122, 34724, 46623, 54250, 2131, 71267, 75167, 109046,
            197, 13706, 23142, 79863, 62, 4724, 3124, 221, 1419, 45, 35905]
    # fmt: on
    rng, weights = np.random.default_rng(5), np.arange(48 * 64).reshape(48, 64) % 251
    drawn = [
        polygon(rng.integers(0, [64, 48], (int(rng.integers(1, 9)), 2)).tolist(), 48, 64) for _ in range(40)
    ]
    assert [int(mask.sum()) for mask in drawn] == areas
    assert [int((mask * weights).sum()) for mask in drawn] == sums
    assert polygon([[-9, -9], [200, -9], [200, 200], [-9, 200]], 48, 64).all()
    assert polygon([[1.9, 2.9]], 4, 4).nonzero() == (2, 1)  # truncated, not rounded


# ---- RefCOCO protocols, gRefCOCO, panoptic narratives


def test_of_references_to_one_annotation_the_last_counts_and_every_sentence_does(tmp_path):
    refs = [ref(1, 1, "Old"), ref(2, 2, "Other", "second"), ref(3, 1, "New", "newest")]
    paths = references(tmp_path, refs, {1: [square(0, 0, 9)], 2: [square(20, 10, 9)]})
    config = read_config("flmm/configs/tiny/scenes.yaml")
    entry = {"type": "refcoco", "split": "val", "text_mode": "select_first"}
    config["data"]["val"] = [{**entry, **{name: str(path) for name, path in paths.items()}}]
    phrases = {}
    for protocol in ("upstream", "object", "sentence"):
        data = build_dataset(config, "val", tmp_path, protocol=protocol)
        phrases[protocol] = [data.phrases(i) for i in range(len(data))]
    assert phrases["upstream"] == [["new", "other"]]  # in the place of the first, as mmdet's dictionary
    assert phrases["object"] == [["new"], ["other"]]
    assert phrases["sentence"] == [["old"], ["other"], ["second"], ["new"], ["newest"]]
    # whatever the configuration says, an object has its first expression and a sentence is one
    config["data"]["val"][0] |= {"text_mode": "original", "one_per_object": True}
    for protocol in ("object", "sentence"):
        data = build_dataset(config, "val", tmp_path, protocol=protocol)
        assert [data.phrases(i) for i in range(len(data))] == phrases[protocol]
    put(tmp_path, "a", ["where"], [("target", box(0, 0, 9, 9))])
    config["data"]["val"] = [{"type": "reasonseg", "folder": "."}]
    with pytest.raises(UserError, match="--protocol sentence has no effect on data.val"):
        build_dataset(config, "val", tmp_path, protocol="sentence")


def test_grefcoco_has_no_object_one_or_several_and_its_own_scores(tmp_path):
    refs = [
        ref(1, [2, 1, 2], "both", split="val"),
        ref(2, [-1], "a unicorn", no_target=True),
        ref(3, [2], "right"),
        ref(4, [], "nothing"),
    ]
    paths = references(tmp_path, refs, {1: [square(0, 0, 9)], 2: [square(20, 10, 9)]}, "grefs(unc).json")
    data = RefCOCODataset(**paths, split="val", text_mode="original", one_per_object=True)
    records = [data.record(i) for i in range(len(data))]
    assert [int(r["masks"].sum()) for r in records] == [162, 0, 81, 0]
    assert [r["mask_infos"][0]["no_target"] for r in records] == [False, True, False, True]
    # found: the first whole, the second wrongly, the third not at all, nothing for nothing
    rows = []
    for record, guess in zip(records, (records[0]["masks"], records[0]["masks"], 0, 0)):
        logits = torch.as_tensor(guess * np.ones((1, HEIGHT, WIDTH)) * 20 - 10)
        output = {"pred_masks": logits, "sam_pred_masks": None, "scores": torch.ones(1)}
        rows += phrase_rows(output, torch.from_numpy(record["masks"]))
    scores = summarise(rows)
    assert (scores["N_acc"], scores["T_acc"]) == (0.5, 0.5)
    assert scores["gIoU"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert scores["cIoU"] == pytest.approx(162 / (162 + 162 + 81))


def test_plurals_of_unannotated_segments_have_the_pixels_that_there_are(tmp_path):
    upstream_tree(tmp_path)
    captions = [
        {"image_id": 7, "segments": [{"utterance": "them", "segment_ids": ["5", "99"], "plural": 1}]},
        {"image_id": 7, "segments": [{"utterance": "it", "segment_ids": ["99"], "plural": False}]},
        {"image_id": 7, "segments": [{"utterance": "it", "segment_ids": ["9" * 5000], "plural": True}]},
    ]
    write_json(tmp_path / "captions.json", captions)
    folder = tmp_path / "annotations"
    paths = (
        tmp_path / "captions.json",
        folder / "panoptic_val2017.json",
        folder / "panoptic_val2017",
        tmp_path / "val2017",
    )
    panoptic = json.loads(paths[1].read_text())
    panoptic["annotations"].append({"image_id": 8})  # a fault that no caption names
    write_json(paths[1], panoptic)
    with pytest.raises(UserError, match="segment 99 of captions.json is not in segments_info"):
        PNGDataset(*paths)
    data = PNGDataset(*paths, bad=(bad := Bad(skip=True)))
    assert len(data) == 1 and len(bad.faults) == 2
    assert int(data.record(0)["masks"].sum()) == 400 and data.record(0)["mask_infos"][0]["isthing"]
    segments = paths[2] / "000000000007.png"
    Image.open(segments).quantize(256).save(segments)  # made smaller: its palette has the same colours
    assert int(data.record(0)["masks"].sum()) == 400
    Image.new("RGB", (WIDTH, HEIGHT)).save(segments, "JPEG")  # a PNG by its name alone
    with pytest.raises(UserError, match="7.png: JPEG changes the numbers of segments"):
        data.record(0)


# ---- faults in data


BAD_SEGMENTATIONS = {
    "too short": {"size": [HEIGHT, WIDTH], "counts": [5, 5]},
    "too long": {"size": [HEIGHT, WIDTH], "counts": [5, 5, HEIGHT * WIDTH]},
    "negative": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]},
    "broken": {"size": [HEIGHT, WIDTH], "counts": [0.5, HEIGHT * WIDTH - 0.5]},
    "compressed, too short": {"size": [HEIGHT, WIDTH], "counts": "55"},
    "compressed, cut off": {"size": [HEIGHT, WIDTH], "counts": "`"},
    "of letters": {"size": [HEIGHT, WIDTH], "counts": "\u00e9"},
    "turned": {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
    "endless": {"size": [HEIGHT, WIDTH], "counts": [float("inf")]},
    "no counts": {"size": [HEIGHT, WIDTH]},
    "text": [["a", "b", "c", "d", "e", "f"]],
    "odd": [[1, 1, 5, 1, 5, 5, 1]],
    "two corners": [[1, 1, 5, 5]],
    "infinite": [[1, 1, 5, 1, float("inf"), 5]],
    "nothing": [],
    "one corner": [[1, 2]],
    "null": None,
    "a text": "abc",
    "no size": {"counts": "x"},
    "size of letters": {"size": "no", "counts": [1, 2]},
    "counts of one number": {"size": [HEIGHT, WIDTH], "counts": 7},
}


@pytest.mark.parametrize("name", BAD_SEGMENTATIONS)
def test_a_segmentation_that_cannot_be_right_is_refused_and_never_memory(name):
    with pytest.raises(UserError, match="^annotation 1: "):
        decode_segmentation(BAD_SEGMENTATIONS[name], HEIGHT, WIDTH, "annotation 1")


def test_runs_of_a_compressed_rle_are_those_that_pycocotools_packs():
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 1):
        mask = np.asfortranarray(rng.random((50, 700)) < share, np.uint8)
        counts = rle_counts(coco.encode(mask)["counts"])
        values = np.repeat(np.arange(len(counts)) % 2, counts)
        assert np.array_equal(values, mask.flatten(order="F"))


def test_parts_of_a_polygon_without_an_area_are_dropped_and_counted(tmp_path):
    parts = [[1, 1, 5, 5], square(0, 0, 9), [3, 3]]
    paths = references(tmp_path, [ref(1, 1, "a")], {1: parts})
    data = RefCOCODataset(**paths, split="val")
    assert data.dropped_parts == 2 and int(data.record(0)["masks"].sum()) == 81


@pytest.mark.parametrize(
    "fault,reason",
    [
        ({"sentences": []}, "no sentence"),
        ({"sentences": [{"raw": " "}]}, "no sentence"),
        ({"sentences": [{"sent_id": 1}]}, "field 'sent' is missing"),
        ({"ann_id": 99}, "annotation 99 is not in"),
        ({"ann_id": "one"}, "ann_id is 'one'"),
        ({"ann_id": 2}, "no polygon has three corners"),
        ({"image_id": 8}, "image 8 is not in"),
        ({"image_id": None}, "image None is not in"),
        ({"image_id": [7]}, r"image \[7\] is not in"),
        ({"image_id": 9}, "image 9 has no field 'height'"),
        ({"ann_id": 3}, "annotation 3 lies in image 9, the reference in 7"),
        ({"ann_id": 4}, "annotation 4.segmentation is null"),
        ({"split": None}, "field 'split' is missing"),
        ({"sentences": [{"raw": 5}]}, "not as RefCOCO has it"),
        ({"sentences": None}, "not as RefCOCO has it"),
        ({"ann_id": [1, "x"]}, "ann_id is"),
    ],
)
def test_a_faulty_reference_is_named_at_load_or_left_out_and_counted(tmp_path, fault, reason):
    refs = [{**ref(11, 1, "bad"), **fault}, ref(12, 1, "good")]
    paths = references(tmp_path, refs, {i: [square(0, 0, 9)] for i in (1, 3)} | {2: [[1, 1, 5, 5]], 4: None})
    content = json.loads(paths["ann_file"].read_text())
    content["images"].append({"id": 9, "file_name": "9.jpg"})  # faults that no good reference names
    content["annotations"][1]["image_id"] = 9
    write_json(paths["ann_file"], content)
    with pytest.raises(UserError, match=f"reference 11: .*{reason}"):
        RefCOCODataset(**paths, split="val")
    data = RefCOCODataset(**paths, split="val", bad=(bad := Bad(skip=True)))
    assert data.phrases(0) == ["good"] and len(bad.faults) == 1


def test_numbers_of_numpy_in_a_pickle_are_numbers(tmp_path):
    one = {**ref(1, 1, "a"), "ann_id": np.int64(1), "image_id": np.int32(7), "ref_id": np.uint8(1)}
    paths = references(tmp_path, [one], {1: [square(0, 0, 9)]})
    assert int(RefCOCODataset(**paths, split="val").record(0)["masks"].sum()) == 81


@pytest.mark.parametrize("orientation", range(2, 9))
def test_pixels_stay_where_their_masks_are_whatever_the_camera_says(tmp_path, orientation):
    pixels = np.arange(HEIGHT * HEIGHT * 3, dtype=np.uint8).reshape(HEIGHT, HEIGHT, 3)
    tag = Image.Exif()
    tag[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=tag)
    stored = np.asarray(load_image(tmp_path / "turned.png", (HEIGHT, HEIGHT)))
    assert np.array_equal(stored, pixels)
    assert not np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), pixels)


@pytest.mark.parametrize(
    ("family", "size"), [("mistral3", (7, 5)), ("mistral3", (300, 2)), ("qwen", (201, 1))]
)
def test_a_picture_of_a_size_that_a_processor_cannot_take_is_refused_in_one_line(family, size):
    with pytest.raises(UserError, match=f"picture of {size[0]} x {size[1]} pixels: .*; crop it or scale it"):
        tiny_base(family).image_processor(Image.new("RGB", size))


@pytest.mark.parametrize("size", [(73, 1), (1, 144), (1000, 13), (3000, 10)])
def test_a_picture_too_thin_for_tiles_is_refused_before_the_model_runs(size):
    processor = LlavaNextImageProcessor()
    with pytest.raises(UserError, match=f"picture of {size[0]} x {size[1]} pixels: so thin"):
        processor(Image.new("RGB", size))
    assert processor(Image.new("RGB", (1000, 15)))["meta_data"]["image_shape"] == {
        "height": 16,
        "width": 1008,
    }


def test_items_that_fail_when_they_are_decoded_are_left_out_or_replaced(capsys):
    class Fragile(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index in (1, 2):
                raise UserError(f"{index}.jpg: not a readable picture")
            return index

    scored = SkipBad(Fragile(), replace=False)
    assert keep_good([scored[i] for i in range(4)]) == [0, 3]
    trained = SkipBad(Fragile(), replace=True)
    assert [trained[i] for i in range(4)] == [0, 3, 3, 3] and trained.bad == {1, 2}
    assert capsys.readouterr().err.count("skipped: 1.jpg") == 2
    with pytest.raises(UserError, match="not one item"):
        SkipBad(torch.utils.data.Subset(Fragile(), [1, 2]), replace=True)[0]


def test_a_head_of_another_depth_or_shape_is_refused_by_its_tensors(tmp_path):
    torch.manual_seed(0)
    dims = (6, 2, 8)
    deep = FLMM(*dims, sam=tiny_sam(), unet={"base_channels": 4, "num_stages": 4}).upstream_state()
    shallow = {"base_channels": 4, "num_stages": 3, "strides": (1,) * 3, "enc_num_convs": (2,) * 3}
    shallow |= {"dec_num_convs": (2,) * 2, "downsamples": (True,) * 2}
    for unet in (shallow, {"base_channels": 4, "dec_num_convs": (2, 2, 1)}):
        with pytest.raises(UserError, match=r"mask_head\..*have no place|no place .*mask_head\."):
            FLMM(*dims, sam=tiny_sam(), unet=unet).load_upstream(deep)
    # without SAM its tensors are of no use, and say nothing about the UNet
    assert "loaded" in FLMM(*dims, unet={"base_channels": 4}).load_upstream(deep)
    extra = {**deep, "sam.model.image_encoder.x": torch.zeros(1), "llava.model.y": torch.zeros(1)}
    assert "ignored 2" in FLMM(*dims, sam=tiny_sam(), unet={"base_channels": 4}).load_upstream(extra)


# ---- words


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_anyones_words_are_letters(family):
    base = tiny_base(family)
    tokenizer, prompt = base.tokenizer, base.encode_prompt()
    tokenizer.add_tokens(["<tool_call>"])
    control = control_tokens(tokenizer)
    assert base.image_token_id in control and "<tool_call>" in control.values()
    builder = SampleBuilder.of(base)
    # whatever steers this base, alone, in a sentence and twice
    words = [f"a {token} b" for token in control.values()]
    for text in [*words, "<image>", "<|im_end|>", tokenizer.decode([base.image_token_id] * 2)]:
        assert not control.keys() & set(encode_text(tokenizer, text))
        assert tokenizer.decode(encode_text(tokenizer, text)).strip() == text
        # in a phrase, in the words between phrases, and in a question
        ids, _, _ = builder.encode([(text, 0), (text, -1)])
        assert not control.keys() & set(ids[len(prompt) :].tolist())
        asked = base.encode_prompt(text)
        assert asked.count(base.image_token_id) == 1
        assert sum(i in control for i in asked) == sum(i in control for i in prompt)


@pytest.mark.parametrize("text", ["a \ud83d car", "\udcff"])
def test_half_characters_are_refused_wherever_words_come_from(text):
    base = tiny_base("llava")
    record = {"image": Image.new("RGB", (32, 32)), "file_name": "7.jpg"}
    with pytest.raises(UserError, match="^7.jpg: .* holds what is no character"):
        SampleBuilder.of(base)({**record, "pieces": [("the", -1), (text, 0)]})
    with pytest.raises(UserError, match="holds what is no character"):
        base.encode_prompt(text)


def test_an_answer_with_an_image_token_in_it_can_be_grounded(monkeypatch):
    base = tiny_base("llava")
    one = {"image": Image.new("RGB", (32, 32)), **base.image_processor(Image.new("RGB", (32, 32)))}
    one["input_ids"] = torch.tensor(base.encode_prompt())
    new = torch.tensor([[50, base.image_token_id, 70, base.tokenizer.eos_token_id, 9]])
    monkeypatch.setattr(
        base.model, "generate", lambda input_ids, **_: torch.cat([input_ids, new], 1), raising=False
    )
    assert base.generate(one) == [50, 70]


def test_ordinary_words_keep_the_tokens_that_they_always_had():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\u00f5"])  # letters among the added tokens, as DeepSeek has them
    for text in ("a red car", "[the] <b>bold</b> one", "\u00f5", "x < y > z"):
        assert encode_text(tokenizer, text) == tokenizer(text, add_special_tokens=False).input_ids
