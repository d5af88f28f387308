"""Draw what a pre-trained model hides and reconstructs of a signal, and the wavelet image that it sees.

    python cwt_mae/visualize.py --model runs/cwt_mae/base/model.safetensors --data record.npz --out p.png

Writes the picture and, beside it, a csv file with the signal, its reconstruction and the fraction of each
sample's patches that was hidden. Upstream files: visualize_recon.py, visualize_recon_data.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch

from common.arguments import Parser, number
from common.checkpoint import atomic_csv
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from cwt_mae.dataset import PhysioSignalDataset, Preprocess, build_store
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import load_model


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--model", required=True, help="model.safetensors of a pre-training run, or an upstream checkpoint"
    )
    parser.add_argument("--data", nargs="+", required=True, help="signal files, or folders of them")
    parser.add_argument("--out", required=True, help="picture to write (.png)")
    parser.add_argument(
        "--window", type=number(int, 0), default=0, help="which window, counted side by side from 0"
    )
    parser.add_argument("--input-fs", type=float, help="sampling rate of files that do not state it, Hz")
    parser.add_argument("--cache", help="folder for the prepared signals; data/cwt_mae/cache without it")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed of the mask")
    return parser.parse_args(argv)


@torch.no_grad()
def draw_reconstruction(model, batch, path, title: str = "") -> np.ndarray:
    """Draw the first window of `batch` (as PhysioSignalDataset gives it): signal and image, masked and
    reconstructed.

    Hidden columns are shaded in the signal, hidden patches grey in the image; where a patch was visible the
    original is shown. Returns (L, 3): the signal, its reconstruction, and the fraction of each sample's
    patches that was hidden.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    out = model(
        batch["x"][:1].to(device), batch["noise"][:1].to(device), batch["real"][:1].to(device), details=True
    )
    model.train(training)
    (height, width), rows, columns = model.grid_size, model.patch_size_freq, model.patch_size_time
    hidden = out["mask"][0].reshape(height, width).cpu().numpy()
    pixels = np.kron(hidden, np.ones((rows, columns))) > 0
    image = out["imgs"][0, 0].float().cpu().numpy()
    predicted = model.unpatchify(out["pred_spec"].float())[0, 0].cpu().numpy()
    signal, guess = out["signal"][0].float().cpu().numpy(), out["pred_time"][0].float().cpu().numpy()
    fraction = np.repeat(hidden.mean(0), columns)  # of the patches over each sample
    fs = (model.config["preprocess"] or {}).get("fs")
    time = np.arange(len(signal)) / (fs or 1)
    figure, axes = new_figure(4, 1, width=8.0, height=1.9, sharex=True)
    axes[0].plot(time, signal, lw=1.2, label="signal")
    axes[0].plot(time, guess, lw=1.2, label="reconstruction")
    grey = dict(color="0.5", alpha=0.2, lw=0, step="mid", label="hidden at all scales")
    axes[0].fill_between(time, *axes[0].get_ylim(), where=fraction > 0.99, **grey)
    axes[0].legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, fontsize=8)
    axes[0].set_title(title, loc="right", fontsize=9)
    low, high = np.percentile(image, [1, 99])
    form = dict(aspect="auto", origin="lower", interpolation="nearest", vmin=low, vmax=high)
    for axis, picture, label in (
        (axes[1], np.where(pixels, np.nan, image), "visible"),
        (axes[2], np.where(pixels, predicted, image), "reconstructed"),
        (axes[3], image, "original"),
    ):
        axis.set_facecolor("0.75")
        axis.imshow(picture, extent=(0, time[-1], 0, len(image)), **form)
        axis.set_ylabel(f"{label}\nscale row")
        axis.grid(False)
    axes[3].set_xlabel("seconds" if fs else "samples")
    save_figure(figure, path)
    return np.stack([signal, guess, fraction], 1)


def main(args):
    # The model, and one window of the data, prepared as the model's training data were
    model = load_model(args.model)
    if not isinstance(model, CWT_MAE_RoPE):
        raise UserError(
            f"{args.model}: is a classifier, which reconstructs nothing; give the pre-trained model"
        )
    prepare = Preprocess(**(model.config["preprocess"] or {}))
    store = build_store(args.data, prepare, args.cache, args.input_fs)
    dataset = PhysioSignalDataset(store, model.signal_len, "test", args.seed, model.num_patches)
    if not 0 <= args.window < len(dataset):
        raise UserError(f"--window {args.window}: the data hold windows 0 to {len(dataset) - 1}")
    item = dataset[args.window]
    batch = {name: value[None] if torch.is_tensor(value) else value for name, value in item.items()}
    table = draw_reconstruction(model, batch, args.out, item["name"])
    # The numbers of the picture, for whoever wants to draw it otherwise
    rows = [
        {"sample": i, "signal": f"{a:.5f}", "reconstruction": f"{b:.5f}", "hidden_fraction": f"{c:.3f}"}
        for i, (a, b, c) in enumerate(table)
    ]
    atomic_csv(Path(args.out).with_suffix(".csv"), rows)
    print(
        f"{args.out}: {item['name']}, mean squared error of the signal "
        f"{np.mean((table[:, 0] - table[:, 1]) ** 2):.3f} (predicting its mean: 1)"
    )


if __name__ == "__main__":
    run(main, parse_args())
