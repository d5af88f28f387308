"""Write a small built-in data set: ECG of several subjects in five rhythms, and PPG, in the format of real
records.

    python cwt_mae/make_data.py --out data/cwt_mae/builtin

    labelled/s000.npz ...   as the real MIT-BIH npz files: sig (int16), fs, gain, lead, subject, ann_sample,
                            ann_symbol, ann_aux, ann_aami
    labelled/split.json     {"train": [...], "test": [...]}; no subject is in both
    ppg/p000.csv, p001.h5   unlabelled pulse waves, for pre-training

Every subject has an own heart: wave shapes, rate, noise and sampling rate. Rhythms: N sinus, AFIB (no P wave,
irregular), B (bigeminy: every second beat ventricular), SVTA (fast, narrow, no P wave), VT (fast, wide). The
signals are drawn, not recorded: they train nothing that should meet a patient.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np

from common.arguments import Parser, number
from common.checkpoint import atomic_dir, atomic_json
from common.errors import run
from common.run import progress

RHYTHMS = ("N", "AFIB", "B", "SVTA", "VT")
AAMI_NUMBER = {"N": 0, "A": 1, "V": 2}
# (time from the R peak in s, width in s, height in mV) of P, Q, R, S and T; a ventricular beat is wide and
# its T opposite
P, Q, R = (-0.17, 0.022, 0.12), (-0.028, 0.010, -0.12), (0.0, 0.011, 1.0)
S, T = (0.030, 0.011, -0.22), (0.25, 0.050, 0.28)
NORMAL = np.array([P, Q, R, S, T])
VENTRICULAR = np.array([(-0.01, 0.045, 1.2), (0.09, 0.045, -0.5), (0.28, 0.060, -0.35)])


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder to write; it is replaced as a whole")
    parser.add_argument(
        "--subjects", type=number(int, 6), default=30, help="subjects; a third of them is for the test"
    )
    parser.add_argument(
        "--seconds", type=number(float, 60), default=300.0, help="length of each labelled record, seconds"
    )
    parser.add_argument("--ppg", type=number(int, 0), default=4, help="unlabelled PPG records")
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="random seed of everything that is drawn"
    )
    return parser.parse_args(argv)


def beat_times(rhythm: str, seconds: float, rate: float, rng) -> list[tuple[float, str]]:
    """(time of the R peak in s, beat code) over one stretch of a rhythm; rate: the subject's sinus rate in
    beats/s."""
    times, now, odd = [], rng.uniform(0.2, 0.6), False
    while now < seconds - 0.5:
        odd = not odd
        if rhythm == "N":
            breathing = 0.04 * np.sin(2 * np.pi * 0.25 * now)
            code, gap = "N", (1 + breathing + 0.015 * rng.standard_normal()) / rate
            if rng.random() < 0.02:  # a premature atrial beat now and then
                code, gap = "A", 0.95 / rate
                now -= 0.3 / rate
        elif rhythm == "AFIB":
            code, gap = "N", rng.gamma(14, 1 / 14) / (1.25 * rate)
        elif rhythm == "B":
            code = "N" if odd else "V"
            gap = (0.62 if odd else 1.3) / rate * (1 + 0.02 * rng.standard_normal())
        elif rhythm == "SVTA":
            code, gap = "A", (1 + 0.01 * rng.standard_normal()) / rng.uniform(1.9, 2.6)
        else:
            code, gap = "V", (1 + 0.03 * rng.standard_normal()) / rng.uniform(1.9, 2.6)
        if not times or now > times[-1][0] + 0.2:
            times.append((now, code))
        now += max(0.25, gap)
    return times


def draw_ecg(rng, seconds: float, fs: float):
    """One subject's ECG: signal in mV (L,) and annotations (sample, symbol, rhythm text)."""
    rate, total = rng.uniform(0.9, 1.8), int(seconds * fs)
    normal = NORMAL * (1 + np.array([0.1, 0.2, 0.25]) * rng.standard_normal(NORMAL.shape))
    normal[2, 0] = 0.0
    wide = VENTRICULAR * (1 + np.array([0.2, 0.25, 0.3]) * rng.standard_normal(VENTRICULAR.shape))
    if rng.random() < 0.4:
        wide[:, 2] *= -1
    signal, notes, start = np.zeros(total), [], 0.0
    clock = np.arange(total) / fs
    while start < seconds:
        rhythm = RHYTHMS[rng.choice(len(RHYTHMS), p=(0.36, 0.2, 0.16, 0.14, 0.14))]
        length = rng.uniform(20, 45)
        if seconds - start - length < 12:  # no rest that is too short for a rhythm
            length = seconds - start
        notes.append((round(start * fs), "+", f"({rhythm}"))
        for time, code in beat_times(rhythm, length, rate, rng):
            waves = wide if code == "V" else normal
            if code == "A" or rhythm == "AFIB":  # the P wave is hidden or missing
                waves = normal[1:]
            stretch = rng.normal(1, 0.03)
            for offset, width, height in waves:
                centre = start + time + offset
                first, last = (int((centre + 5 * side * width) * fs) for side in (-1, 1))
                near = slice(max(0, first), max(0, last + 1))
                signal[near] += stretch * height * np.exp(-0.5 * ((clock[near] - centre) / width) ** 2)
            sample = round((start + time) * fs)
            if sample < total:
                notes.append((sample, code, ""))
        if rhythm == "AFIB":
            here = (clock >= start) & (clock < start + length)
            signal[here] += rng.uniform(0.03, 0.07) * np.sin(
                2 * np.pi * (rng.uniform(5, 7) * clock[here] + 0.3 * np.sin(2 * np.pi * 0.7 * clock[here]))
            )
        start += length
    drift = sum(
        rng.uniform(0.05, 0.4) * np.sin(2 * np.pi * (f * clock + rng.random())) for f in (0.07, 0.21, 0.33)
    )
    # The same noise per band at every rate
    noise = rng.standard_normal(total) * rng.uniform(0.05, 0.3) * np.sqrt(fs / 180)
    hum = rng.uniform(0, 0.05) * np.sin(2 * np.pi * 50 * clock)
    return signal * rng.uniform(0.7, 1.4) + drift + noise + hum, notes


def draw_ppg(rng, seconds: float, fs: float) -> np.ndarray:
    """A pulse wave (L,), arbitrary units: a systolic and a dicrotic wave per beat, breathing, noise."""
    clock = np.arange(int(seconds * fs)) / fs
    signal = np.zeros(len(clock))
    rate = rng.uniform(0.9, 1.6)
    for time, _ in beat_times("N", seconds, rate, rng):
        signal += np.exp(-0.5 * ((clock - time) / 0.09) ** 2) + rng.uniform(0.3, 0.5) * np.exp(
            -0.5 * ((clock - time - 0.32) / 0.12) ** 2
        )
    return 1000 * (
        2 + signal + 0.2 * np.sin(2 * np.pi * 0.25 * clock) + 0.03 * rng.standard_normal(len(clock))
    )


def main(args):
    with atomic_dir(args.out) as folder:
        (folder / "labelled").mkdir()
        (folder / "ppg").mkdir()
        names = [f"s{i:03d}" for i in range(args.subjects)]
        for i, name in enumerate(progress(names, desc="drawing ECG", unit="record")):
            rng = np.random.default_rng((args.seed, i))
            fs = int(rng.choice([125, 180, 250, 360]))
            signal, notes = draw_ecg(rng, args.seconds, fs)
            sample, symbol, aux = zip(*sorted(notes))
            np.savez_compressed(
                folder / "labelled" / f"{name}.npz",
                sig=np.round(signal * 200).clip(-32768, 32767).astype(np.int16),
                fs=np.int32(fs),
                gain=np.int32(200),
                lead="MLII",
                subject=name,
                ann_sample=np.array(sample, np.int32),
                ann_symbol=np.array(symbol),
                ann_aux=np.array(aux),
                ann_aami=np.array([AAMI_NUMBER.get(s, -1) for s in symbol], np.int8),
            )
        test = names[2::3]
        atomic_json(
            folder / "labelled" / "split.json", {"train": [n for n in names if n not in test], "test": test}
        )
        for i in range(args.ppg):
            rng = np.random.default_rng((args.seed, 10_000 + i))
            fs, path = 100, folder / "ppg" / f"p{i:03d}"
            signal = draw_ppg(rng, args.seconds / 2, fs)
            if i % 2:
                with h5py.File(path.with_suffix(".h5"), "w") as file:
                    file.create_dataset("PPG", data=signal.astype(np.float32)).attrs["fs"] = fs
            else:
                lines = [f"{k / fs:.4f},{v:.2f}" for k, v in enumerate(signal)]
                path.with_suffix(".csv").write_text("\n".join(["time_s,PPG", *lines]) + "\n")
    print(
        f"{args.out}: {args.subjects} ECG records of {args.seconds:g} s ({len(test)} for the test), "
        f"{args.ppg} PPG records"
    )


if __name__ == "__main__":
    run(main, parse_args())
