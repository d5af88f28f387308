"""dia_pangu: training, validation and test share no volume, name or array, and nothing is fitted on what is
scored."""

import hashlib
import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from dia_pangu.evaluate.findings import calibrate
from dia_pangu.src import test as report_script
from dia_pangu.src import train as train_script
from dia_pangu.src.Dataset.CTRG_dataset import SPLITS, CTRGDataset, collate, read_annotation
from dia_pangu.src.Dataset.dataset_test import dataset_test
from dia_pangu.src.Dataset.dataset_train import dataset_train
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Model.build import make_text
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from dia_pangu.src.Model.pangu import load_tokenizer
from studies.dia_pangu import baselines, pretrain_vit, real_reports, warm_llm
from studies.recipe import options
from tests.tiny_dia import *  # noqa: F403  the fixtures data and llm
from tests.tiny_dia import SMALL

GRID = Grid((16, 16, 16))


def prints_of(batches) -> set:
    """A hash of every volume that a loader gives."""
    return {hashlib.sha1(v.numpy().tobytes()).hexdigest() for batch in batches for v in batch["vision_x"]}


def small(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return tmp_path / "small.json"


def test_the_partitions_share_no_name_and_no_volume(data):
    sets = {split: CTRGDataset(data, split, GRID) for split in SPLITS}
    names = {split: {item["id"] for item in found.items} for split, found in sets.items()}
    arrays = {split: prints_of([collate([s]) for s in found]) for split, found in sets.items()}
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        assert names[one].isdisjoint(names[two]) and arrays[one].isdisjoint(arrays[two])
    assert [len(arrays[split]) for split in SPLITS] == [8, 3, 4]  # no volume twice


def test_an_id_in_two_partitions_is_refused(data, tmp_path):
    content = json.loads((data / "annotation_en.json").read_text())
    content["test"].append(content["train"][0])
    (tmp_path / "annotation_en.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="id 1 is in the partitions train and test"):
        read_annotation(tmp_path, "en")


def test_upstreams_names_open_their_own_partition(data):
    assert dataset_train(data, grid=GRID).split == "train" and len(dataset_train(data, grid=GRID)) == 8
    assert dataset_test(data, grid=GRID).split == "test" and len(dataset_test(data, grid=GRID)) == 4


def arguments_of(script, *arguments):
    return script.parse_args([str(a) for a in arguments])


def test_training_and_validation_sets_of_train_are_those_partitions(data, llm, tmp_path):
    named = {"data": data, "lang_encoder_path": llm, "config": small(tmp_path), "out": tmp_path / "x"}
    args = arguments_of(train_script, *options(named), "--flip", 0.9)
    config = train_script.model_config(args)
    text = make_text(load_tokenizer(llm), config, 500)
    train_set, val_set = train_script.make_sets(args, config, text)
    assert (train_set.split, val_set.split) == ("train", "val")
    test = prints_of([collate([s]) for s in CTRGDataset(data, "test", GRID)])
    train, val = (prints_of([collate([s]) for s in found]) for found in (train_set, val_set))
    assert train.isdisjoint(val) and train.isdisjoint(test) and val.isdisjoint(test)
    assert train_set.flip == 0.9 and val_set.flip == 0 and val_set.hide_places == 0


def test_the_configuration_file_gives_lora_and_no_head_without_places(tmp_path):
    lora = {"r": 8, "alpha": 32, "dropout": 0.0, "targets": ["q_proj"]}
    config = {**SMALL, "lora": lora, "embedding": {**SMALL["embedding"], "evidence_head": True}}
    (tmp_path / "c.json").write_text(json.dumps(config))
    base = ["--data", "x", "--out", "y", "--config", tmp_path / "c.json"]
    found = train_script.model_config(arguments_of(train_script, *base, "--stage", "ft", "--lora-r", 2))
    assert found["lora"] == {**lora, "r": 2} and not found["embedding"]["evidence_head"]
    assert train_script.model_config(arguments_of(train_script, *base, "--stage", "pre"))["lora"] is None


def test_reports_are_written_for_the_named_split(data, llm, tmp_path):
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        command = ["--ckpt-path", "x", "--lang-encoder-path", llm, "--data", data, "--split", split]
        args = arguments_of(report_script, *command)
        batches = report_script.read_batches(args, GRID, "en")
        names = [name for batch in batches for name in batch["id"]]
        assert names == [item["id"] for item in CTRGDataset(data, split, GRID).items] and len(names) == count
    default = arguments_of(report_script, "--ckpt-path", "x", "--lang-encoder-path", llm, "--data", data)
    assert default.split == "test"
    # A lone volume at the end has no neighbour: that shows before the first report.
    alone = arguments_of(report_script, *command, "--control", "swap", "--batch-size", 3)
    with pytest.raises(UserError, match="none to swap with"):
        report_script.read_batches(alone, GRID, "en")


def test_thresholds_are_calibrated_on_validation_volumes(data, llm, tmp_path, monkeypatch):
    """What reaches `calibrate` in a whole training has the labels of the validation volumes, in their
    order."""
    seen = []
    monkeypatch.setattr(
        train_script, "calibrate", lambda p, labels: seen.append((p.shape, labels)) or calibrate(p, labels)
    )
    monkeypatch.setattr(train_script, "batches", lambda *_: iter(()))  # no step: only what follows the loop
    named = {"data": data, "lang_encoder_path": llm, "config": small(tmp_path), "out": tmp_path / "run"}
    train_script.main(arguments_of(train_script, *options({**named, "accum": 1, "max_steps": 1})))
    (shape, labels), val = seen[0], CTRGDataset(data, "val", GRID)
    assert shape == (3, 14)
    assert np.array_equal(labels, np.stack([val.statuses(i) for i in range(3)]))


def test_the_vote_is_fitted_on_training_volumes_alone(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain_vit, "fit_vote", lambda layer, inputs, labels: seen.append(labels))
    layer = MyEmbedding(num_embeddings=1, embedding_dim=8, **SMALL["embedding"], evidence_head=True).eval()
    train_set, val_set = (CTRGDataset(data, split, GRID) for split in ("train", "val"))
    pretrain_vit.save_vision(layer, tmp_path, train_set, val_set, True, torch.device("cpu"))
    assert np.array_equal(seen[0].numpy(), np.stack([train_set.statuses(i) for i in range(8)]))
    places = json.loads((tmp_path / "places.json").read_text())
    assert set(places) == {item["id"] for item in (*train_set.items, *val_set.items)}  # none of the test


def test_pretraining_starts_from_training_masks(data, tmp_path, monkeypatch):
    """Statistics, memories and loaders of pretrain_vit.py see no validation volume but for its score."""
    seen = {}
    monkeypatch.setattr(
        pretrain_vit, "start_memories", lambda layer, found, volumes: seen.update(memories=found.split)
    )
    plain = pretrain_vit.patch_statistics
    monkeypatch.setattr(
        pretrain_vit,
        "patch_statistics",
        lambda found, n_tok: seen.update(statistics=found.split) or plain(found, n_tok),
    )
    plain_loader = pretrain_vit.make_loader
    monkeypatch.setattr(
        pretrain_vit,
        "make_loader",
        lambda found, args, train=True, **o: (
            seen.update({f"train={train}": found.split}) or plain_loader(found, args, train, **o)
        ),
    )
    monkeypatch.setattr(pretrain_vit, "batches", lambda *_: iter(()))
    command = ["--data", data, "--config", small(tmp_path), "--max-steps", 1, "--batch-size", 2]
    pretrain_vit.main(arguments_of(pretrain_vit, *command, "--out", tmp_path / "a"))
    # "--resume auto" begins where there is nothing to go on with.
    start = ["--start", tmp_path / "a", "--contrast", 2, "--out", tmp_path / "b", "--resume", "auto"]
    pretrain_vit.main(arguments_of(pretrain_vit, *command, *start))
    assert seen == {"statistics": "train", "memories": "train", "train=True": "train", "train=False": "val"}


def test_the_language_model_reads_no_validation_report(data, tmp_path):
    args = arguments_of(warm_llm, "--data", data, "--make", 1, "--out", tmp_path)
    train_set, val_set, *_ = warm_llm.make_sets(args)
    reports = warm_llm.training_reports(train_set)
    assert (train_set.split, val_set.split) == ("train", "val")
    assert reports == [item["finding"] for item in CTRGDataset(data, "train", GRID).items]


def test_baselines_are_fitted_on_training_and_calibrated_on_validation(data, tmp_path, monkeypatch):
    """The linear model never sees a label of the test volumes, nor its PCA a test voxel."""
    seen = {}
    plain = baselines.linear_model

    def linear_model(train, val, test_voxels, parts, seed):
        seen.update(train=train, val=val, test=test_voxels)
        return plain(train, val, test_voxels, parts, seed)

    class Pca(baselines.PCA):
        def fit(self, x):
            seen["fitted"] = x
            return super().fit(x)

    monkeypatch.setattr(baselines, "linear_model", linear_model)
    monkeypatch.setattr(baselines, "PCA", Pca)
    command = ["--data", data, "--out", tmp_path / "b", "--config", small(tmp_path), "--parts", 2]
    baselines.main(arguments_of(baselines, *command))
    sets = {split: CTRGDataset(data, split, GRID) for split in SPLITS}
    for split in ("train", "val"):
        assert np.array_equal(
            seen[split][1], np.stack([sets[split].statuses(i) for i in range(len(sets[split]))])
        )
    assert len(seen["test"]) == 4 and np.array_equal(seen["fitted"], seen["train"][0])
    test = {row.tobytes() for row in seen["test"]}
    assert test.isdisjoint({row.tobytes() for row in (*seen["train"][0], *seen["val"][0])})


def test_the_learned_labeler_is_fitted_on_the_training_reports(tmp_path, monkeypatch):
    """On the file `train_reports`, and scored on the other one."""
    names = list(real_reports.LABELS_18)
    files = {}
    for part in ("train", "val"):
        cases = [{"report": f"{part} {i} nodule", "labels": [i % 2] * 18} for i in range(6)]
        files[part] = tmp_path / f"{part}.json"
        files[part].write_text(json.dumps({"label_names": names, "cases": cases}))
    seen = []
    monkeypatch.setattr(
        real_reports,
        "learned_labeler",
        lambda texts, labels, others: seen.append((texts, others)) or np.zeros((len(others), 18), bool),
    )
    real_reports.labeler_study(tmp_path, files["val"], files["train"])
    texts, others = seen[0]
    assert all(t.startswith("train") for t in texts) and all(t.startswith("val") for t in others)
