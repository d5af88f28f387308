"""Convert the pickle files of upstream's data sets to npz, which every script here reads.

    python cwt_mae/convert_pickles.py --allow-pickle --input FOLDER --output FOLDER --fs 100

Known forms: {"data": (channels, L)} of pre-training, and {"data": (L,) or (channels, L), "label": [{"class":
int}, ...], "uid": ..., "sampling_rate": ...} of fine-tuning. Plain data and numpy arrays are read; a file
that names anything else, which could run code, is refused. Every other script refuses pickles.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser, number
from common.checkpoint import atomic_path
from common.errors import UserError, run
from common.files import read_plain_pickle
from common.run import progress


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--input", required=True, help="folder of .pkl and .pickle files, searched with all folders below it"
    )
    parser.add_argument("--output", required=True, help="folder for the npz files, which keep their names")
    parser.add_argument("--fs", type=float, help="sampling rate of files that do not state it, Hz")
    parser.add_argument(
        "--task-index", type=number(int, 0), default=0, help="place of the label in the list `label`"
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="confirm that --input holds pickles; only plain data and numpy arrays in them are read",
    )
    return parser.parse_args(argv)


def main(args):
    if not args.allow_pickle:
        raise UserError(
            "--input holds pickles, which other scripts refuse; add --allow-pickle to convert them"
        )
    paths = sorted(p for p in Path(args.input).rglob("*") if p.suffix in (".pkl", ".pickle"))
    if not paths:
        raise UserError(f"{args.input}: holds no .pkl or .pickle file")
    targets = [Path(args.output) / p.relative_to(args.input).with_suffix(".npz") for p in paths]
    if double := next((target for target, count in Counter(targets).items() if count > 1), None):
        raise UserError(f"{args.input}: two files would become {double}; rename one of them")
    for path, target in zip(progress(paths, desc="converting", unit="file"), targets):
        content = read_plain_pickle(path, "pickle", arrays=True)
        if not isinstance(content, dict) or "data" not in content:
            raise UserError(f"{path}: expected a dictionary with the key data")
        fields = {
            "sig": np.atleast_1d(np.asarray(content["data"], np.float32)),
            "fs": args.fs if content.get("sampling_rate") is None else content["sampling_rate"],
        }
        if fields["fs"] is None:
            raise UserError(f"{path}: has no sampling_rate; pass --fs")
        if "uid" in content:
            fields["subject"] = str(content["uid"])
        if content.get("label"):
            try:
                fields["label"] = int(content["label"][args.task_index]["class"])
            except (IndexError, KeyError, TypeError, ValueError):
                raise UserError(
                    f"{path}: label has no class at place {args.task_index}; choose another --task-index"
                ) from None
        with atomic_path(target) as temporary:
            np.savez_compressed(temporary, **fields)
    print(f"{len(paths)} files converted to {args.output}")


if __name__ == "__main__":
    run(main, parse_args())
