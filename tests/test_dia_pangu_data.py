"""dia_pangu: volumes, masks, tables, and what is wrong with them."""

import json
import shutil

import nibabel
import numpy as np
import pytest
import torch

from common.errors import UserError
from dia_pangu.evaluate.evidence import locate
from dia_pangu.make_data import draw_findings, phantom, save_nifti
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, patch_labels, read_hu, resample
from dia_pangu.src.Dataset.prompt import FINDINGS
from dia_pangu.src.Model.build import make_text
from dia_pangu.src.Model.pangu import load_tokenizer
from tests.tiny_dia import *  # noqa: F403  the fixtures data, llm and model_text
from tests.tiny_dia import SMALL


def test_prepared_volume_is_independent_of_the_stored_orientation(data, tmp_path):
    image = nibabel.load(data / "volumes" / "1.nii.gz")
    reference = load_volume(data / "volumes" / "1.nii.gz", Grid((64, 64, 16)))
    voxels, affine = np.asanyarray(image.dataobj), image.affine
    flipped = affine.copy()
    flipped[:3, 3] += affine[:3, 0] * (voxels.shape[0] - 1)
    flipped[:3, 0] *= -1
    nibabel.save(nibabel.Nifti1Image(voxels[::-1], flipped), tmp_path / "flipped.nii.gz")
    turned = affine[:, [1, 2, 0, 3]]
    nibabel.save(nibabel.Nifti1Image(voxels.transpose(1, 2, 0), turned), tmp_path / "turned.nii.gz")
    for name in ("flipped", "turned"):
        assert torch.equal(load_volume(tmp_path / f"{name}.nii.gz", Grid((64, 64, 16))), reference), name
    hu, spacing = read_hu(tmp_path / "turned.nii.gz")
    assert hu.shape == (64, 64, 16) and spacing == pytest.approx((6.0, 6.0, 20.0))


def test_resampling_keeps_position_and_size_of_the_body():
    hu = np.full((40, 40, 20), -1000.0, np.float32)
    hu[10:20, 10:30, 5:15] = 50
    out = resample(hu, (3.0, 3.0, 6.0), Grid((60, 60, 30), (120.0, 120.0, 120.0)))
    inside = out > -400
    assert inside.float().mean().item() == pytest.approx((hu > -400).mean(), rel=0.08)
    counts = [inside.sum(tuple(a for a in range(3) if a != axis)).numpy() for axis in range(3)]
    centre = [np.average(np.arange(len(c)), weights=c) / len(c) for c in counts]
    assert centre == pytest.approx([14.5 / 40, 19.5 / 40, 9.5 / 20], abs=0.03)


@pytest.mark.parametrize("slices", [320, 319, 316, 304, 64])
def test_resampling_keeps_the_middle_where_the_slices_do_not_divide(slices):
    """HU that rise by 1 in each mm are what the grid's places say, whatever is averaged."""
    mm = (np.arange(slices) + 0.5 - slices / 2) * 320 / slices
    hu = np.broadcast_to(mm.astype(np.float32), (8, 8, slices)).copy()
    out = resample(hu, (10.0, 10.0, 320 / slices), Grid((8, 8, 64), (80.0, 80.0, 320.0)))
    assert np.abs(out[4, 4].numpy() - ((np.arange(64) + 0.5) * 5 - 160))[2:-2].max() < 0.01


def test_cached_and_fresh_volumes_are_equal(data, tmp_path):
    path = data / "volumes" / "2.nii.gz"
    fresh = load_volume(path, Grid((64, 64, 16)))
    for _ in range(2):
        assert torch.equal(load_volume(path, Grid((64, 64, 16)), tmp_path), fresh)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    load_volume(path, Grid((32, 32, 16)), tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_patch_labels_lie_where_the_finding_is(tmp_path):
    for side in ("left", "right"):
        for place in ("upper", "lower"):
            painted = {"consolidation": {"side": side, "place": place, "size": "large"}}
            _, bits = phantom(np.random.default_rng(5), painted)
            save_nifti(tmp_path / "m.nii.gz", bits)
            labels = patch_labels(tmp_path / "m.nii.gz", Grid((64, 64, 16)), (8, 8, 4))
            labels = labels.unflatten(0, (8, 8, 4))
            dense = labels[..., FINDINGS.index("consolidation")].numpy()
            assert labels.sum() == dense.sum() > 0
            found = locate(dense, (0.1, 0.9))
            right = found["side"] == side and (found["height"] > 0.5) == (place == "upper")
            assert right, (side, place, found)


def test_patch_labels_end_with_the_scan_and_know_its_unit(tmp_path):
    bits = np.ones((64, 64, 8), np.uint16)  # finding 0 in every voxel of a scan of half the field's height
    save_nifti(tmp_path / "m.nii.gz", bits)
    labels = patch_labels(tmp_path / "m.nii.gz", Grid((64, 64, 16)), (8, 8, 4)).unflatten(0, (8, 8, 4))
    assert labels[..., 0].amax((0, 1)).tolist() == [0, 1, 1, 0]

    _, bits = phantom(
        np.random.default_rng(5), {"pleural effusion": {"side": "left", "place": "", "size": "large"}}
    )
    save_nifti(tmp_path / "a.nii.gz", bits)
    image = nibabel.load(tmp_path / "a.nii.gz")
    microns = nibabel.Nifti1Image(np.asanyarray(image.dataobj), np.diag([1e3, 1e3, 1e3, 1]) @ image.affine)
    microns.header.set_xyzt_units("micron")
    nibabel.save(microns, tmp_path / "b.nii.gz")
    one, other = (patch_labels(tmp_path / f"{name}.nii.gz", Grid((64, 64, 16)), (8, 8, 4)) for name in "ab")
    assert one.sum() > 0 and torch.equal(one, other)


def test_phantoms_are_a_function_of_their_seed():
    first, second = (
        phantom(np.random.default_rng([7, 0, 3]), draw_findings(np.random.default_rng(1)))[0]
        for _ in range(2)
    )
    assert np.array_equal(first, second)


def test_the_partition_decides_the_split(data):
    test_set = CTRGDataset(data, "test", Grid((16, 16, 16)))
    for item in test_set.items:
        item["split"] = "train"
    assert len(test_set) == 4 and [s["id"] for s in test_set.items] == ["12", "13", "14", "15"]


def test_labels_are_1_for_present_findings_only(data):
    """Code 2 (absent) and code 3 (uncertain) are no positive labels; the truth is what the phantom holds."""
    attributes = json.loads((data / "attributes.json").read_text())
    train = CTRGDataset(data, "train", Grid((16, 16, 16)), vision=False)
    codes = [train.codes(item["id"]) for item in train.items]
    assert {1, 2} <= {code for row in codes for code in row}
    for i, item in enumerate(train.items):
        present = attributes[item["id"]]
        expected = [int(name in present) for name in FINDINGS[:-1]] + [int(not present)]
        assert train.statuses(i).tolist() == expected
    train.labels["1"] = [3] * 14
    assert not train.statuses(0).any()


def test_flips_are_a_function_of_seed_epoch_and_index(data, llm):
    text = make_text(load_tokenizer(llm), SMALL, 500)
    make = lambda seed: CTRGDataset(
        data, "train", Grid((16, 16, 16)), text, flip=0.5, seed=seed, vision=False
    )
    first, second, other = make(1), make(1), make(2)
    assert first[3]["text"] == second[3]["text"] != other[3]["text"]
    second.set_epoch(1)
    assert first[3]["text"] != second[3]["text"]


def test_real_files_load(data_root):
    for path in (
        *sorted((data_root / "ct" / "volumes").glob("*mm.nii.gz")),
        data_root / "ct" / "dicom_series",
    ):
        pytest.importorskip("pydicom")
        hu, spacing = read_hu(path)
        assert hu.ndim == 3 and -3000 < hu.min() < -900 and hu.max() > 500 and 0.5 < min(spacing) < 6
        prepared = load_volume(path, Grid((64, 64, 16)))
        assert prepared.shape == (3, 64, 64, 16) and 0 <= prepared.min() and prepared.max() <= 1


# Bad inputs: one line that names file and field.


def bad_volume(path, kind):
    voxels = np.random.default_rng(0).integers(-1000, 500, (12, 12, 6)).astype(np.float32)
    affine = np.diag([6.0, 6.0, 20.0, 1.0])
    if kind == "nan":
        voxels[3, 3, 3] = np.nan
    if kind == "constant":
        voxels[:] = 7
    if kind == "one slice":
        voxels = voxels[:, :, :1]
    image = nibabel.Nifti1Image(voxels, affine)
    if kind == "affine":
        image.header.set_sform(np.diag([6.0, 6.0, 0.0, 1.0]), code=1)
        image = nibabel.Nifti1Image(voxels, None, image.header)
    nibabel.save(image, path)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    "kind, message",
    [
        ("constant", "every voxel is 7"),
        ("one slice", "one slice is not a volume"),
        ("cut", "not a readable NIfTI"),
        ("affine", "affine cannot be inverted"),
    ],
)
def test_a_bad_volume_is_refused_in_one_line(kind, message, tmp_path):
    path = tmp_path / f"{kind}.nii.gz"
    bad_volume(path, kind)
    with pytest.raises(UserError, match=message) as error:
        load_volume(path, Grid((16, 16, 16)))
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_bad_tables_are_refused_by_file_and_field(data, tmp_path):
    table = (data / "CTRG_finding_labels.csv").read_text()
    note = json.loads((data / "annotation_en.json").read_text())

    def attempt(table, note):
        (tmp_path / "CTRG_finding_labels.csv").write_text(table)
        (tmp_path / "annotation_en.json").write_text(json.dumps(note))
        dataset = CTRGDataset(tmp_path, "train", Grid((16, 16, 16)), vision=False)
        return dataset.sample(0)

    assert attempt(table, note)["id"] == "1"
    lines = table.splitlines()
    for change, message in (
        ((table.replace("edema", "oedema"), note), "column edema is missing"),
        (("\n".join([lines[0], lines[1][:-1] + "7"]), note), "line 2: no_finding = '7'"),
        (("\n".join([*lines, lines[1][:-1] + "3"]), note), "id 1 stands twice"),
        (("\n".join([lines[0], *lines[2:]]), note), "id 1 of annotation_en.json has no row"),
        ((table, {**note, "train": [{"id": "1", "split": "train"}]}), "id 1: field finding is missing"),
        ((table, {"train": [{"finding": "x"}]}), r"train\[0\] has no field '?id"),
        ((table, {"test": note["test"]}), "partition train is empty"),
        ((table, {**note, "train": [{"id": "../x", "finding": "y"}]}), "has no row|not a plain name"),
    ):
        with pytest.raises(UserError, match=message):
            attempt(*change)


def test_skip_bad_counts_and_leaves_out(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    bad_volume(tmp_path / "data" / "volumes" / "2.nii.gz", "nan")
    (tmp_path / "data" / "volumes" / "5.nii.gz").unlink()
    dataset = CTRGDataset(tmp_path / "data", "train", Grid((16, 16, 16)))
    assert "NaN" in dataset[1]["error"]
    dataset.drop_bad()
    assert len(dataset) == 6 and set(dataset.skipped) == {"2", "5"}
    assert "2 of 8 samples skipped" in capsys.readouterr().out
