"""Several leads of real records: pre-training on all of them, then the respiration rate from the pulse wave
alone.

    python studies/cwt_mae/respiration.py --data ecg --out runs/cwt_mae/leads

--data holds raw_wfdb/s0010_re (12 leads and Frank's), raw_wfdb/a103l (ECG and pulse) and ppg/bidmc01.npz
(respiration, pulse, three ECG leads). The model reads four leads, of which each record misses some.

The reference is the spectral peak of the respiration channel in windows of 32 s. A ridge regression on frozen
features of the pulse wave is scored on blocks of time that it was not fitted to, beside random weights, the
mean of the other blocks, and a peak picker on the spectrum of the pulse wave, which needs no training. One
patient of eight minutes: this shows that the path works, not what it is worth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from scipy.signal import butter, sosfiltfilt
from sklearn.linear_model import RidgeCV
from sklearn.preprocessing import StandardScaler

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError
from cwt_mae.dataset import read_records
from cwt_mae.model_finetune import TF_MAE_Classifier
from studies.recipe import ROOT, recipe, size, stage
from studies.summary import write_result

LEADS = "II,V,AVR,PLETH"
FILES = ("raw_wfdb/s0010_re.hea", "raw_wfdb/a103l.hea", "ppg/bidmc01.npz")
WINDOW, STEP, BLOCKS = 32.0, 8.0, 6  # seconds, seconds, parts of the record


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds raw_wfdb and ppg")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; results go to the folder above it"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed of the training")
    return parser.parse_args(argv)


def peak_rate(x: np.ndarray, fs: float) -> float:
    """Breaths a minute: the highest peak of the spectrum between 4 and 40 a minute."""
    x = sosfiltfilt(butter(2, (0.06, 0.7), "bandpass", fs=fs, output="sos"), x)
    spectrum = np.abs(np.fft.rfft(x * np.hanning(len(x)), 16 * len(x)))
    minutes = 60 * np.fft.rfftfreq(16 * len(x), 1 / fs)
    band = (minutes >= 4) & (minutes <= 40)
    return float(minutes[band][spectrum[band].argmax()])


def features(model, pulse: np.ndarray, fs: float, starts) -> np.ndarray:
    """Mean and deviation over time of the frozen tokens of each window of the pulse wave, every other lead
    missing: (windows, 2 D)."""
    rows = []
    for start in starts:
        signal = np.full((len(LEADS.split(",")), int(WINDOW * fs)), np.nan)
        signal[LEADS.split(",").index("PLETH")] = pulse[start : start + int(WINDOW * fs)]
        tokens, _ = model.encode(signal, fs)
        there = tokens.flatten(0, 1)[tokens.flatten(0, 1).any(1)]
        rows.append(torch.cat([there.mean(0), there.std(0)]).numpy())
    return np.stack(rows)


def block_errors(x: np.ndarray, y: np.ndarray, blocks: np.ndarray, reach: int) -> np.ndarray:
    """Absolute errors (windows,) of a ridge regression fitted to the windows of other blocks that share no
    second with the block that is scored."""
    found = np.zeros(len(y))
    for block in np.unique(blocks):
        here = np.flatnonzero(blocks == block)
        away = np.ones(len(y), bool)
        away[max(0, here[0] - reach) : here[-1] + reach + 1] = False
        scale = StandardScaler().fit(x[away])
        fit = RidgeCV(np.logspace(0, 5, 11)).fit(scale.transform(x[away]), y[away])
        found[here] = np.abs(fit.predict(scale.transform(x[here])) - y[here])
    return found


def main(args):
    files = [args.data / name for name in FILES]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such record; this study needs {', '.join(FILES)}")
    base = args.out / "base"
    sizes = dict(config=ROOT / "cwt_mae" / "config_small.yaml", channel=LEADS, model_fs=50, low_hz=0.05)
    steps = dict(windows=size(640, smoke=32), batch_size=16, lr=2e-3, max_steps=size(300, smoke=4))
    common = dict(data=files, seed=args.seed, out=base, overwrite=True, threads=1, log_every=50)
    stage("cwt_mae/train.py", **common, **sizes, **steps)

    # Reference and windows
    record = read_records(files[2])[0]
    pulse, breath = (np.asarray(record.channels[name], float) for name in ("PLETH", "RESP"))
    fs = record.channels["PLETH"].fs
    starts = np.arange(0, len(pulse) - int(WINDOW * fs) + 1, int(STEP * fs))
    cut = lambda x: [x[s : s + int(WINDOW * fs)] for s in starts]
    truth = np.array([peak_rate(x, fs) for x in cut(breath)])
    picked = np.abs(np.array([peak_rate(x, fs) for x in cut(pulse)]) - truth)

    # Blocks of time; windows that overlap a block are not used for it
    blocks, reach = np.arange(len(starts)) * BLOCKS // len(starts), int(WINDOW / STEP)
    trained = TF_MAE_Classifier(str(base / "model.safetensors"), 2).eval()
    torch.manual_seed(args.seed)
    config = {k: v for k, v in trained.config.items() if k in trained.encoder_model.config}
    random = TF_MAE_Classifier(None, 2, **config).eval()
    errors = {
        "pre-trained": block_errors(features(trained, pulse, fs, starts), truth, blocks, reach),
        "random weights": block_errors(features(random, pulse, fs, starts), truth, blocks, reach),
        "mean of the other blocks": block_errors(np.zeros((len(truth), 1)), truth, blocks, reach),
        "spectral peak of the pulse wave": picked,
    }
    means = {name: float(error.mean()) for name, error in errors.items()}
    atomic_json(args.out / "metrics.json", means | {"windows": len(truth), "rate": float(truth.mean())})
    print("\n".join(f"{name:32} {value:.2f} breaths a minute off" for name, value in means.items()))
    ours = means.pop("pre-trained")
    write_result(
        args.out.parent,
        "bidmc01, respiration from the pulse wave",
        "mean absolute error in breaths a minute, lower is better",
        ours,
        means,
        note=f"Ridge regression on frozen features, {BLOCKS} blocks of time of one patient; {len(truth)} "
        f"windows of {WINDOW:g} s, {truth.mean():.1f} breaths a minute on average. Pre-trained on three "
        "records of several leads, each of which lacks some.",
    )


if __name__ == "__main__":
    recipe(main, parse_args())
