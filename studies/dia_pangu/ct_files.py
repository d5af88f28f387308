"""A made-up chest as HU in DICOM's axes, and the files that hold it: NIfTI, DICOM series, MetaImage,
pictures."""

from pathlib import Path

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

# Voxels in DICOM's axes: columns run to the left, rows to the back, slices to the head.
COUNT, STEP_MM = np.array((40, 32, 30)), np.array((8.0, 8.0, 9.0))
LPS = np.diag([8.0, 8.0, 9.0, 1.0])
LPS[:3, 3] = -STEP_MM * (COUNT - 1) / 2
RAS = np.diag([-1.0, -1.0, 1.0, 1.0]) @ LPS


def chest_hu(points: np.ndarray) -> np.ndarray:
    """HU at points (..., 3) in mm, left, back and head counting up: body, lungs, heart, spine, a nodule at
    the upper right."""
    x, y, z = np.moveaxis(points, -1, 0)
    hu = np.full(x.shape, -1000.0)
    hu[(x / 150) ** 2 + (y / 105) ** 2 < 1] = 40
    for side in (-70, 70):
        hu[((x - side) / 58) ** 2 + (y / 80) ** 2 + (z / 125) ** 2 < 1] = -850
    hu[((x - 25) / 50) ** 2 + ((y + 30) / 42) ** 2 + ((z + 45) / 50) ** 2 < 1] = 50
    hu[(x / 20) ** 2 + ((y - 75) / 22) ** 2 < 1] = 400
    hu[((x + 75) / 22) ** 2 + ((y - 10) / 22) ** 2 + ((z - 60) / 22) ** 2 < 1] = 60
    return hu


def grid(affine=LPS, count=COUNT) -> np.ndarray:
    """Points (X, Y, Z, 3) of the voxels of an affine in DICOM's axes."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in count), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def volume(affine=LPS, count=COUNT, noise: float = 8.0) -> np.ndarray:
    """HU (X, Y, Z) float32 of the chest on a grid."""
    hu = chest_hu(grid(affine, count))
    return (hu + np.random.default_rng(0).normal(0, noise, hu.shape)).astype(np.float32)


def save(path, voxels, affine=RAS, **header):
    """Write a NIfTI file; header: fields that are set afterwards, also against nibabel's will."""
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units(header.pop("unit", "mm"))
    for name, value in header.items():
        image.header[name] = value
    if header:
        image = nibabel.Nifti1Image(voxels, None, image.header)
    nibabel.save(image, path)
    return path


def slice_of(hu: np.ndarray, position, k: int = 0, **tags) -> Dataset:
    """A CT slice as a data set; tags: fields to set, None leaves one out, "" empties it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    data = Dataset()
    data.file_meta = meta
    stored = np.rint(hu + 1024).clip(0, 65535).astype(np.uint16)
    fields = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.1",
        "ImagePositionPatient": [round(float(v), 4) for v in position],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [8.0, 8.0],
        "SliceThickness": 9.0,
        "InstanceNumber": k + 1,
        "Rows": stored.shape[0],
        "Columns": stored.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": 0,
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": stored.tobytes(),
        **tags,
    }
    for name, value in fields.items():
        if value is not None:
            setattr(data, name, None if isinstance(value, str) and value == "" else value)
    return data


def series(folder, heights=None, cosines=(1, 0, 0, 0, 1, 0), move=(0, 0, 9.0), change=None, **tags) -> Path:
    """Write a series: slices at multiples `heights` of the displacement `move` around the centre.

    change: function (data set, number) that edits a slice before it is written, or returns False to leave
    it out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    across, down, move = np.array(cosines[:3]) * 8.0, np.array(cosines[3:]) * 8.0, np.array(move, float)
    first = -across * (COUNT[0] - 1) / 2 - down * (COUNT[1] - 1) / 2 - move * (COUNT[2] - 1) / 2
    rows, columns = np.meshgrid(np.arange(COUNT[1]), np.arange(COUNT[0]), indexing="ij")
    for n, k in enumerate(range(COUNT[2]) if heights is None else heights):
        at = first + k * move
        hu = chest_hu(at + columns[..., None] * across + rows[..., None] * down)
        cos = [round(float(v), 6) for v in cosines]
        data = slice_of(hu, at, n, **{"ImageOrientationPatient": cos, **tags})
        if change is None or change(data, n) is not False:
            data.save_as(folder / f"{n:03d}.dcm", enforce_file_format=True)
    return folder


def spoil(tag, value, only=None):
    """Return an editor of slices for `series` that sets a tag, or with None deletes it, in all slices or in
    number `only`."""

    def change(data, n):
        if only is None or n == only:
            if value is None and tag in data:
                delattr(data, tag)
            else:
                setattr(data, tag, value)

    return change


def screenshot(data, n=0):
    """Make of a slice a picture with 8 bits, whose rescale tags say that it holds HU."""
    hu = np.frombuffer(data.PixelData, np.uint16).astype(float) - 1024
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.RescaleIntercept = 7, 0
    data.PixelData = ((hu + 1350) / 1500 * 255).clip(0, 255).astype(np.uint8).tobytes()


def enhanced(path) -> Path:
    """Write the chest as one enhanced multi-frame file."""
    hu = volume(noise=0).transpose(2, 1, 0)
    data = slice_of(hu[0], (0, 0, 0), SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(hu))
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(data, name)
    del data.RescaleIntercept, data.SliceThickness
    data.PixelData = np.rint(hu + 1024).astype(np.uint16).tobytes()

    def group(name, **fields):
        inner = Dataset()
        for key, value in fields.items():
            setattr(inner, key, value)
        outer = Dataset()
        setattr(outer, name, [inner])
        return outer

    shared = group("PixelMeasuresSequence", PixelSpacing=[8.0, 8.0], SliceThickness=9.0)
    shared.update(group("PlaneOrientationSequence", ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    shared.update(group("PixelValueTransformationSequence", RescaleSlope=1, RescaleIntercept=-1024))
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = [
        group("PlanePositionSequence", ImagePositionPatient=list(map(float, LPS[:3, 3] + [0, 0, 9.0 * k])))
        for k in range(len(hu))
    ]
    data.save_as(path, enforce_file_format=True)
    return path
