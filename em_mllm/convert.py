"""Public data sets to x.h5 + x.json.

    python em_mllm/convert.py radioml2016 RML2016.10a_dict.pkl --out data/radioml2016
    python em_mllm/convert.py radioml2018 GOLD_XYZ_OSC.0001_1024.hdf5 --out data/radioml2018 --per-cell 200
    python em_mllm/convert.py rtl433 rtl433_train.npz rtl433_test.npz --out data/rtl433
    python em_mllm/convert.py merlin Modulation.jsonl Anti_CJ.jsonl --out data/em_bench
    python em_mllm/convert.py torchsig dataset/data.h5 --out data/torchsig

radioml*, torchsig: train/ val/ test/ at 60 : 20 : 20 of every (class, SNR) cell, or class, by --seed. rtl433:
train/ of augmented copies, val/ of other copies of the same captures, test/<condition>/ of the untouched test
captures, clean and with noise from 20 to -10 dB below the burst's power, with and without a frequency shift.

merlin: lines {id, conversations, iq_data} of EM-134K and EM-Bench, each file to a .h5 for each length of
its signals and one .json. The signals of a question stand before its text here, wherever <iq_data> stood.

RadioML is known to be irregular: SNR labels of 2016.10a are not the measured SNR of each signal, and the
class list published with 2018.01a is in the wrong order; the corrected order is used here.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_dir
from common.errors import UserError, run
from common.files import check, hdf5_item, open_npz, read_plain_pickle, reading
from common.run import progress
from em_mllm.make_data import NOUN, write_questions
from em_mllm.prepare import view
from em_mllm.signal_file import DEFAULT_FS, HERTZ, centred, decoded, plain_text
from em_mllm.torchsig import read_torchsig

RADIOML2018 = (
    "OOK 4ASK 8ASK BPSK QPSK 8PSK 16PSK 32PSK 16APSK 32APSK 64APSK 128APSK 16QAM 32QAM 64QAM 128QAM 256QAM "
    "AM-SSB-WC AM-SSB-SC AM-DSB-WC AM-DSB-SC FM GMSK OQPSK"
).split()
DEVICE = {
    "device": ("设备型号", "device"),
    "coding": ("编码方式", "coding"),
    "keying": ("调制方式", "modulation"),
}
FACTOR = 8  # samples of an rtl_433 capture that make one point
NOISE_DB = (20, 10, 5, 0, -5, -10)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "source",
        choices=("radioml2016", "radioml2018", "rtl433", "merlin", "torchsig"),
        help="where the files come from",
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="+",
        help="the file of the data set; rtl433: training and test file, or the latter alone",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must be empty or absent")
    parser.add_argument(
        "--per-cell",
        type=number(int, 1),
        default=1000,
        help="radioml: most signals of each (class, SNR) cell; torchsig: of each class",
    )
    parser.add_argument(
        "--fs",
        type=HERTZ,
        help="radioml, merlin: nominal sampling rate in Hz, which the files do not hold; without it 1 MHz, "
        "20 MHz; torchsig: where the file does not say it",
    )
    parser.add_argument(
        "--copies", type=number(int, 1), default=40, help="rtl433: augmented copies of each training capture"
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="rtl433: training copies without noise and shift, to see what they are worth",
    )
    parser.add_argument(
        "--view",
        choices=("polar", "iq"),
        default="polar",
        help="rtl433: magnitude and frequency, or I and Q, averaged over 8 samples",
    )
    parser.add_argument(
        "--sentences",
        action="store_true",
        help="rtl433: also ask open questions about test captures, answered in whole sentences",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed")
    return parser.parse_args(argv)


# ---- RadioML


def read_radioml2016(path: Path):
    """Yield (class name, SNR in dB, signals (n, T, 2)) of a RML2016 dictionary {(name, snr): (n, 2, T)}."""
    cells = read_plain_pickle(path, "RadioML pickle", arrays=True)
    if not isinstance(cells, dict) or not all(
        isinstance(k, tuple) and len(k) == 2 and getattr(v, "ndim", 0) == 3 and v.shape[1] == 2
        for k, v in cells.items()
    ):
        raise UserError(f"{path}: expected a dictionary of (class, SNR): array (n, 2, T)")
    found = [(plain_text(name), float(snr), cell.transpose(0, 2, 1)) for (name, snr), cell in cells.items()]
    yield from sorted(found, key=lambda cell: cell[:2])


def read_radioml2018(path: Path):
    """Yields (class name, SNR in dB, signals (n, T, 2)) of a 2018.01a file: X (N, T, 2), Y one-hot (N, 24), Z
    SNR (N, 1)."""
    with reading(path, "RadioML file"), h5py.File(path, "r") as file:
        if any(k not in file for k in "XYZ"):
            raise UserError(f"{path}: expected the datasets X, Y, Z (it has {', '.join(file)})")
        signals, one_hot = hdf5_item(file, "X", whole=False), hdf5_item(file, "Y")[:]
        label, snr = one_hot.argmax(1), hdf5_item(file, "Z")[:].ravel()
        if one_hot.shape[1] != len(RADIOML2018):
            raise UserError(f"{path}: Y has {one_hot.shape[1]} classes, expected {len(RADIOML2018)}")
        for c in range(len(RADIOML2018)):
            for s in np.unique(snr[label == c]):
                rows = np.nonzero((label == c) & (snr == s))[0]
                yield RADIOML2018[c], float(s), signals[rows[0] : rows[-1] + 1][rows - rows[0]]


def convert_radioml(cells, out: Path, per_cell: int, fs: float, seed: int):
    """Cell by cell into three growing .h5 files; then the questions."""
    rng, names, files = np.random.default_rng(seed), [], {}
    for name, snr, signals in progress(cells, desc="cells"):
        if name not in names:
            names.append(name)
        rows = rng.permutation(len(signals))[:per_cell]
        parts = np.split(rows, [int(0.6 * len(rows)), int(0.8 * len(rows))])
        levels = np.broadcast_to(snr, len(signals))
        for part, chosen in zip(("train", "val", "test"), map(np.sort, parts)):
            if part not in files:
                files[part] = growing_file(out / part, signals.shape[1:])
            append(files[part], "IQ_data", signals[chosen])
            append(files[part], "label", np.full((len(chosen), 1), names.index(name)))
            append(files[part], "snr", levels[chosen, None])
    for part, file in files.items():
        file.attrs["fs"], file.attrs["classes"] = fs, json.dumps(names)
        labels = file["label"][:, 0]
        file.close()
        questions = out / part / "modulation.json"
        opens = int(part == "train")
        write_questions(questions, names, labels, NOUN["modulation"], "modulation.h5", rng, 1, opens)
    print(f"{len(names)} classes: {', '.join(names)}")


def growing_file(folder: Path, shape) -> h5py.File:
    """folder/modulation.h5 without a row yet, for signals of a shape."""
    folder.mkdir()
    file = h5py.File(folder / "modulation.h5", "w")
    file.create_dataset("IQ_data", (0, *shape), "float32", maxshape=(None, *shape), chunks=(1, *shape))
    for name in ("label", "snr"):
        file.create_dataset(name, (0, 1), "float32", maxshape=(None, 1))
    return file


def append(file: h5py.File, name: str, values):
    data = file[name]
    data.resize(len(data) + len(values), 0)
    data[len(data) - len(values) :] = values


# ---- rtl_433 captures


def read_rtl433(path: Path, train=None) -> dict:
    """iq (n, 32768) complex64 around zero, y (n,), and per class names, modulation, coding; fs. train:
    content of the training file, whose numbering of the classes the captures then follow."""
    fields = ("iq", "y", "classes", "modulation", "coding", "fs")
    with reading(path, "file of captures"), open_npz(path) as file:
        if missing := [name for name in fields if name not in file]:
            raise UserError(f"{path}: has no array {missing[0]} (it has {', '.join(file)})")
        content = {name: file[name] for name in fields}
    iq, y, classes = content["iq"], content["y"], content["classes"]
    if iq.ndim != 3 or iq.shape[2] != 2 or iq.dtype.kind not in "uif":
        raise UserError(f"{path}: iq is {iq.shape} {iq.dtype}, expected real numbers (n, T, 2)")
    numbers = y.shape == (len(iq),) and y.dtype.kind in "iu"
    if not numbers or not len(y) or y.min() < 0 or y.max() >= len(classes):
        raise UserError(
            f"{path}: y is {y.shape} {y.dtype}, expected for each of the {len(iq)} captures the number of "
            f"one of {len(classes)} classes"
        )
    if wrong := [k for k in ("modulation", "coding") if content[k].shape != classes.shape]:
        raise UserError(
            f"{path}: {wrong[0]} is {content[wrong[0]].shape}, expected one entry for each of the "
            f"{len(classes)} classes"
        )
    if content["fs"].size != 1 or content["fs"].dtype.kind not in "uif" or not content["fs"] > 0:
        raise UserError(f"{path}: fs is {content['fs']}, expected samples per second")
    if len(bad := np.nonzero(~np.isfinite(iq).all((1, 2)) | (iq == iq[:, :1]).all((1, 2)))[0]):
        raise UserError(
            f"{path}: iq[{bad[0]}] holds nan or inf, or the same sample throughout; leave the capture out"
        )
    iq = centred(iq)
    content["iq"] = (iq[..., 0] + 1j * iq[..., 1]).astype(np.complex64)
    content |= {"fs": float(content["fs"]), "y": content["y"].astype(int)}
    if train is not None:
        names, known = list(map(str, content["classes"])), list(map(str, train["classes"]))
        if unknown := {names[k] for k in content["y"]} - set(known):
            raise UserError(
                f"{path}: class {min(unknown)} is not among the {len(known)} of the training file"
            )
        content["y"] = np.array([known.index(names[k]) for k in content["y"]], int)
        content |= {k: train[k] for k in ("classes", "modulation", "coding")}
    return content


def burst_power(z: np.ndarray) -> float:
    """Mean power of the samples that belong to bursts: those above a quarter of the peak magnitude of the
    smoothed envelope."""
    envelope = np.convolve(np.abs(z - z.mean()), np.ones(16) / 16, "same")
    return float(np.mean(np.abs(z[envelope > 0.25 * envelope.max()]) ** 2))


def disturb(z, fs, rng, noise_db=None, shift_hz=0.0):
    """z shifted by shift_hz and turned by a random phase, with white noise noise_db dB below the burst
    power."""
    z = z * np.exp(1j * (rng.uniform(0, 2 * np.pi) + 2 * np.pi * shift_hz / fs * np.arange(len(z))))
    if noise_db is not None:
        level = np.sqrt(burst_power(z) / 2 * 10 ** (-noise_db / 10))
        z = z + level * (rng.standard_normal(len(z)) + 1j * rng.standard_normal(len(z)))
    return z


def device_names(meta) -> dict[str, list[str]]:
    """What each task calls the classes of the captures, class by class."""
    fields = {"device": "classes", "coding": "coding", "keying": "modulation"}
    return {task: [str(value) or "none" for value in meta[field]] for task, field in fields.items()}


def write_captures(folder: Path, views, y, meta, rng, args, choices: int, opens: int):
    """folder/device.h5, of captures in the view of --view, and the questions about device, coding and keying
    in three .json."""
    folder.mkdir(parents=True)
    names = device_names(meta)
    with h5py.File(folder / "device.h5", "w") as file:
        file["IQ_data"] = np.stack(views)
        file["label"] = np.asarray(y, np.float32)[:, None]
        file.attrs["fs"], file.attrs["classes"] = meta["fs"] / FACTOR, json.dumps(names["device"])
        file.attrs["view"], file.attrs["view_factor"] = args.view, FACTOR
    for task, of_class in names.items():
        kinds = of_class if task == "device" else sorted(set(of_class))
        labels = [kinds.index(of_class[k]) for k in y]
        about = (folder / f"{task}.json", kinds, labels, DEVICE[task], "device.h5", rng)
        write_questions(*about, choices, opens, sentences=args.sentences)


def copies_of(content: dict, rng, clean: bool):
    """Each capture begun elsewhere and, unless `clean`, shifted and under noise of -10 to 30 dB."""
    for z in content["iq"]:
        z = np.roll(z, int(rng.integers(len(z))))
        noise = None if clean else rng.uniform(-10, 30)
        yield disturb(z, content["fs"], rng, noise, 0.0 if clean else rng.uniform(-25e3, 25e3))


def convert_rtl433(paths, out: Path, args):
    """paths: the training and the test file, or the test file alone."""
    train = read_rtl433(paths[0])
    test = read_rtl433(paths[1], train) if len(paths) > 1 else train
    rng = np.random.default_rng(args.seed)
    for part, copies in (("train", args.copies), ("val", 2)) if len(paths) > 1 else ():
        rounds = progress(range(copies), desc=part)
        views = [view(z, args.view) for _ in rounds for z in copies_of(train, rng, args.clean)]
        labels = np.tile(train["y"], copies)
        how = (2, 1) if part == "train" else (1, 0)
        write_captures(out / part, views, labels, train, rng, args, *how)
    for noise in (None, *NOISE_DB):
        for shift in (0.0, 15e3):
            views = [view(disturb(z, test["fs"], rng, noise, shift), args.view) for z in test["iq"]]
            name = ("clean" if noise is None else f"{noise}dB") + ("_shift" if shift else "")
            folder = out / "test" / name
            write_captures(folder, views, test["y"], test, rng, args, 1, int(args.sentences))
    tasks = {
        task: {"noun": DEVICE[task], "names": names if task == "device" else sorted(set(names))}
        for task, names in device_names(train).items()
    }
    (out / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False))
    trained = f"{len(train['y'])} training captures x {args.copies} copies, " if len(paths) > 1 else ""
    print(f"{trained}{len(test['y'])} test captures in {2 * len(NOISE_DB) + 2} conditions")


# ---- MERLIN: EM-134K and EM-Bench

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
PLACEHOLDER = re.compile(r"[ \t]*<(?:iq_data|iq|signal|IQ)>[ \t]*")


def read_merlin(path: Path):
    """Yield (id, texts of `merlin_turns`, answer or None, signals [(T, 2)]) of every turn of a .jsonl."""
    with reading(path, "file of JSON lines"), open(path, "rb") as file:
        for number, line in enumerate(map(decoded, file), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}); mend the line") from error
            check(record, {"conversations": [{"from": str, "value": str}], "iq_data": list}, where)
            signals = merlin_signals(record["iq_data"], where)
            for texts, answer in merlin_turns(record["conversations"], where):
                yield record.get("id", number - 1), texts, answer, signals


def merlin_signals(data, where: str) -> list[np.ndarray]:
    """One signal (T, 2), or several."""
    try:
        arrays = [np.asarray(data, np.float32)]
        arrays = list(arrays[0]) if arrays[0].ndim == 3 else arrays
    except ValueError:  # several of different lengths
        arrays = [np.asarray(signal, np.float32) for signal in data]
    arrays = [a.T if a.ndim == 2 and a.shape[0] == 2 != a.shape[1] else a for a in arrays]
    if any(not np.isfinite(a).all() for a in arrays):
        raise UserError(f"{where}: iq_data holds nan, inf or null; mend the line")
    if not arrays or any(a.ndim != 2 or a.shape[1] != 2 or not len(a) for a in arrays):
        shapes = ", ".join(str(a.shape) for a in arrays[:3]) or "empty"
        raise UserError(f"{where}: iq_data is {shapes}, expected pairs of I and Q")
    return arrays


def merlin_turns(conversations, where: str) -> list[tuple[dict, str | None]]:
    """({"question", "turn"}, answer or None) of a conversation: what was said before stands before each
    question, and "turn" is the question without that, which alone says whether there are options."""
    told, turns = [], []
    for turn in conversations:
        role = ROLES.get(turn["from"].lower())
        if role is None:
            raise UserError(f"{where}: conversations: from is {turn['from']!r}, expected human or gpt")
        text = PLACEHOLDER.sub(" ", turn["value"]).strip()
        if role == "gpt":
            if not turns:
                raise UserError(f"{where}: conversations: the first turn is gpt's; it answers no question")
            turns[-1] = (turns[-1][0], text or None)
        elif role == "human":
            if not text:
                raise UserError(f"{where}: conversations: a turn of human holds no text; mend the line")
            turns.append(({"question": "\n".join([*told, text]), **({"turn": text} if told else {})}, None))
        told.append(text)
    if not turns:
        raise UserError(f"{where}: conversations: holds no turn of human")
    return turns


def convert_merlin(paths, out: Path, fs: float):
    """Every file to <name>.json and <name>.h5; signals of another length to <name>_<points>.hdf5, which no
    json of its own belongs to."""
    if twice := {path.stem for path in paths if sum(path.stem == other.stem for other in paths) > 1}:
        raise UserError(f"two files are called {min(twice)}, as what is written for them; rename one")
    for path in paths:
        kept, records = {}, []
        for name, texts, answer, signals in progress(read_merlin(path), desc=path.stem):
            points = {len(signal) for signal in signals}
            if len(points) > 1:
                raise UserError(
                    f"{path}: id {name}: its signals differ in length, {sorted(points)}; cut them"
                )
            store = kept.setdefault(points.pop(), [])
            rows = list(range(len(store), len(store) + len(signals)))
            store += signals
            record = {"id": len(records), "source_id": name, **texts}
            record |= {"answer": answer} if answer else {}
            index = rows[0] if len(rows) == 1 else rows
            records.append({**record, "iq_index_in_h5": index, "h5_path": len(signals[0])})
        if not records:
            raise UserError(f"{path}: holds no record")
        names = {points: f"{path.stem}{f'_{points}.hdf5' if n else '.h5'}" for n, points in enumerate(kept)}
        for points, signals in kept.items():
            with h5py.File(out / names[points], "w") as file:
                file["IQ_data"], file.attrs["fs"] = np.stack(signals), fs
        for record in records:
            record["h5_path"] = names[record["h5_path"]]
        text = json.dumps(records, ensure_ascii=False, indent=0)
        (out / f"{path.stem}.json").write_text(text, encoding="utf-8")
        print(f"{path.stem}: {len(records)} questions, signals of {', '.join(map(str, sorted(kept)))} points")


# options that mean nothing for a source
UNUSED = dict.fromkeys(("radioml2016", "radioml2018", "torchsig"), ("copies", "clean", "view", "sentences"))
UNUSED |= {"rtl433": ("per_cell", "fs"), "merlin": (*UNUSED["torchsig"], "per_cell", "seed")}


def main(args):
    # everything is checked before anything is written
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty; choose another --out")
    for path in args.files:
        if not path.is_file():
            raise UserError(f"{path}: no such file; check the path")
    most = {"rtl433": 2, "merlin": len(args.files)}.get(args.source, 1)
    if len(args.files) > most:
        what = "a training and a test file" if most == 2 else "one file"
        raise UserError(f"{args.source} takes {what}, {len(args.files)} are given")
    refuse(args, UNUSED[args.source], f"with {args.source}")
    if args.source == "rtl433" and len(args.files) == 1:
        refuse(args, ["copies", "clean"], "without a training file")

    first = args.files[0]
    with atomic_dir(args.out) as out:
        if args.source == "rtl433":
            convert_rtl433(args.files, out, args)
        elif args.source == "merlin":
            convert_merlin(args.files, out, args.fs or DEFAULT_FS)
        elif args.source == "torchsig":
            cells, fs = read_torchsig(first)
            if fs is not None:
                refuse(args, ["fs"], "on a file that states its own")
            if (fs or args.fs) is None:
                raise UserError(f"{first}: does not say its sampling rate; give it in Hz with --fs")
            convert_radioml(cells, out, args.per_cell, fs or args.fs, args.seed)
        else:
            read = read_radioml2016 if args.source == "radioml2016" else read_radioml2018
            convert_radioml(read(first), out, args.per_cell, args.fs or 1e6, args.seed)
    print(f"written to {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
