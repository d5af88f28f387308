"""dia_pangu: every kind of scan is read right, put right with a note, or refused in one line."""

import csv
import gzip
import math
import os
import random
import shutil
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom

from common.errors import UserError
from dia_pangu import convert_ctrg
from dia_pangu.evaluate.evidence import Backdrop, draw_evidence, locate_all
from dia_pangu.src import test as report_script
from dia_pangu.src.Dataset.preprocess import Grid, load_scan, load_volume, read_hu, resample, stamp
from dia_pangu.src.Dataset.prompt import FINDINGS, without_sides
from dia_pangu.src.Dataset.scan import read_ct, read_scan, scan_name
from dia_pangu.src.Dataset.scans import find_scans
from dia_pangu.src.Dataset.verdict import Verdict, judge_values
from dia_pangu.src.Model.build import build_model, make_embedding, save_model
from dia_pangu.src.report_files import Journal
from studies.dia_pangu import ct_files
from studies.dia_pangu.ct_files import COUNT, LPS, RAS, STEP_MM, save, screenshot, series, spoil, volume
from studies.dia_pangu.scan_kinds import GRID, truth
from studies.recipe import options
from tests.tiny_dia import *  # noqa: F403  the fixture llm
from tests.tiny_dia import SMALL, call


def wrong_by(path, **options) -> float:
    """Mean difference in HU from the truth of a scan that is read and resampled to GRID."""
    hu, spacing_mm, _ = read_ct(path, **options)
    return float(np.abs(resample(hu, spacing_mm, GRID).numpy().clip(-1000, 400) - truth()).mean())


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> float:
    """The difference that sampling alone makes."""
    return wrong_by(save(tmp_path_factory.mktemp("good") / "a.nii.gz", volume().astype(np.int16)))


def nifti_kinds(folder):
    """Yield (name, path, a word of the note, "" for none, or None and a word of the refusal)."""
    hu = volume()
    whole = hu.astype(np.int16)
    yield "float64", save(folder / "0.nii", hu.astype(np.float64)), ""
    yield "HU+1024", save(folder / "1.nii", (hu + 1024).clip(0).astype(np.uint16)), "1024"
    yield "HU+1000", save(folder / "2.nii", (hu + 1000).clip(0).astype(np.uint16)), "1000"
    yield "HU+32768", save(folder / "3.nii", (hu + 32768).astype(np.uint16)), "32768"
    yield "HU+2048 as float", save(folder / "4.nii", hu + 2048), "2048"
    yield "microns", save(folder / "5.nii", whole, np.diag([1e3, 1e3, 1e3, 1]) @ RAS, unit="micron"), "micron"
    yield (
        "metres",
        save(folder / "6.nii", whole, np.diag([1e-3, 1e-3, 1e-3, 1]) @ RAS, unit="meter"),
        "metres",
    )
    yield (
        "microns, said to be mm",
        save(folder / "7.nii", whole, np.diag([1e3, 1e3, 1e3, 1]) @ RAS),
        "only that is possible",
    )
    yield "mm, said to be microns", save(folder / "8.nii", whole, unit="micron"), "only that is possible"
    padded = hu.copy()
    padded[:3] = -3024
    yield "padding -3024", save(folder / "9.nii", padded), ""
    metal = hu.copy()
    metal[20:22, 20:22, 15] = 30000
    yield "metal", save(folder / "10.nii", metal), ""
    yield "trailing axes", save(folder / "11.nii", whole[..., None, None]), ""
    turned = LPS.copy()
    a = math.radians(15)
    turned[:3, :3] = (
        np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]) * STEP_MM
    )
    turned[:3, 3] = -turned[:3, :3] @ (COUNT - 1) / 2
    oblique = volume(turned).astype(np.int16)
    yield "oblique", save(folder / "12.nii", oblique, np.diag([-1, -1, 1, 1]) @ turned), "turned by 15.0"


def test_values_units_and_axes_of_nifti_files_are_put_right_with_a_note(tmp_path, good):
    for name, path, note in nifti_kinds(tmp_path):
        assert wrong_by(path) < good + (35 if name == "oblique" else 12), name  # interpolation blurs edges
        hu, _, verdict = read_ct(path)
        assert hu.min() >= -1024, name  # padding is air
        assert (note in " ".join(verdict.notes)) if note else not verdict.notes, (name, verdict.notes)


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("0..255", lambda v: ((v + 1350) / 1500 * 255).clip(0, 255).astype(np.uint8), "8-bit grey levels"),
        ("0..255 as float", lambda v: ((v + 160) / 400 * 255).clip(0, 255), "8-bit grey levels"),
        ("0..1", lambda v: ((v + 1000) / 1400).clip(0, 1), "normalised"),
        ("-1..1", lambda v: ((v + 1000) / 700 - 1).clip(-1, 1), "normalised"),
        ("z-scores", lambda v: (v - v.mean()) / v.std(), "no HU"),
        ("tenfold", lambda v: v * 10, "no HU"),
        ("-HU", lambda v: -v, "inverted, air is brighter"),
        ("1024 - HU", lambda v: 1024 - v, "inverted, air is brighter"),
        (
            "stored 12 bits, inverted",
            lambda v: (3071 - v).clip(0).astype(np.uint16),
            "inverted, air is brighter",
        ),
        ("-HU, padded", lambda v: np.where(np.arange(40)[:, None, None] < 3, 3024, -v), "inverted, air is"),
        ("soft-tissue window, inverted", lambda v: -v.clip(-160, 240), "the corners are bright"),
        ("0..255, inverted", lambda v: 255 - ((v + 1350) / 1500 * 255).clip(0, 255), "8-bit grey levels"),
        ("MR", lambda v: np.abs(v) * 0.7 + 80, "no HU"),
        ("mask", lambda v: (v > 0).astype(np.int16) * 1000, "a mask"),
        (
            "labels",
            lambda v: np.digitize(v, [-900, -500, 0, 55, 200]).astype(np.uint8),
            "different values: a mask",
        ),
        ("uptake", lambda v: (v + 1000) / 100, "not found at their HU"),
        ("complex", lambda v: v.astype(np.complex64), "complex64"),
        ("colours", lambda v: np.zeros(v.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
        ("phases", lambda v: np.stack([v, v], -1), "2 phases"),
        ("NaN", lambda v: np.where(np.arange(len(v))[:, None, None] < 2, np.nan, v), "NaN"),
    ],
)
def test_what_is_no_hu_is_refused_and_named(name, make, message, tmp_path):
    path = save(tmp_path / "a.nii.gz", make(volume()))
    with pytest.raises(UserError, match=message) as error:
        read_hu(path)
    assert "\n" not in str(error.value) and "a.nii.gz" in str(error.value)


@pytest.mark.parametrize("padding", [-1500, -2048, -3024])
def test_padding_is_not_taken_for_the_bone_of_an_inverted_scan(padding):
    """Also where a resampling has mixed it with air."""
    x, y = (np.arange(n) - (n - 1) / 2 for n in COUNT[:2])
    outside = (x[:, None, None] / 18) ** 2 + (y[:, None] / 14.5) ** 2 >= 1
    mixed = zoom(np.where(outside, padding, volume()), 1.3, order=1)
    for stored, values in ((mixed, "HU"), (mixed.clip(None, 200), "HU"), (-mixed, "no HU")):
        verdict = Verdict("NIfTI")
        judge_values(verdict, stored)
        assert verdict.values == values and not verdict.offset


@pytest.mark.parametrize(
    "fill, offset, noted",
    [(0, 0, "filled with 0 HU"), (3071, 0, "filled with 3071"), (-2000, 0, ""), (0, 1024, "")],
)
def test_what_fills_the_corners_is_air_and_no_sign_of_an_offset(fill, offset, noted, tmp_path, good):
    """Outside of the scanned circle lies one value, which may be water's, bone's, or 24 HU below air."""
    stored = (volume() + offset).clip(0 if offset else None)
    x, y, _ = np.moveaxis(ct_files.grid(), -1, 0)
    stored[np.hypot(x, y) > 165] = fill
    path = save(tmp_path / "a.nii", stored.astype(np.int16))
    assert wrong_by(path) < good + 12
    assert noted in " ".join(read_ct(path)[2].notes) and read_ct(path)[2].offset == offset


@pytest.mark.parametrize("noise", [0, 20, 40])
@pytest.mark.parametrize("offset", [1000, 1024, 2048])
def test_air_whose_noise_is_cut_off_shows_the_right_offset(offset, noise):
    """Stored without a sign, air's noise piles up at 0, which is 24 HU below air where 1024 was added."""
    hu = volume() + noise * np.random.default_rng(0).normal(size=volume().shape)
    verdict = Verdict("NIfTI")
    judge_values(verdict, (np.rint(hu).clip(-1024) + offset).clip(0).astype(np.uint16))
    assert verdict.values == "HU" and verdict.offset == offset


def test_a_side_is_known_only_where_a_header_says_so(tmp_path):
    whole = volume().astype(np.int16)
    known = {"plain": save(tmp_path / "a.nii", whole)}
    half = np.diag([1.0, 1.0, -1.0, 1.0]) @ RAS
    known["from head to feet"] = save(tmp_path / "b.nii", whole[..., ::-1].copy(), half)
    guessed = {
        "form codes 0": save(tmp_path / "c.nii", whole, qform_code=0, sform_code=0),
        "identity": save(tmp_path / "d.nii", whole, np.eye(4)),
        "front and back exchanged": save(tmp_path / "e.nii", whole, np.diag([8.0, 8.0, 9.0, 1.0])),
    }
    nibabel.save(nibabel.AnalyzeImage(whole, RAS), tmp_path / "f.img")
    guessed["Analyze"] = tmp_path / "f.img"
    image = nibabel.Nifti1Image(whole, RAS)
    image.set_sform(RAS, 2)
    image.set_qform(np.diag([8.0, 8.0, 9.0, 1.0]), 1)
    nibabel.save(image, tmp_path / "g.nii")
    guessed["qform against sform"] = tmp_path / "g.nii"
    for expected, paths in (("known", known), ("unknown", guessed)):
        for name, path in paths.items():
            verdict = read_ct(path)[2]
            assert verdict.side == expected, (name, verdict)
            assert bool(verdict.notes) == (expected == "unknown")


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("heart, spine, front", [(480, 300, 40), (50, 260, 420), (50, 400, 300)])
def test_the_spine_is_told_from_other_bright_parts_in_the_middle(heart, spine, front, exchanged, tmp_path):
    """A heart full of contrast, calcified ribs before a spine of little bone, and a breastbone."""
    x, y, z = np.moveaxis(ct_files.grid(), -1, 0)
    hu = volume(noise=0)
    hu[hu == 50], hu[hu == 400] = heart, spine
    hu[(np.abs(x) < 17) & (np.abs(y + 88) < 9) & (z > -20)] = front
    path = save(tmp_path / "a.nii", hu, np.diag([8.0, 8.0, 9.0, 1.0]) if exchanged else RAS)
    if not exchanged:
        assert read_ct(path)[2].side == "known", read_ct(path)[2].notes
    elif spine > 350:  # else no bone is dense enough to say so
        assert read_ct(path)[2].side == "unknown"


def test_axes_in_another_order_than_the_header_says_are_named(tmp_path):
    whole, steps = volume().astype(np.int16), np.diag(RAS)[:3]
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0)):
        turned, named = np.ascontiguousarray(whole.transpose(order)), RAS[:, [*order, 3]]
        assert read_ct(save(tmp_path / "right.nii", turned, named))[2].side == "known", order
        wrong = read_ct(save(tmp_path / "wrong.nii", turned, np.diag([*steps[list(order)], 1.0])))[2]
        assert (wrong.side == "known") == (order[2] == 2), (order, wrong)


def test_a_scan_without_lungs_is_named(tmp_path, capsys):
    hu = volume()
    assert read_ct(save(tmp_path / "chest.nii", hu))[2].chest == "yes"
    hu[(hu < -500) & (np.abs(ct_files.grid()[..., 0]) < 130) & (np.abs(ct_files.grid()[..., 1]) < 85)] = 30
    read_hu(save(tmp_path / "belly.nii", hu))
    assert "this is no chest" in capsys.readouterr().err
    child = np.diag([0.35, 0.35, 0.35, 1.0]) @ RAS
    for slices, chest in ((30, "yes"), (9, "unclear")):
        assert read_ct(save(tmp_path / "child.nii", volume()[..., :slices], child))[2].chest == chest


# DICOM


@pytest.mark.parametrize("degrees", [8, 15, 25])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gantry_tilt_is_straightened(degrees, sign, tmp_path, good):
    t = math.radians(degrees * sign)
    series(tmp_path / "s", cosines=(1, 0, 0, 0, math.cos(t), math.sin(t)))
    hu, spacing_mm, verdict = read_ct(tmp_path / "s")
    assert spacing_mm[2] == pytest.approx(9.0, abs=0.01) and f"{degrees}.0 degrees" in verdict.tilt
    spine = np.argwhere(hu[..., 10:20] > 300)
    rows = [spine[spine[:, 2] == k, 0].mean() * spacing_mm[0] for k in (0, 9)]
    assert abs(rows[0] - rows[1]) < 3
    # The wedges at both ends are not in the scan; the middle half is compared.
    out = resample(hu, spacing_mm, GRID).numpy().clip(-1000, 400)[..., 8:16]
    assert np.abs(out - truth()[..., 8:16]).mean() < good + 30  # interpolation blurs edges


def test_series_of_other_forms_give_the_same_volume(tmp_path, good):
    series(tmp_path / "plain")
    series(tmp_path / "backwards", heights=range(29, -1, -1))
    series(tmp_path / "flipped", cosines=(-1, 0, 0, 0, 1, 0))
    series(tmp_path / "deep/in/folders")
    ct_files.enhanced(tmp_path / "enhanced.dcm")
    series(tmp_path / "plain/other", heights=range(3), change=spoil("ImagePositionPatient", "", 1))
    series(tmp_path / "class", Modality=None)  # the class of the file says that it is a CT
    for name in ("backwards", "flipped", "deep", "enhanced.dcm", "plain/007.dcm", "class"):
        assert wrong_by(tmp_path / name) < good + 3, name
    shutil.rmtree(tmp_path / "plain/other")
    assert wrong_by(tmp_path / "plain") < good + 3
    for name, note in (("twice", "equal pixels"), ("changing", "spacing changes"), ("bare", "")):
        heights = {"twice": [*range(30), 4, 9], "changing": [*range(15), *np.arange(15, 29.5, 1.4)]}
        series(tmp_path / name, heights=heights.get(name))
        if name == "bare":  # without preamble
            for file in (tmp_path / name).iterdir():
                file.write_bytes(file.read_bytes()[132:])
        assert wrong_by(tmp_path / name) < good + 5, name
        assert note in " ".join(read_ct(tmp_path / name)[2].notes)


def test_acquisitions_that_lie_over_each_other_are_told_apart(tmp_path, good):
    for tag, offset in (("AcquisitionNumber", 0.0), ("ConvolutionKernel", 0.0), ("TriggerTime", 0.4)):
        folder = tmp_path / tag
        heights = [k + offset * (n == 1) for k in range(30) for n in range(2)]

        def change(data, n, tag=tag):
            setattr(data, tag, ["1", "2"][n % 2])
            if n % 2:
                stored = np.frombuffer(data.PixelData, np.uint16)
                data.PixelData = np.where(stored > 900, stored + 150, stored).astype(np.uint16).tobytes()

        series(folder, heights=heights, change=change)
        verdict = read_ct(folder)[2]
        assert "2 acquisitions" in verdict.phases and tag in verdict.phases
        assert wrong_by(folder) < good + 3, tag

    def brighter(data, n):
        if n % 2:
            data.PixelData = (np.frombuffer(data.PixelData, np.uint16) + 99).astype(np.uint16).tobytes()

    series(tmp_path / "x", heights=[k for k in range(30) for _ in range(2)], change=brighter)
    with pytest.raises(UserError, match="at one place with different pixels"):
        read_hu(tmp_path / "x")


def test_two_patients_under_one_uid_are_two_series(tmp_path, capsys):
    series(tmp_path / "s", change=lambda data, n: setattr(data, "PatientID", "ab"[n // 16]))
    assert read_ct(tmp_path / "s")[0].shape[2] == 16 and "2 series" in capsys.readouterr().err
    series(tmp_path / "t", change=spoil("PatientID", "a", 7))  # the others name none
    assert read_ct(tmp_path / "t")[0].shape[2] == 30


def test_stations_and_slices_turned_by_rounding_stay_together(tmp_path, good):
    def change(data, n):
        data.AcquisitionNumber = 1 + n // 10
        data.ImageOrientationPatient = [1, 0.005 + (-1) ** n * 1e-6, 0, -0.005, 1, 0]

    assert wrong_by(series(tmp_path / "s", change=change)) < good + 3
    assert read_ct(tmp_path / "s")[2].phases == "one"


def test_pictures_beside_a_series_are_previews(tmp_path, good):
    folder = series(tmp_path / "s")
    for name in ("preview.jpg", "key 1.png", "key 2.png"):
        Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(folder / name)
    assert read_ct(folder)[2].format == "DICOM" and wrong_by(folder) < good + 3


def test_a_series_behind_a_link_is_read_once(tmp_path, good):
    series(tmp_path / "archive/s")
    (tmp_path / "scan").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"scan/{name}").symlink_to(tmp_path / "archive/s")
    (tmp_path / "archive/s/loop").symlink_to(tmp_path / "scan")
    verdict = read_ct(tmp_path / "scan")[2]
    assert not verdict.notes and wrong_by(tmp_path / "scan") < good + 3


def test_padding_without_its_tag_and_sign_is_air(tmp_path, good):
    """-2000 in pixels that the header calls unsigned."""

    def pad(data, n):
        stored = np.frombuffer(data.PixelData, np.uint16).reshape(data.Rows, data.Columns).copy()
        stored[:2], stored[:, :2] = 63536, 63536
        data.PixelData = stored.tobytes()

    folder = series(tmp_path / "s", change=pad)
    assert any("without its sign" in note for note in read_ct(folder)[2].notes)
    assert wrong_by(folder) < good + 5


@pytest.mark.parametrize(
    "tags, note",
    [
        ({"GantryDetectorTilt": 18}, "GantryDetectorTilt is 18"),
        ({"GantryDetectorTilt": -18}, "GantryDetectorTilt is 18"),
        ({"GantryDetectorTilt": 0}, ""),
        ({"GantryDetectorTilt": ""}, ""),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "ImageType says MIP"),
        ({"ImageType": ["DERIVED", "SECONDARY", "AXIAL"]}, ""),
        ({"PixelSpacing": [0.8, 0.8]}, "28 mm wide"),
    ],
)
def test_what_the_tags_make_doubtful_is_named(tags, note, tmp_path):
    notes = read_ct(series(tmp_path / "s", **tags))[2].notes
    assert note in " ".join(notes) if note else not notes


def test_a_jitter_of_the_places_is_no_tilt_and_a_tilt_is_not_named_twice(tmp_path, good):
    def jitter(data, n):
        x, *others = data.ImagePositionPatient
        data.ImagePositionPatient = [x + 0.4 * (n % 2), *others]

    assert wrong_by(series(tmp_path / "jitter", change=jitter)) < good + 3
    t = math.radians(18)
    folder = series(tmp_path / "true", cosines=(1, 0, 0, 0, math.cos(t), math.sin(t)), GantryDetectorTilt=18)
    assert not any("GantryDetectorTilt" in note for note in read_ct(folder)[2].notes)


@pytest.mark.slow
def test_the_chest_is_found_among_series_localizers_and_dose_pages(tmp_path, good, capsys):
    folder = tmp_path / "study"
    series(folder / "a", SeriesInstanceUID="1.2.3.11", SeriesDescription="ABDOMEN", heights=range(30))
    series(folder / "b", SeriesInstanceUID="1.2.3.22", SeriesDescription="CHEST 5mm", heights=range(0, 30, 2))
    series(folder / "c", SeriesInstanceUID="1.2.3.33", SeriesDescription="Chest 1mm")
    series(folder / "d", SeriesInstanceUID="1.2.3.44", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series(folder / "e", SeriesInstanceUID="1.2.3.55", Modality="MR", SeriesDescription="chest")
    page = {"ImagePositionPatient": None, "ImageOrientationPatient": None, "PixelSpacing": None}
    series(folder / "f", heights=[0], SeriesInstanceUID="1.2.3.66", **page)
    (folder / "DICOMDIR").write_bytes(b"x" * 300)
    (folder / "Thumbs.db").write_bytes(b"junk")
    verdict = read_ct(folder)[2]
    assert verdict.series == "1.2.3.33" and "best of 3" in " ".join(verdict.notes)
    table = capsys.readouterr().err
    for word in ("ABDOMEN", "CHEST 5mm", "a localizer", "modality MR", "no ImagePositionPatient", "--series"):
        assert word in table, word
    assert read_ct(folder, series="1.2.3.22")[2].series == "1.2.3.22"
    assert "another body part" in " ".join(read_ct(folder, series="3")[2].notes)
    for wanted in ("99", "1.2.3.44", "7.7"):
        with pytest.raises(UserError, match="series"):
            read_ct(folder, series=wanted)
    assert wrong_by(folder) < good + 3
    # A localizer under the chest's own UID.
    series(tmp_path / "same")
    series(tmp_path / "one", heights=[3], cosines=(1, 0, 0, 0, 0, -1))
    shutil.copy(tmp_path / "one/000.dcm", tmp_path / "same/loc.dcm")
    assert wrong_by(tmp_path / "same") < good + 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, message",
    [
        (spoil("ImagePositionPatient", "", 5), "005.dcm: ImagePositionPatient is missing or empty"),
        (spoil("ImageOrientationPatient", "", 5), "005.dcm: ImageOrientationPatient is missing or empty"),
        (spoil("PixelSpacing", ""), "no PixelSpacing"),
        (spoil("PixelSpacing", [8.0, 9.0], 4), "PixelSpacing differs"),
        (spoil("PixelSpacing", [0.008, 0.008]), "would be 0.32 x 0.256 x 270 mm"),
        (spoil("RescaleSlope", "", 4), "some slices have RescaleSlope"),
        (spoil("PixelData", b"\0" * 100, 3), "003.dcm: not a usable CT slice"),
        (spoil("PixelData", None, 3), "003.dcm: not a usable CT slice"),
        (spoil("Modality", "MR"), "modality MR"),
        (spoil("Modality", "PT"), "modality PT"),
        (
            lambda data, n: spoil("RescaleSlope", -1)(data, n) or spoil("RescaleIntercept", 1024)(data, n),
            "inverted",
        ),
        (spoil("RescaleType", "Z_EFF"), "RescaleType Z_EFF"),
        (spoil("NumberOfFrames", 30), "30 frames in one file, whose places no tag tells"),
        (spoil("ModalityLUTSequence", [pydicom.Dataset()]), "ModalityLUTSequence"),
        (screenshot, "no HU"),
        (lambda data, n: n not in (9, 10), "slices are missing"),
        (lambda data, n: n == 0, "one slice is not a volume"),
        (spoil("ImagePositionPatient", [-100.0, -124.0, -130.5 + 9 * 6], 7), "side by side at one height"),
        (spoil("ImagePositionPatient", [-100.0, -124.0, -130.5 + 9 * 7], 7), "shifted against each other"),
    ],
)
def test_a_series_that_cannot_be_read_is_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read_hu(series(tmp_path / "s", change=change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tag", ["RescaleSlope", "both"])
def test_missing_rescale_tags_are_seen_from_the_values(tag, tmp_path, good):
    tags = {"RescaleSlope": None, "RescaleIntercept": None} if tag == "both" else {"RescaleSlope": ""}
    path = series(tmp_path / "s", **tags)
    assert wrong_by(path) < good + 3
    assert ("1024 is taken off" in " ".join(read_ct(path)[2].notes)) == (tag == "both")


def test_padding_outside_the_circle_is_air(tmp_path, good):
    def change(data, n):
        stored = np.frombuffer(data.PixelData, np.uint16).reshape(data.Rows, -1).copy()
        stored[:, :2] = stored[:, -2:] = 63000
        data.PixelPaddingValue = 63000
        data.PixelData = stored.tobytes()

    assert wrong_by(series(tmp_path / "s", change=change)) < good + 3


def test_compressed_slices_equal_plain_ones(tmp_path, monkeypatch):
    plain = read_hu(series(tmp_path / "plain"))[0]
    syntaxes = {
        pydicom.uid.RLELossless: None,
        pydicom.uid.JPEGLSLossless: "jpeg_ls",
        pydicom.uid.JPEG2000Lossless: "openjpeg",
    }
    for syntax, package in syntaxes.items():
        if package:
            pytest.importorskip(package)
        folder = series(tmp_path / syntax, change=lambda data, n, s=syntax: data.compress(s) and None)
        assert np.array_equal(read_hu(folder)[0], plain), syntax.name
    # A decoder that is not installed is named.
    jpeg_2000 = pydicom.pixels.get_decoder(pydicom.uid.JPEG2000Lossless)
    monkeypatch.setattr(type(jpeg_2000), "is_available", False)
    with pytest.raises(UserError, match="JPEG 2000 needs a decoder; pip install pylibjpeg"):
        read_hu(tmp_path / pydicom.uid.JPEG2000Lossless)


# Other files


@pytest.mark.parametrize(
    "name, first, value, message",
    [
        ("a.nii", 108, 0.0, "vox_offset 0 lies in the header"),
        ("a.nii", 80, 0.0, "pixdim is 0"),
        ("a.nii.gz", None, None, "not compressed"),
        ("b.nii", None, None, "compressed; name it .nii.gz"),
    ],
)
def test_a_header_that_nibabel_would_mend_with_a_guess_is_refused(name, first, value, message, tmp_path):
    save(tmp_path / "a.nii", volume().astype(np.int16), sform_code=0)
    stored = bytearray((tmp_path / "a.nii").read_bytes())
    if first is not None:
        stored[first : first + 4] = np.float32(value).tobytes()
    (tmp_path / name).write_bytes(gzip.compress(stored) if name == "b.nii" else stored)
    with pytest.raises(UserError, match=message):
        read_scan(tmp_path / name)


def written_by_itk(path, spacing=STEP_MM, origin=LPS[:3, 3]):
    """Write the chest as MetaImage or NRRD."""
    itk = pytest.importorskip("SimpleITK")
    image = itk.GetImageFromArray(volume().astype(np.int16).transpose(2, 1, 0))
    image.SetSpacing([float(step) for step in spacing])
    image.SetOrigin([float(place) for place in origin])
    itk.WriteImage(image, str(path))
    return path


@pytest.mark.parametrize("suffix", ["mha", "mhd", "nrrd"])
def test_metaimage_and_nrrd_are_read(suffix, tmp_path, good):
    path = written_by_itk(tmp_path / f"a.{suffix}")
    assert wrong_by(path) < good + 3 and read_ct(path)[2].side == "known"
    path = written_by_itk(tmp_path / f"b.{suffix}", (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    assert read_ct(path)[2].side == "unknown"


@pytest.mark.parametrize(
    "written, edited, word",
    [
        (b"ElementSpacing = 8 8 9\n", b"", "no spacing is known"),
        (b"ElementSpacing = 8", b"ElementSpacing = -8", "negative"),
        (b"AnatomicalOrientation = RAI", b"AnatomicalOrientation = LAI", "contradict each other"),
        (b"TransformMatrix = 1 0 0 0 1 0 0 0 1\n", b"", "no TransformMatrix"),
        (b"left-posterior-superior", b"scanner-xyz", "names no space of the patient"),
        (b"-superior", b'-superior\nspace units: "cm" "cm" "cm"', "space units are cm"),
        (b"-superior", b'-superior\nspace units: "um" "um" "um"', "only that is possible"),
    ],
)
def test_what_a_metaimage_or_nrrd_header_leaves_out_is_named(written, edited, word, tmp_path, capsys):
    path = written_by_itk(tmp_path / ("a.nrrd" if b"superior" in written else "a.mha"))
    assert written in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(written, edited))
    try:
        read_hu(path)
        assert word in capsys.readouterr().err
    except UserError as error:
        assert word in str(error)


def pictures(folder, count=6) -> np.ndarray:
    """Write slices as CTRG has them, numbered without zeros in front; returns them as they come back."""
    folder.mkdir(parents=True)
    hu = volume().transpose(2, 1, 0)[:count]
    out = []
    for k, plane in enumerate(((hu + 1000) / 1400 * 255).clip(0, 255).astype(np.uint8)):
        Image.fromarray(plane).resize((48, 48)).save(folder / f"{k + 1}.jpg", quality=90)
        out.append(np.asarray(Image.open(folder / f"{k + 1}.jpg")))
    return np.stack(out)


@pytest.mark.slow
def test_pictures_are_grey_levels_prepared_as_upstream(tmp_path):
    """The same slices as a folder of JPG and as NIfTI give what upstream's function gives for their stack."""
    from dia_pangu.src.Dataset.preprocess import to_test_grid, upstream_image

    stack = pictures(tmp_path / "7")
    save(tmp_path / "7.nii.gz", stack.transpose(2, 1, 0).copy(), np.eye(4))
    expected = to_test_grid(upstream_image(stack)).numpy()[0]
    for path in (tmp_path / "7", tmp_path / "7.nii.gz"):
        image, verdict = load_scan(path, Grid(preprocess="upstream"))
        assert verdict.values == "grey levels" and verdict.side == "unknown"
        assert np.abs(image.numpy() - expected).max() < 1e-6
        assert not any("inverted" in note for note in verdict.notes)
        with pytest.raises(UserError, match="8-bit grey levels"):
            load_volume(path, Grid())
    for k, plane in enumerate(volume().transpose(2, 1, 0)[10:16]):  # 16 bits, as DeepLesion has them
        Image.fromarray((plane + 32768).astype(np.uint16)).save(tmp_path / f"7/{k + 1}.png")
        (tmp_path / f"7/{k + 1}.jpg").unlink()
    assert read_scan(tmp_path / "7").verdict.offset == 32768
    with pytest.raises(UserError, match="no spacing is known"):
        read_hu(tmp_path / "7")
    save(tmp_path / "8.nii.gz", 255 - stack.transpose(2, 1, 0))
    assert any("likely inverted" in note for note in read_scan(tmp_path / "8.nii.gz").verdict.notes)


def test_pictures_that_are_no_plain_stack_are_named(tmp_path):
    """Numbers that jump, copies, two stacks in one folder, pages of one file, a lone picture."""
    for name, change in (("gap", None), ("copy", "2 (1).jpg"), ("two", "b-1.jpg")):
        pictures(tmp_path / name)
        if change is None:
            (tmp_path / name / "3.jpg").unlink()
        else:
            shutil.copy(tmp_path / name / "2.jpg", tmp_path / name / change)
        notes = read_scan(tmp_path / name).verdict.notes
        assert any("do not count on evenly" in note for note in notes), name
    (tmp_path / "coloured").mkdir()
    for k in range(4):
        colours = np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(colours).save(tmp_path / f"coloured/{k}.png")
    assert any("are coloured" in note for note in read_scan(tmp_path / "coloured").verdict.notes)
    pictures(tmp_path / "plain")
    assert not any("evenly" in note for note in read_scan(tmp_path / "plain").verdict.notes)
    pages = [Image.fromarray(plane) for plane in np.zeros((5, 8, 8), np.uint8)]
    (tmp_path / "tif").mkdir()
    pages[0].save(tmp_path / "tif/stack.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("tif", "holds 5 pages"),
        ("plain/2.jpg", "one picture is not a volume"),
        ("empty", "no DICOM slices and no pictures"),
    ):
        with pytest.raises(UserError, match=message):
            read_scan(tmp_path / path)


def test_jpg_folders_become_volumes(tmp_path, capsys):
    stacks = {
        name: pictures(tmp_path / "ctrg/images" / name, count) for name, count in (("3", 5), ("12", 11))
    }
    arguments = ["--images", str(tmp_path / "ctrg"), "--out", str(tmp_path / "volumes")]
    convert_ctrg.main(convert_ctrg.parse_args(arguments))
    for name, stack in stacks.items():
        scan = read_scan(tmp_path / f"volumes/{name}.nii.gz")
        assert scan.verdict.values == "grey levels" and scan.verdict.side == "unknown"
        assert np.array_equal(scan.voxels.transpose(2, 1, 0), stack)
    convert_ctrg.main(convert_ctrg.parse_args(arguments))
    assert "0 volumes written, 2 were there already" in capsys.readouterr().out
    pictures(tmp_path / "ctrg/more/3", 4)
    with pytest.raises(UserError, match="two folders are called 3"):
        convert_ctrg.main(convert_ctrg.parse_args(arguments))


def test_a_cache_is_read_anew_when_a_file_changes(tmp_path):
    folder, small = series(tmp_path / "s"), Grid((8, 8, 8))
    first = load_volume(folder, small, tmp_path / "cache")
    series(folder, change=spoil("RescaleIntercept", -900))
    assert not np.array_equal(load_volume(folder, small, tmp_path / "cache"), first)
    # A rewritten file of the same size with its old time.
    path = save(tmp_path / "a.nii", volume().astype(np.int16))
    first, old, clock = load_volume(path, small, tmp_path / "cache"), path.stat(), tmp_path / "clock"
    clock.touch()
    while clock.stat().st_ctime_ns <= old.st_ctime_ns:  # that of the file system may be coarse
        clock.touch()
    save(path, (volume() + 200).astype(np.int16))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert not np.array_equal(load_volume(path, small, tmp_path / "cache"), first)
    again, verdict = load_scan(path, small, tmp_path / "cache")
    assert verdict.chest == "yes" and verdict.values == "HU"


@pytest.mark.parametrize(
    "names", [("a.img", "a.hdr"), ("a.hdr", "a.img"), ("a.img.gz", "a.hdr.gz"), ("[1].mhd", "[1].raw")]
)
def test_the_stamp_of_a_scan_holds_the_file_beside_it(names, tmp_path):
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_bytes(b"1")
    before = stamp(files[0])
    for file in files:
        file.write_bytes(b"12")
        assert before != (before := stamp(files[0])), file


def test_the_name_of_a_scan_loses_its_suffix_alone(tmp_path):
    (tmp_path / "1.2.840.113619.2").mkdir()
    (tmp_path / "7.nii").symlink_to(tmp_path / "b52a")
    assert scan_name(tmp_path / "1.2.840.113619.2") == "1.2.840.113619.2"
    for name, expected in (("a.b.nii.gz", "a.b"), ("7.nii", "7"), ("x.mha", "x"), ("IM0001", "IM0001")):
        assert scan_name(tmp_path / name) == expected


@pytest.mark.slow
def test_damaged_headers_never_end_in_a_traceback(tmp_path):
    """Single bytes of the header and of the tags are overwritten; what still reads is fine, the rest is one
    line."""
    rng = random.Random(5)
    save(tmp_path / "a.nii", volume()[::4, ::4, ::4].astype(np.int16))
    whole = (tmp_path / "a.nii").read_bytes()
    series(tmp_path / "s", heights=range(4))
    part = (tmp_path / "s/001.dcm").read_bytes()
    for _ in range(150):
        spoiled = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            spoiled[rng.randrange(348)] = rng.randrange(256)
        (tmp_path / "b.nii").write_bytes(spoiled)
        spoiled = bytearray(part)
        for _ in range(rng.randint(1, 4)):
            spoiled[rng.randrange(1100)] = rng.randrange(256)
        (tmp_path / "s/001.dcm").write_bytes(spoiled)
        for path in (tmp_path / "b.nii", tmp_path / "s"):
            try:
                read_scan(path)
            except UserError as error:
                assert "\n" not in str(error)


# Many scans at once, and what is written of each


@pytest.fixture(scope="module")
def checkpoint(llm, tmp_path_factory):
    """A model of the sizes SMALL with random weights, which finds everything."""
    folder = tmp_path_factory.mktemp("dia_ckpt")
    torch.manual_seed(0)
    config = {**SMALL, "thresholds": [0.0] * 14}
    save_model(build_model(config, llm)[0].state_dict(), folder, config)
    return folder


def table(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_folder_of_scans_is_reported_in_one_go_and_resumed(checkpoint, llm, tmp_path):
    whole, place = volume().astype(np.int16), tmp_path / "scans"
    (place / "b").mkdir(parents=True)
    save(place / "a.nii.gz", whole)
    save(place / "b/a.nii.gz", whole[::-1].copy())
    save(place / "c.nii", ((whole + 1350) / 6).clip(0, 255).astype(np.uint8))  # grey levels
    series(place / "1.2.840.5", heights=range(0, 30, 2))
    base = ["--ckpt-path", checkpoint, "--lang-encoder-path", llm, "--max-new-tokens", 4, "--batch-size", 2]
    base += ["--volumes", place, "--out", tmp_path / "out", "--evidence", 1]
    done = call(report_script, *base, log=tmp_path / "log.txt")
    assert done.returncode == 0 and "Traceback" not in done.text, done.text
    rows = table(tmp_path / "out/dia-pangu.csv")
    names = ["1.2.840.5", "a", "b/a", "c"]
    assert sorted(row["ID"] for row in rows) == names and list(rows[0])[:2] == ["ID", "Question"]
    verdicts = {row["ID"]: row for row in table(tmp_path / "out/verdicts.csv")}
    assert sorted(verdicts) == names and not verdicts["a"]["error"]
    refused = {name for name, value in verdicts["c"].items() if value}
    assert "grey levels" in verdicts["c"]["error"] and refused == {"ID", "path", "error"}  # nothing is known
    assert len(table(tmp_path / "out/findings.csv")) == 3 * 14

    # Cut short in the middle of a line: the rest is done, what was done is not done again.
    journal = tmp_path / "out/reports.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:3], lines[3][:50]]))
    before = (tmp_path / "out/verdicts.csv").read_text()
    os.utime(place / "a.nii.gz")
    again = call(report_script, *base, log=tmp_path / "log.txt")
    assert again.returncode == 0 and "2 scans are done already" in again.text, again.text
    assert again.text.count("no report: ") == 1  # what could not be read is tried again
    assert len(list((tmp_path / "out/evidence").rglob("*.png"))) == 1  # asked for one of all, not one a start
    assert sorted(before.splitlines()) == sorted((tmp_path / "out/verdicts.csv").read_text().splitlines())
    other = call(report_script, *base, "--hide-places", log=tmp_path / "log.txt")
    assert other.returncode == 2 and "another hide_places" in other.text, other.text


def test_what_is_done_is_read_again_from_any_text_and_a_foreign_list_is_refused(tmp_path):
    for name in ("1", "2"):
        Journal(tmp_path, {"seed": 1}, True).add(name, {"row": {"Pred": "one\u2028two\x85"}})
    (tmp_path / "reports.jsonl").open("a").write('{"id": "3", "row"')
    assert set(Journal(tmp_path, {"seed": 1}, True).records) == {"1", "2"}
    for content in (b"[1]\n", b'{"seed": 1}\n{"row": 2}\n', b'{"seed": 2}\n', b"\xff\n"):
        (tmp_path / "reports.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="reports.jsonl: "):
            Journal(tmp_path, {"seed": 1}, True)


def test_scans_are_found_in_folders_and_in_a_csv(tmp_path, capsys):
    (tmp_path / "s/x").mkdir(parents=True)
    save(tmp_path / "s/x/1.nii.gz", volume())
    pictures(tmp_path / "s/7", count=3)
    series(tmp_path / "s/p/study", heights=range(3))
    nibabel.save(nibabel.AnalyzeImage(volume().astype(np.int16), RAS), tmp_path / "s/y.img")
    (tmp_path / "s/notes.txt").write_text("no scan")
    (tmp_path / "s/x/loop").symlink_to(tmp_path / "s")
    np.save(tmp_path / "s/x/2.npy", volume())
    assert [name for name, _ in find_scans(tmp_path / "s")] == ["7", "p/study", "x/1", "y"]
    assert (
        "2 files are no scans by their names and passed over: notes.txt, x/2.npy" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="2.npy: no scan by its name"):
        read_scan(tmp_path / "s/x/2.npy")
    assert [name for name, _ in find_scans(tmp_path / "s/7")] == ["7"]
    # One picture makes no stack, and a stack hides no scan below it.
    shutil.copy(tmp_path / "s/7/1.jpg", tmp_path / "s/overview.jpg")
    (tmp_path / "s/7/z").mkdir()
    save(tmp_path / "s/7/z/3.nii", volume())
    assert [name for name, _ in find_scans(tmp_path / "s")] == ["7", "7/z/3", "p/study", "x/1", "y"]
    (tmp_path / "list.csv").write_text("id,volume\nfirst,s/x/1.nii.gz\n,s/y.img\n")
    assert find_scans(tmp_path / "list.csv") == [
        ("first", tmp_path / "s/x/1.nii.gz"),
        ("y", tmp_path / "s/y.img"),
    ]
    for content, message in (
        ("a,b\n1,2\n", "column volume"),
        ("volume\n1.nii\na/1.nii\n", "two scans have the id"),
        ("id,volume\n7,\n", "line 2 names no scan"),
        ("id,volume\n../../7,s/y.img\n", "cannot be the name of a file"),
    ):
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(UserError, match=message):
            find_scans(tmp_path / "list.csv")


def test_no_side_is_named_where_it_is_unknown(checkpoint, llm, tmp_path):
    save(tmp_path / "known.nii", volume())
    save(tmp_path / "unknown.nii", volume(), qform_code=0, sform_code=0)
    sides = {}
    for name in ("known", "unknown"):
        named = {"volume": tmp_path / f"{name}.nii", "out": tmp_path / name, "ckpt_path": checkpoint}
        arguments = options({**named, "lang_encoder_path": llm, "max_new_tokens": 2, "evidence": 0})
        done = call(report_script, *arguments, log=tmp_path / "log.txt")
        assert done.returncode == 0, done.text
        sides[name] = {row["side"] for row in table(tmp_path / name / "findings.csv")}
        assert ("unknown" in table(tmp_path / name / "verdicts.csv")[0]["side"]) == (name == "unknown")
    assert sides["known"] & {"left", "right"} and sides["unknown"] == {""}


def test_upstreams_preparation_names_sides_of_the_axes_of_pictures_alone(tmp_path):
    """It keeps the axes as they are stored, so that a map's first column is the right of some files only."""
    hu = volume().astype(np.int16)
    save(tmp_path / "lps.nii", hu)
    save(tmp_path / "ras.nii", hu[::-1, ::-1].copy(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ RAS)
    save(tmp_path / "lpi.nii", hu[..., ::-1].copy(), RAS @ np.diag([1.0, 1.0, -1.0, 1.0]))
    for preprocess, sides in (("windows", ["known"] * 3), ("upstream", ["known", "unknown", "unknown"])):
        grid = Grid((16, 16, 16), preprocess=preprocess)
        verdicts = [load_scan(tmp_path / f"{name}.nii", grid)[1] for name in ("lps", "ras", "lpi")]
        assert [verdict.side for verdict in verdicts] == sides
    torch.manual_seed(0)
    layer = make_embedding(SMALL, 1, 8)
    tokens, volumes = torch.randn(2, 1, 16, 24), torch.zeros(2, 1, 3, 16, 16, 16)
    known, unknown = locate_all(layer, tokens, volumes, "upstream", verdicts[:2])[1]
    assert all(side and place for side, place in known.values()) and set(unknown.values()) == {("", "")}


def test_a_second_start_goes_on_within_its_limit(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.nii", volume())
    base = ["--ckpt-path", "x", "--lang-encoder-path", "y", "--volumes", str(tmp_path), "--limit", "2"]
    batches = report_script.read_batches(report_script.parse_args(base), Grid((16, 16, 16)), "en", {"a": {}})
    assert [name for name, _ in batches.dataset.scans] == ["b"]


def test_a_report_names_no_side_that_nobody_knows():
    for side, told in (("known", "Left effusion."), ("unknown", "[side unknown] effusion.")):
        verdict = Verdict("NIfTI", values="HU", side=side)
        batch = {"id": ["a"], "verdict": [verdict], "path": ["a.nii"], "report": [""]}
        lists = dict.fromkeys(("probability", "statuses"), [[0.0] * len(FINDINGS)])
        made = {"reports": ["Left effusion."], "questions": [""], "places": [{}], **lists}
        record = report_script.reported(batch, made, 0, [0.5] * len(FINDINGS), 1.0, hide=True)
        assert record["row"]["Pred"] == told


@pytest.mark.parametrize(
    "report, plain",
    [
        (
            "A nodule in the Right lung and the LLL; both lungs.",
            "A nodule in the ? lung and the ?; both lungs.",
        ),
        ("Lingular band; right middle lobe consolidation.", "? band; ? consolidation."),
        ("The middle lobe, Rt. base, left-sided effusion.", "The ?, ?. base, ?-sided effusion."),
        ("右肺结节，双肺清晰。", "？肺结节，双肺清晰。"),
        ("左侧胸腔积液，舌段实变，右肺中叶不张。", "？胸腔积液，？实变，？肺？不张。"),
        ("右側氣胸，結節約5mm左右，長約3厘米左右。", "？氣胸，結節約5mm左右，長約3厘米左右。"),
    ],
)
def test_words_that_name_a_side_are_replaced_where_sides_are_unknown(report, plain):
    told = without_sides(report)
    assert told.replace("[side unknown]", "?").replace("（侧别不明）", "？") == plain


def test_heat_maps_lie_over_the_scan_and_inside_the_chest(tmp_path):
    """Each map at the scan's own resolution, where the patch is, and not outside of the chest."""
    save(tmp_path / "a.nii", volume().astype(np.int16))
    grid = Grid((64, 64, 16), (384.0, 384.0, 320.0))
    maps = np.zeros((14, 8, 8, 4), np.float32)
    lesion = FINDINGS.index("lung lesion")
    maps[lesion, 3, 1, 2] = 0.8  # at the right, in the upper half
    maps[lesion, 0, 0, 0] = 0.8  # outside of the body
    backdrop = Backdrop(tmp_path / "a.nii", None, grid)
    draw_evidence(tmp_path / "e/a.png", backdrop, maps, [("lung lesion", "p 0.80")], "a", "A nodule.")
    image = nibabel.load(tmp_path / "e/a_lung_lesion.nii.gz")
    heat = np.asanyarray(image.dataobj)
    assert heat.max() == pytest.approx(1, abs=0.35) and image.shape == (40, 32, 30)
    where = np.argwhere(heat > 0.6)
    world = nibabel.affines.apply_affine(image.affine, where)
    assert (world[:, 0] > 0).all() and (world[:, 2] > 0).all()  # RAS: right and upwards count up
    hu, _, _ = read_ct(tmp_path / "a.nii")
    assert (heat.transpose(1, 0, 2)[(hu < -970)] == 0).mean() > 0.95
    assert (tmp_path / "e/a.png").stat().st_size > 5000


def giants(folder):
    """Yield files of a few hundred bytes whose headers declare gigabytes, and headers that name files
    elsewhere."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((2000, 2000, 500))
    plain = header.binaryblock[:344] + b"n+1\0" + bytes(104)
    (folder / "a.nii").write_bytes(plain)
    (folder / "b.nii.gz").write_bytes(gzip.compress(plain))
    size = "ObjectType = Image\nNDims = 3\nDimSize = 2000 2000 500\nElementType = MET_SHORT\n"
    (folder / "c.mha").write_bytes(f"{size}ElementDataFile = LOCAL\n".encode() + bytes(100))
    packed = zlib.compress(bytes(10**5))
    (folder / "d.mha").write_bytes(
        f"{size}CompressedData = True\nElementDataFile = LOCAL\n".encode() + packed
    )
    (folder / "voxels.raw").write_bytes(bytes(100))
    (folder / "e.mhd").write_text(f"{size}ElementDataFile = voxels.raw\n")
    nrrd = "NRRD0004\ntype: short\ndimension: 3\nsizes: 2000 2000 500\nendian: little\nencoding: "
    (folder / "f.nrrd").write_bytes(f"{nrrd}raw\n\n".encode() + bytes(100))
    (folder / "g.nrrd").write_bytes(f"{nrrd}gzip\n\n".encode() + gzip.compress(bytes(10**5)))
    for name in "abcdefg":
        yield next(folder.glob(f"{name}.*")), "stored"
    size = size.replace("2000 2000 500", "4 4 4")
    for i, name in enumerate(("/etc/passwd", "../other.raw", "LIST\n/etc/passwd\n/etc/hosts")):
        (folder / f"h{i}.mhd").write_text(f"{size}ElementDataFile = {name}\n")
        yield folder / f"h{i}.mhd", "lies outside"
    (folder / "i.nhdr").write_text(f"{nrrd}raw\ndata file: /etc/passwd\n")
    yield folder / "i.nhdr", "lies outside"


def test_a_header_of_gigabytes_or_of_foreign_files_is_one_line_before_anything_is_read(tmp_path):
    pytest.importorskip("SimpleITK")
    for path, word in giants(tmp_path):
        with pytest.raises(UserError, match=word) as caught:
            read_scan(path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_pictures_and_frames_that_fill_the_memory_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("common.files.free_memory", lambda: 10**8)
    (tmp_path / "slices").mkdir()
    for i in range(3):
        Image.fromarray(np.zeros((4000, 4000), np.uint8)).save(tmp_path / f"slices/{i}.png")
    with pytest.raises(UserError, match="GB of memory are free"):
        read_scan(tmp_path / "slices")
    folder = series(tmp_path / "wide", change=lambda data, n: setattr(data, "Rows", 60000))
    with pytest.raises(UserError, match="declares|memory"):
        read_scan(folder)


@pytest.mark.parametrize(
    "tags, of, message",
    [
        ({"ImageOrientationPatient": [0] * 6}, range(40), "no ImageOrientationPatient"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, range(40), "no ImageOrientationPatient"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, range(40), "colours"),
        ({"Modality": "MR"}, [7], "slices are missing"),
        ({"RescaleSlope": 0}, [7], "007.dcm: RescaleSlope is 0"),
        ({"RescaleIntercept": -500}, [7], None),
    ],
)
def test_tags_that_lie_are_refused_or_named(tags, of, message, tmp_path, recwarn):
    folder = series(
        tmp_path / "s", change=lambda data, n: [setattr(data, *tag) for tag in tags.items() if n in of]
    )
    if message is None:
        assert any("differ between the slices" in note for note in read_ct(folder)[2].notes)
    else:
        with pytest.raises(UserError, match=message):
            read_ct(folder)
    assert not [w for w in recwarn if w.category is RuntimeWarning]
