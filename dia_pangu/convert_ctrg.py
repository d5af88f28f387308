"""Make one NIfTI file of every folder of JPG slices, as Dia-LLaMA's README describes it for CTRG-Chest-548K.

    python dia_pangu/convert_ctrg.py --images CTRG-Chest-548K --out DATA/volumes

The slices are grey levels with 8 bits, in the order of the numbers in their names. The files say that
spacing, orientation and side are unknown, because the pictures do not hold them; their values are no HU, and
training and tests prepare them as upstream does. A folder of slices can also stand in DATA/volumes as it is.
"""

import gzip
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import nibabel
import numpy as np

from common.arguments import Parser
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import progress
from dia_pangu.src.Dataset.dicom import files_below
from dia_pangu.src.Dataset.scan import picture_files, read_pictures


def convert(folder: Path, path: Path):
    """Write the slices of a folder as (columns, rows, slices), in their own bits, without any orientation."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(read_pictures(folder)), np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    image.header["descrip"] = b"grey levels of pictures; no spacing, no orientation"
    atomic_write(path, gzip.compress(image.to_bytes(), 1))


def main(args):
    if not args.images.is_dir():
        raise UserError(f"--images {args.images}: no such folder")
    folders = sorted({file.parent for file in files_below(args.images)})
    folders = [folder for folder in folders if picture_files(folder)]
    if not folders:
        raise UserError(f"--images {args.images}: holds no folder of pictures")
    names = [folder.resolve().name for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"--images {args.images}: two folders are called {twice}; an id belongs to one volume"
        )
    made = kept = 0
    for name, folder in progress(list(zip(names, folders)), desc="volumes"):
        path = args.out / f"{name}.nii.gz"
        if path.is_file() and not args.overwrite:
            kept += 1
            continue
        convert(folder, path)
        made += 1
    print(f"{args.out}: {made} volumes written, {kept} were there already")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder with a folder of slices for each id")
    add("--out", type=Path, required=True, help="folder for <id>.nii.gz")
    add("--overwrite", action="store_true", help="write volumes anew that are there already")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
