"""From the generator to real captures: the convolutional encoder learns ASK, FSK and PSK from built-in
signals alone and names the keying of real ones, which it never saw.

    DATA_ROOT=... python studies/em_mllm/transfer.py

Real signals, of DATA_ROOT/rf: those of Universal Radio Hacker's tests (urh_signals.npz), brought to eight
samples a symbol where the file states its symbol, and Mode S frames (adsb_modes1.npz: pulses, so ASK), each
cut into its strongest windows. Controls: the largest class, and logistic regression on three numbers of a
signal that was trained on the same generated signals: the spread of its envelope and of its frequency, and
how much of its square is one line.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.errors import UserError
from em_mllm.dataset import SignalDataset
from em_mllm.em_foundation.models import SiTMAEForClassification
from em_mllm.finetune import predict
from em_mllm.iq_io import windows
from em_mllm.scores import wilson
from em_mllm.signal_file import SignalFile
from studies.recipe import DATA, REAL, RUNS, recipe, size, stage
from studies.summary import write_result

FAMILIES = {"ASK": ("OOK", "4ASK"), "FSK": ("2FSK", "4FSK", "GFSK", "MSK"), "PSK": ("BPSK", "QPSK", "8PSK")}
POINTS, MOST, PER_SYMBOL = 1024, 20, 8
BASE, RUN = DATA / "em_mllm" / size("transfer", smoke="transfer_smoke"), RUNS / "em_mllm/transfer"


def write(path: Path, signals, families):
    """One .h5 of signals (T, 2) with the family of each."""
    with h5py.File(path, "w") as file:
        file["IQ_data"] = np.stack(signals).astype(np.float32)
        file["label"] = np.array([list(FAMILIES).index(name) for name in families], np.float32)[:, None]
        file.attrs["fs"], file.attrs["classes"] = 20e6, json.dumps(list(FAMILIES))


def generated(source: Path, path: Path):
    """The generator's signals of the three families."""
    file = SignalFile(source)
    family = {name: key for key, names in FAMILIES.items() for name in names}
    names = [family.get(file.classes[int(label)]) for label in file.column("label")]
    rows = [row for row, name in enumerate(names) if name]
    write(path, [file.read(row) for row in rows], [names[row] for row in rows])


def decimated(iq: np.ndarray, factor: int) -> np.ndarray:
    """Means over `factor` samples."""
    return iq[: len(iq) // factor * factor].reshape(-1, factor, 2).mean(1) if factor > 1 else iq


def real(path: Path) -> list[str]:
    """Write the windows of all real signals; returns the recording of each."""
    signals, families, sources = [], [], []
    with np.load(REAL / "rf/urh_signals.npz") as urh:
        for name in (key.removesuffix("_mod") for key in urh.files if key.endswith("_mod")):
            iq = urh[name].astype(np.float32)
            iq = decimated(iq, max(1, int(urh[f"{name}_sps"]) // PER_SYMBOL))
            cut = [window for _, window in windows(iq, min(POINTS, len(iq)), MOST)]
            signals += [np.resize(window, (POINTS, 2)) for window in cut]  # a short one is repeated
            families += [str(urh[f"{name}_mod"])] * len(cut)
            sources += [name] * len(cut)
    with np.load(REAL / "rf/adsb_modes1.npz") as adsb:
        iq = adsb["iq"].astype(np.float32) - 127.5
        starts = [s for s in adsb["frame_start"] if s + POINTS <= len(iq)][:MOST]
    signals += [iq[s : s + POINTS] for s in starts]
    write(path, signals, families + ["ASK"] * len(starts))
    return sources + ["Mode S"] * len(starts)


def features(data: SignalDataset) -> np.ndarray:
    """Spread of the envelope and of the frequency, and the strongest line of the square, of each signal."""
    rows = []
    for item in data:
        z = item["iq"] @ [1, 1j]
        strong = np.abs(z) > 0.3 * np.abs(z).max()
        turns = np.angle(z[1:] * z[:-1].conj())[strong[1:]]
        line = np.abs(np.fft.fft(z**2)).max() / (np.abs(z) ** 2).sum()
        rows.append([np.abs(z).std() / np.abs(z).mean(), turns.std() if len(turns) else 0.0, line])
    return np.array(rows)


def main():
    if not REAL or not (REAL / "rf/urh_signals.npz").is_file():
        raise UserError("DATA_ROOT: holds no rf/urh_signals.npz; set it to the folder of the real data")
    counts = size(dict(train=150, val=10, test=1), smoke=dict(train=4, val=1, test=1))
    stage("em_mllm/make_data.py", out=BASE / "data", snr=(0, 30), overwrite=True, **counts)
    for part in ("train", "val"):
        generated(BASE / "data" / part / "modulation.h5", BASE / f"{part}.h5")
    sources = np.array(real(BASE / "real.h5"))
    stage(
        "em_mllm/finetune.py",
        train=BASE / "train.h5",
        test=BASE / "val.h5",
        encoder="cnn",
        phase=True,
        roll=True,
        conjugate=True,
        lr=3e-3,
        batch_size=32,
        max_steps=size(120, smoke=2),
        out=RUN,
        overwrite=True,
    )

    # the real windows, once
    train, val, test = (SignalDataset([BASE / f"{name}.h5"], ("label",)) for name in ("train", "val", "real"))
    model = SiTMAEForClassification.from_pretrained(RUN / "model").eval()
    truth = test.columns["label"].astype(int)
    hit = predict(model, test, {})[0] == truth
    rule = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    rule.fit(features(train), train.columns["label"])
    rule_hit = rule.predict(features(test)) == truth
    held = {
        "CNN": float((predict(model, val, {})[0] == val.columns["label"]).mean()),
        "rule": float(rule.score(features(val), val.columns["label"])),
    }
    print(f"generated signals of other seeds: {held}")
    for name in dict.fromkeys(sources):
        mine = sources == name
        family = list(FAMILIES)[truth[mine][0]]
        print(
            f"{name} ({family}, {mine.sum()}): CNN {hit[mine].mean():.3f}, rule {rule_hit[mine].mean():.3f}"
        )
    write_result(
        RUNS / "em_mllm",
        "keying of real captures, trained on generated signals alone",
        "accuracy",
        float(hit.mean()),
        {
            "three numbers, logistic regression": float(rule_hit.mean()),
            "largest class": float(np.bincount(truth).max() / len(truth)),
        },
        wilson(int(hit.sum()), len(hit)),
        note=f"{len(truth)} windows of {len(set(sources))} recordings; on generated ones {held['CNN']:.3f}",
    )


if __name__ == "__main__":
    recipe(main)
