r"""Real CT files: do organs lie on their side after reading, and what does the model's input look like?

    python studies/dia_pangu/real_volumes.py --volumes scan.nii.gz series/ \
        --segmentations volumes --out runs/dia_pangu
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser
from common.errors import run
from common.figures import new_figure, save_figure
from common.files import read_json
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, read_hu, read_labels_volume
from studies.summary import write_result


def draw_windows(path, out: Path) -> tuple[Path, dict]:
    """Draw six slices of a volume's three windows; return the picture and what the file holds."""
    name = path.name.split(".")[0]
    hu, spacing_mm = read_hu(path)
    prepared = load_volume(path, Grid())
    filled = np.flatnonzero(prepared[0].amax((0, 1)).numpy() > 0.5)
    figure, axes = new_figure(3, 6, 1.6, 1.6)
    for line, channel, window in zip(axes, prepared.numpy(), ("lung", "soft tissue", "bone")):
        for axis, k in zip(line, np.linspace(filled[0], filled[-1], 6).astype(int)):
            axis.imshow(channel[:, :, k], cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            axis.set_title(f"{window}, slice {k + 1}", fontsize=7)
    steps = " x ".join(f"{step:.2f}" for step in spacing_mm)
    figure.suptitle(
        f"{name}: {hu.shape} voxels of {steps} mm, HU {hu.min():.0f} to {hu.max():.0f}", fontsize=9
    )
    facts = {
        "shape": list(hu.shape),
        "spacing_mm": list(spacing_mm),
        "hu": [float(hu.min()), float(hu.max())],
        "slices": len(filled),
    }
    return save_figure(figure, out / "figures" / f"real_{name}.png"), facts


def landmarks(folder) -> dict:
    """Return {"file: organ": whether its centre lies where it should after reading} from the segmentations
    in a folder.

    A segmentation is <name>_seg.nii.gz with <name>_seg_labels.json, {number: organ}. Judged are organs
    named left or right, the liver (right), the spleen (left), and the vertebrae (at the back).
    """
    out = {}
    for path in sorted(Path(folder).glob("*_seg.nii.gz")):
        names = read_json(path.with_name(path.name.replace("_seg.nii.gz", "_seg_labels.json")), dict)
        labels, _ = read_labels_volume(path)  # (H front to back, W right to left, D)
        for number, name in names.items():
            where = np.argwhere(labels == int(number))
            if not len(where):
                continue
            front_to_back, right_to_left, _ = where.mean(0) / labels.shape
            if name.endswith(("_left", "_right")) or name in ("liver", "spleen"):
                out[f"{path.name}: {name}"] = bool(
                    (right_to_left < 0.5) == (name.endswith("_right") or name == "liver")
                )
            elif name.startswith("vertebrae"):
                out[f"{path.name}: {name}"] = bool(front_to_back > 0.5)
    return out


def main(args):
    figures, facts = [], {}
    for path in args.volumes:
        picture, facts[path.name] = draw_windows(path, args.out)
        figures.append((picture, f"{path.name}: three windows of the model's input"))
        print(path.name, facts[path.name])
    right = landmarks(args.segmentations)
    if not right:
        print(f"{args.segmentations}: no *_seg.nii.gz with organs named left or right; sides are not checked")
        return
    write_result(
        args.out,
        "organs on their side after reading",
        "fraction of the named organs",
        sum(right.values()) / len(right),
        {"chance": 0.5},
        None,
        figures,
        "Organs named left or right, liver and spleen, and the vertebrae at the back. All files also pass "
        "the model by --volume; it has seen phantoms alone, so that its reports of them mean nothing",
        {"files": facts, "organs": right},
    )


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--volumes", type=Path, nargs="+", required=True, help="NIfTI files and DICOM folders")
    add("--segmentations", required=True, help="folder with <name>_seg.nii.gz and their labels")
    add("--out", type=Path, required=True, help="folder for figures/ and results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
