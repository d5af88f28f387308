"""em_mllm: data sets, bad inputs, file formats, converters, reading of answers."""

import json
import os
import pickle
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.tiny_llm import make_tokenizer
from em_mllm import dataset as dataset_module
from em_mllm import signal_file
from em_mllm.convert import main as convert_main
from em_mllm.convert import parse_args as convert_args
from em_mllm.convert import read_radioml2016, read_radioml2018
from em_mllm.dataset import (
    Augmentation,
    PackedSignals,
    QuestionCollator,
    QuestionDataset,
    Records,
    SignalCollator,
    SignalDataset,
    SignalFile,
    add_noise,
    read_questions,
    task_pairs,
)
from em_mllm.em_foundation.models import SiTMAEConfig
from em_mllm.iq_io import read_iq, windows
from em_mllm.make_data import main as make_data_main
from em_mllm.make_data import parse_args as make_data_args
from em_mllm.options import extract_letter, parse_options
from em_mllm.prepare import view
from em_mllm.scores import calibration_error, fit_temperature, score, wilson
from em_mllm.submission import validate_submission, write_submission
from tests import forked
from tests.em_world import write_h5, write_questions

QUESTION = "请依据给出的IQ信号内容，选出最符合的调制类型（四选一）。(A) GFSK (B) FM (C) MSK (D) 2FSK"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = make_tokenizer([QUESTION, "正确答案是：(B) FM"], 400)
    tokenizer.add_tokens(["<IQ_START>", "<IQ_END>"], special_tokens=True)
    return tokenizer


def write_pair(folder, count=6, points=64, questions=None, **datasets):
    rng = np.random.default_rng(0)
    iq = datasets.get("IQ_data", rng.standard_normal((count, points, 2)).astype(np.float32))
    label = datasets.get("label", np.arange(count, dtype=np.float32)[:, None] % 3)
    write_h5(folder / "modulation.h5", iq, label=label)
    about = {"question": QUESTION, "answer": "正确答案是：(B) FM", "h5_path": "modulation.h5"}
    rows = [{"id": i, **about, "iq_index_in_h5": i} for i in range(count)] if questions is None else questions
    (folder / "modulation.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return [(folder / "modulation.h5", folder / "modulation.json")]


def test_seeds_own_example_is_read(tmp_path, tokenizer):
    data = QuestionDataset(write_pair(tmp_path), tokenizer)
    batch = QuestionCollator(8, tokenizer.pad_token_id)([data[0], data[5]])
    assert batch["iq"].shape == (2, 64, 2) and float(batch["iq"].abs().amax((1, 2)).min()) == 1.0
    learned = tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert learned.replace(" ", "") == "正确答案是：(B)FM</s>"
    prompt = tokenizer.decode(
        batch["input_ids"][0][(batch["labels"][0] < 0) & batch["attention_mask"][0].bool()]
    )
    assert prompt.endswith("</s>") and "GFSK" in prompt
    assert parse_options({"question": QUESTION}) == {"A": "GFSK", "B": "FM", "C": "MSK", "D": "2FSK"}


def test_h5_path_of_the_record_wins_over_the_pairing(tmp_path, tokenizer):
    pairs = write_pair(tmp_path)
    write_h5(tmp_path / "other.h5", np.full((2, 32, 2), 7, np.float32))
    records = json.loads(pairs[0][1].read_text(encoding="utf-8"))
    records[1] |= {"h5_path": "other.h5", "iq_index_in_h5": 1}
    pairs[0][1].write_text(json.dumps(records), encoding="utf-8")
    data = QuestionDataset(pairs, tokenizer)
    assert len(data[1]["iq"][0]) == 32 and len(data[0]["iq"][0]) == 64


def test_several_signals_and_several_questions(tmp_path, tokenizer):
    rows = [
        {"question": QUESTION, "answer": "(A) x", "iq_index_in_h5": [0, 2]},
        {"question": "second?", "answer": "y", "iq_index_in_h5": [0, 2]},
        {"question": "third?", "answer": "z", "iq_index_in_h5": 1},
    ]
    data = QuestionDataset(write_pair(tmp_path, questions=rows), tokenizer, questions_per_signal=2)
    assert len(data) == 2 and len(data[0]["iq"]) == 2 and len(data[0]["texts"]) == 2
    batch = QuestionCollator(8, tokenizer.pad_token_id)([data[0], data[1]])
    assert batch["signal_index"].tolist() == [[0, 1], [0, 1], [2, -1]] and len(batch["input_ids"]) == 3


def bad_value(value):
    iq = np.ones((6, 64, 2), np.float32)
    iq[3] = value
    return {"IQ_data": iq}


def item(**changes):
    good = {"id": 0, "question": QUESTION, "answer": "正确答案是：(B) FM", "iq_index_in_h5": 0}
    return [{name: value for name, value in (good | changes).items() if value is not None}]


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda f: write_pair(f, IQ_data=np.ones((6, 64), np.float32)),
            "IQ_data is (6, 64), expected (Num, T, 2)",
        ),
        (lambda f: write_pair(f, IQ_data=np.ones((6, 64, 2), "S3")), "expected real numbers"),
        (lambda f: write_pair(f, IQ_data=np.ones((6, 64, 2), np.complex64)), "expected real numbers"),
        (lambda f: write_pair(f, label=np.ones((4, 1))), "label has 4 rows, IQ_data 6"),
        (lambda f: write_pair(f, **bad_value(np.nan)), "IQ_data[3] of modulation.h5 holds nan or inf"),
        (lambda f: write_pair(f, **bad_value(np.inf)), "IQ_data[3] of modulation.h5 holds nan or inf"),
        (lambda f: write_pair(f, **bad_value(0)), "IQ_data[3] of modulation.h5 is all zero"),
        (lambda f: write_pair(f, questions={"question": "x"}), "holds a dict, expected a list"),
        (lambda f: write_pair(f, questions=[]), "the list of questions is empty"),
        (lambda f: write_pair(f, questions=["x"]), "item 0 is a str"),
        (lambda f: write_pair(f, questions=item(question=None)), "item 0: question is missing"),
        (lambda f: write_pair(f, questions=item(answer=None)), "item 0 (id 0): no answer"),
        (lambda f: write_pair(f, questions=item(answer=3)), "item 0: answer is a int"),
        (lambda f: write_pair(f, questions=item(iq_index_in_h5="3")), "iq_index_in_h5 is '3'"),
        (
            lambda f: write_pair(f, questions=item(iq_index_in_h5=6)),
            "iq_index_in_h5 6 but modulation.h5 holds 6 signals",
        ),
        (lambda f: write_pair(f, questions=item(iq_index_in_h5=-1)), "iq_index_in_h5 -1 but"),
        (
            lambda f: write_pair(f, questions=item(answer="正确答案是：(E) FM")),
            "the answer says (E) but the options are A, B, C, D",
        ),
        (lambda f: write_pair(f, questions=item(question=QUESTION + "字" * 900)), "but --max-length is 512"),
        (lambda f: write_pair(f, questions=item(h5_path="absent.h5")), "h5_path absent.h5 is not in"),
        (lambda f: write_pair(f, questions=item(h5_path="../modulation.h5")), "lies outside"),
    ],
)
def test_bad_data_is_named_by_file_and_field(tmp_path, tokenizer, make, words):
    (tmp_path / "d").mkdir()
    pairs = make(tmp_path / "d")
    with pytest.raises(UserError) as error:
        QuestionDataset(pairs, tokenizer)
    assert words in str(error.value) and "modulation" in str(error.value) and "\n" not in str(error.value)


def test_missing_dataset_truncated_and_missing_files(tmp_path, tokenizer):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["iq"] = np.ones((2, 8, 2))
    with pytest.raises(UserError, match="no dataset IQ_data .it has iq."):
        SignalFile(tmp_path / "a.h5")
    write_pair(tmp_path, 40, 512)
    whole = (tmp_path / "modulation.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.h5: not a readable HDF5 file"):
        SignalFile(tmp_path / "cut.h5")
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(UserError, match="broken.json: not a readable JSON"):
        read_questions(tmp_path / "broken.json")
    with pytest.raises(UserError, match="a.json: no such file"):
        task_pairs(tmp_path)
    with pytest.raises(UserError, match="3 files given"):
        task_pairs(None, [tmp_path] * 3)
    with pytest.raises(UserError, match="give --task-dir"):
        task_pairs(None, None)


def test_skip_bad_leaves_out_and_counts(tmp_path, tokenizer):
    rows = [*item(), *item(iq_index_in_h5=99), *item(answer="(E) x"), *item(iq_index_in_h5=3)]
    data = QuestionDataset(write_pair(tmp_path, questions=rows, **bad_value(0)), tokenizer, skip_bad=True)
    assert len(data) == 1 and data.skipped == {
        "index past the end": 1,
        "unknown letter": 1,
        "unusable signal": 1,
    }


def compare_workers_with_parent(folder, tokenizer):
    data = QuestionDataset(write_pair(folder, 12), tokenizer)
    data[0]  # the parent's handle is open when the workers fork
    collate = QuestionCollator(8, tokenizer.pad_token_id)
    alone = [b["iq"] for b in DataLoader(data, 3, collate_fn=collate)]
    workers = DataLoader(data, 3, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    read = [b["iq"] for b in workers]
    assert len(alone) == len(read) and all(torch.equal(a, b) for a, b in zip(alone, read))


def test_loader_workers_read_what_the_parent_reads_after_a_fork(tmp_path, tokenizer):
    forked.check(compare_workers_with_parent, tmp_path, tokenizer)


def test_records_are_flat_bytes_and_come_back_equal():
    rows = [{"id": i, "question": "问" * i} for i in range(5)]
    records = Records(rows)
    assert [records[i] for i in range(5)] == rows and isinstance(records.bytes, np.ndarray)


def test_packing_shows_every_signal_once_an_epoch_and_depends_on_seed_and_epoch_alone(tmp_path):
    write_pair(tmp_path, 30, 128)
    config = SiTMAEConfig(hidden_size=32, num_attention_heads=4, max_seq_len=(256, 1))
    packed = PackedSignals(SignalDataset([tmp_path / "modulation.h5"]), config, 34, min_points=16, seed=1)
    assert sorted(packed.members.tolist()) == list(range(30)) and packed.efficiency > 0.8
    again = PackedSignals(SignalDataset([tmp_path / "modulation.h5"]), config, 34, min_points=16, seed=1)
    assert all(torch.equal(packed[2][k], again[2][k]) for k in packed[2])
    plans = [PackedSignals(packed.signals, config, 34, min_points=16, seed=s).counts for s in range(60)]
    lengths = np.concatenate(plans)
    assert lengths.min() == 2 and lengths.max() == 15  # patches of 8 in 16 to 128 points
    # log-uniform: half of the signals below the geometric mean
    assert np.mean(lengths < 2**1.5 * 2) == pytest.approx(0.5, abs=0.05)
    before = packed[0]["patches"]
    packed.set_epoch(1)
    assert not torch.equal(before, packed[0]["patches"])
    packed.set_epoch(0)
    assert torch.equal(before, packed[0]["patches"])
    row = packed[0]
    padding = row["sample_ids_seq"] < 0
    assert not row["patches"][padding].any() and torch.isinf(row["noise"][padding]).all()


def test_added_noise_has_the_stated_level():
    x = np.stack([np.ones(20000), np.zeros(20000)], 1).astype(np.float32)
    y = add_noise(x, np.random.default_rng(0), (3, 3))
    z = y[:, 0] + 1j * y[:, 1]
    assert 10 * np.log10(np.abs(z.mean()) ** 2 / np.var(z)) == pytest.approx(3, abs=0.2)


def test_ranges_that_cannot_be_meant_are_one_line(tmp_path, capsys):
    noise = SimpleNamespace(noise_db=[5, 0], shift_hz=0, roll=False, phase=False, conjugate=False)
    with pytest.raises(UserError, match="--noise-db 5 0: LOW is above HIGH"):
        Augmentation.of(noise)
    for flags, words in (
        (["--snr", "20", "-10"], "--snr 20 -10: LOW is above HIGH"),
        (["--fs", "1e5", "2e7"], "--fs 100000: signals of 4 MHz do not fit"),
        (["--choice-questions", "0", "--open-questions", "0"], "nothing to learn"),
    ):
        with pytest.raises(UserError, match=words):
            make_data_main(make_data_args(["--out", str(tmp_path / "d"), *flags]))
    for flags in ("--fs nan", "--fs 0", "--snr nan 0", "--seed -1", "--points 64"):
        with pytest.raises(SystemExit):
            make_data_args(["--out", str(tmp_path / "d"), *flags.split()])
    assert "Traceback" not in capsys.readouterr().err


def test_the_signal_without_noise_is_the_same_draw_of_all_else(tmp_path):
    path = write_pair(tmp_path, 4, 64)[0][0]
    waves = dict(roll=True, phase=True, conjugate=True, shift_hz=1e5)
    both = SignalDataset([path], seed=3, augmentation=Augmentation((0, 5), **waves), clean=True)
    plain = SignalDataset([path], seed=3, augmentation=Augmentation(**waves))
    for i in range(4):
        item = both[i]
        assert np.array_equal(item["clean"], plain[i]["iq"]) and not np.array_equal(item["iq"], item["clean"])
    config = SiTMAEConfig(patch_size=(16, 1), max_seq_len=(128, 1), spectrum_weight=1.0)
    batch = SignalCollator(config, teacher=config)([both[i] for i in range(4)])
    told = SignalCollator(config)([plain[i] for i in range(4)])
    assert torch.equal(batch["teacher"]["samples"], told["samples"])
    assert not torch.equal(batch["samples"], told["samples"])
    rows = [PackedSignals(data, config, 16, seed=3)[0] for data in (both, plain)]
    assert torch.equal(rows[0]["target"], rows[1]["patches"])
    assert torch.equal(rows[0]["spectrum"], rows[1]["spectrum"])
    assert not torch.equal(rows[0]["patches"], rows[1]["patches"])


def test_a_second_view_is_another_draw_of_the_same_signal_at_the_same_places(tmp_path):
    path = write_pair(tmp_path, 4, 64)[0][0]
    data = SignalDataset([path], seed=3, augmentation=Augmentation(roll=True), second=True)
    config = SiTMAEConfig(patch_size=(16, 1), max_seq_len=(128, 1))
    one, two = (data[0][name] for name in ("iq", "second"))
    assert not np.array_equal(one, two) and any(np.array_equal(np.roll(one, k, 0), two) for k in range(64))
    row = PackedSignals(data, config, 24, seed=3)[0]
    special = row["patch_positions"] < config.num_special
    assert torch.equal(row["second"][special], row["patches"][special])
    assert not torch.equal(row["second"], row["patches"]) and row["second"].shape == row["patches"].shape
    data.set_epoch(1)
    assert not np.array_equal(data[0]["second"], two)


@pytest.mark.slow
def test_rolled_signals_are_the_same_signal_begun_elsewhere_anew_each_epoch(tmp_path, tokenizer):
    pairs = write_pair(tmp_path, 4, 64)
    roll = Augmentation(roll=True)
    plain, rolled = SignalDataset([pairs[0][0]]), SignalDataset([pairs[0][0]], seed=3, augmentation=roll)
    questions = QuestionDataset(pairs, tokenizer, seed=3, augmentation=roll)
    for seen in (lambda i: rolled[i]["iq"], lambda i: questions[i]["iq"][0]):
        shifts = []
        for epoch in range(4):
            rolled.set_epoch(epoch)
            questions.set_epoch(epoch)
            for i in range(4):
                fits = [k for k in range(64) if np.array_equal(np.roll(plain[i]["iq"], k, 0), seen(i))]
                assert len(fits) == 1
                shifts += fits
        assert len(set(shifts)) > 8


def test_make_data_writes_the_seeds_pair_and_equal_bytes_for_equal_seeds(tmp_path):
    few = ["--train=2", "--val=1", "--test=1", "--points=256", "--open-questions=1", "--no-test-answers"]

    def make(name):
        make_data_main(make_data_args(["--out", str(tmp_path / name), *few]))

    make("a")
    make("b")
    for task in ("modulation", "radar_jamming"):
        with (
            h5py.File(tmp_path / "a/train" / f"{task}.h5") as a,
            h5py.File(tmp_path / "b/train" / f"{task}.h5") as b,
        ):
            assert a["IQ_data"].dtype == np.float32 and a["label"].shape == (len(a["IQ_data"]), 1)
            assert np.array_equal(a["IQ_data"][:], b["IQ_data"][:])
    questions = read_questions(tmp_path / "a/train/modulation.json")
    assert (
        set(questions[0]) == {"id", "question", "answer", "iq_index_in_h5", "h5_path"}
        and len(questions) == 90
    )
    right = [extract_letter(q["answer"], parse_options(q)) for q in questions if parse_options(q)]
    assert None not in right and len(set(right)) == 4
    assert "answer" not in read_questions(tmp_path / "a/test/modulation.json")[0]
    with pytest.raises(UserError, match="is not empty"):
        make("a")


def test_signals_of_several_rates_are_asked_for_what_the_rate_decides(tmp_path):
    rates = [10e6, 20e6, 40e6]
    words = ["--out", tmp_path / "d", "--train", 6, "--val", 1, "--test", 1, "--points", 512, "--snr", 30, 30]
    make_data_main(make_data_args([str(w) for w in (*words, "--fs", *rates)]))
    file = SignalFile(tmp_path / "d/train/bandwidth.h5")
    assert file.rates() == rates and file.classes == ["0.5 MHz", "1 MHz", "2 MHz", "4 MHz"]
    for i in range(len(file)):
        z = file.read(i) @ [1, 1j]
        power = np.abs(np.fft.fft(z)) ** 2
        hz = np.abs(np.fft.fftfreq(512, 1 / file.rate(i)))
        width = float(file.classes[int(file.column("label")[i])].split()[0]) * 1e6
        inside = hz <= width / 2 + 0.015 * file.rate(i)  # and the carrier's offset
        assert power[inside].sum() > 0.95 * power.sum()
        assert power[hz <= width / 8].sum() < 0.8 * power.sum()
    assert SignalFile(tmp_path / "d/test/modulation.h5").fs_stated
    questions = read_questions(tmp_path / "d/train/bandwidth.json")
    assert any("MHz" in str(parse_options(q)) for q in questions)


# ---- recordings


def tone(n=4000):
    z = np.exp(2j * np.pi * 0.05 * np.arange(n)) * 0.5
    return np.stack([z.real, z.imag], 1).astype(np.float32)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.cs16", b"12345", "no whole number of 4-byte"),
        ("a.cu8", b"", "holds no samples"),
        ("a.npy", b"nonsense", "not a readable array"),
        ("a.mat", b"nonsense", "not a readable MATLAB file"),
        ("a.wav", b"nonsense", "not a readable WAV"),
        ("a.xyz", b"1", "is not known"),
        ("a.cf32", np.full(8, np.nan, np.float32).tobytes(), "is nan or inf"),
        ("a.cf32", np.zeros(8, np.float32).tobytes(), "every sample is zero"),
        ("a.sigmf-meta", b"{}", "has no field 'global'"),
        ("a.h5", b"nonsense", "not a readable HDF5"),
    ],
)
def test_bad_recordings_are_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_iq(tmp_path / name)


def test_pickled_npy_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable array"):
        read_iq(tmp_path / "a.npy")


def test_real_captures_are_read(data_root):
    iq, fs = read_iq(next((data_root / "rf" / "raw_cu8").glob("*.cu8")))
    assert fs == 250000 and abs(iq.mean()) < 10 and len(windows(iq, 1024)) >= 1
    iq, fs = read_iq(data_root / "rf" / "sigmf" / "sigmf_logo.sigmf-meta")
    assert fs == 48000 and iq.shape[1] == 2


def test_windows_are_the_strong_ones_in_order():
    x = np.random.default_rng(0).standard_normal((10000, 2)).astype(np.float32) * 0.01
    x[3000:5000] += tone(2000)
    cut = windows(x, 1000, most=4)
    assert [start for start, _ in cut] == [3000, 4000] and all(w.shape == (1000, 2) for _, w in cut)
    x[8000:9000] += 2 * tone(1000)
    x[4000:5000] *= 1.1
    # in order of time, though 8000 is the strongest
    assert [start for start, _ in windows(x, 1000, most=2)] == [4000, 8000]
    assert len(windows(x[:500], 1000)) == 1


# ---- converters


def test_radioml2016_comes_in_and_code_in_the_pickle_does_not_run(tmp_path):
    rng = np.random.default_rng(0)
    cells = {
        (name, snr): rng.standard_normal((10, 2, 128)).astype(np.float32)
        for name in ("BPSK", "WBFM", "QPSK", "GFSK")
        for snr in (-4, 18)
    }
    (tmp_path / "r.pkl").write_bytes(pickle.dumps(cells, protocol=2))
    out = tmp_path / "out"
    convert_main(convert_args(["radioml2016", f"{tmp_path}/r.pkl", "--out", str(out), "--per-cell", "10"]))
    files = [SignalFile(out / part / "modulation.h5") for part in ("train", "val", "test")]
    assert [len(file) for file in files] == [48, 16, 16]
    for file in files:
        assert file.points == 128 and set(file.column("snr")) == {-4, 18}
        assert file.classes == sorted(["BPSK", "WBFM", "QPSK", "GFSK"])
    marker = tmp_path / "ran"
    evil = type("Evil", (), {"__reduce__": lambda self: (open, (str(marker), "w"))})()
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match="could run code"):
        list(read_radioml2016(tmp_path / "evil.pkl"))
    assert not marker.exists()


def test_radioml2018_comes_in(tmp_path):
    label = np.repeat(np.arange(24), 10)
    with h5py.File(tmp_path / "r.hdf5", "w") as file:
        file["X"], file["Y"], file["Z"] = (
            np.ones((240, 64, 2), np.float32) * label[:, None, None],
            np.eye(24)[label],
            np.tile([[0], [10]], (120, 1)),
        )
    convert_main(
        convert_args(["radioml2018", f"{tmp_path}/r.hdf5", "--out", f"{tmp_path}/out", "--per-cell", "5"])
    )
    file = SignalFile(tmp_path / "out/train/modulation.h5")
    assert len(file.classes) == 24 and all(
        file.read(i)[0, 0] == file.column("label")[i] for i in range(0, len(file), 7)
    )
    for name in "XYZ":
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for part in "XYZ":
                file[part] = h5py.ExternalLink("r.hdf5", part) if part == name else [[0.0]]
        with pytest.raises(UserError, match=f"{name} lies in another file"):
            list(read_radioml2018(tmp_path / f"{name}.hdf5"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"iq": np.zeros((3, 64), np.uint8)}, "iq is"),
        ({"iq": np.full((3, 64, 2), 127, np.uint8)}, r"iq\[0\] holds"),
        ({"y": np.array([0, 1, 2])}, "y is"),
        ({"y": np.array([0.0, 1.0, 1.0])}, "y is"),
        ({"coding": np.array(["PWM"])}, "coding is"),
        ({"fs": np.array("fast")}, "fs is"),
        ({"classes": np.array(["a", "c"])}, "class c is not among"),
    ],
)
def test_bad_capture_files_are_named_by_field(tmp_path, change, words):
    iq = np.random.default_rng(0).integers(0, 255, (3, 64, 2)).astype(np.uint8)
    good = dict(
        iq=iq,
        y=np.array([0, 1, 1]),
        classes=np.array(["a", "b"]),
        modulation=np.array(["OOK", "FSK"]),
        coding=np.array(["PWM", ""]),
        fs=250000,
    )
    np.savez(tmp_path / "train.npz", **good)
    np.savez(tmp_path / "test.npz", **(good | change))
    files = [str(tmp_path / name) for name in ("train.npz", "test.npz")]
    with pytest.raises(UserError, match=words) as error:
        convert_main(convert_args(["rtl433", *files, "--out", str(tmp_path / "out")]))
    assert "test.npz" in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_polar_view_measures_magnitude_and_frequency():
    burst = np.repeat([3.0, 1e-3], 400)  # half a burst, half silence
    z = burst * np.exp(2j * np.pi * np.where(burst > 1, 0.1, -0.3) * np.arange(800))
    magnitude, frequency = view(z).T
    assert np.allclose(magnitude[1:50], 1, atol=0.01) and np.allclose(magnitude[50:], -1, atol=0.01)
    # strength is relative to the mean power: twice it in the burst
    assert np.allclose(frequency[1:50], 0.2 * 2**0.5, rtol=0.02)
    assert np.abs(frequency[51:]).max() < 1e-5
    assert np.isfinite(view(np.ones(800))).all()


# ---- answers


def test_submission_is_written_and_every_fault_found(tmp_path):
    questions = [{"id": i, "question": QUESTION, "iq_index_in_h5": 0} for i in range(3)]
    path = tmp_path / "s.json"
    write_submission(path, [{"id": i, "pred": "A"} for i in range(3)], "us", "m")
    assert "valid, 3 answers" in validate_submission(path, questions)
    good = json.loads(path.read_text())
    for change, words in [
        ({"team_name": ""}, "team_name"),
        ({"evaluation_time": "today"}, "evaluation_time"),
        ({"answers": {}}, "answers is an object"),
        ({"answers": good["answers"][:2]}, "1 questions have no answer"),
        ({"answers": good["answers"] + [{"id": 0, "pred": "A"}]}, "answered twice"),
        ({"answers": [{"id": 9, "pred": "A"}]}, "not among the questions"),
        ({"answers": [{"id": 0, "pred": "E"}]}, "pred is 'E'"),
        ({"answers": [{"id": "0", "pred": "A"}]}, "not a whole number"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=words):
            validate_submission(path, questions)


def test_scores_are_right_on_a_known_case():
    answers = [
        {
            "id": i,
            "text": "(A) x",
            "options": {"A": "x", "B": "y", "C": "z", "D": "w"},
            "extracted": "A",
            "pred": "A",
            "likeliest": "A",
            "scores": [2.0, 0.0, 0.0, 0.0],
            "task": "t",
            "answer": "(A) x",
            "truth": "A" if i < 6 else "B",
            "class": "x" if i < 6 else "y",
            "snr_db": 12.0 if i % 2 else 3.0,
        }
        for i in range(10)
    ]
    metrics = score(answers)
    assert (
        metrics["accuracy"] == 0.6
        and metrics["by_class"] == {"x": 1.0, "y": 0.0}
        and metrics["by_snr"] == {"0": 0.6, "10": 0.6}
        and metrics["valid_letters"] == 1
    )
    low, high = wilson(6, 10)
    assert low == pytest.approx(0.3127, abs=1e-3) and high == pytest.approx(0.8318, abs=1e-3)
    confidence = float(torch.tensor([2.0, 0, 0, 0]).softmax(0)[0])
    assert calibration_error(answers, 1.0) == pytest.approx(confidence - 0.6, abs=1e-6)
    assert calibration_error(answers, fit_temperature(answers)) < 0.05
    free = score(
        [
            {"id": 0, "text": "FM", "answer": "FM", "task": "t", "snr_db": None},
            {"id": 1, "text": "AM", "answer": "FM", "task": "t", "snr_db": None},
        ]
    )["open"]
    assert free["exact"] == 0.5 and free["rougeL"] == 0.5 and 0.4 < free["bleu"] < 0.6


def test_what_was_found_in_many_questions_is_remembered(tmp_path, monkeypatch):
    """The second start equals the first without a look at questions or signals; a change is seen."""
    monkeypatch.setenv("EM_MLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dataset_module, "MANY", 4)
    monkeypatch.setattr(signal_file.SignalFile, "large", 1)
    iq = np.random.default_rng(0).normal(size=(6, 32, 2)).astype("f4")
    iq[2] = 0
    write_h5(tmp_path / "x.h5", iq, fs=1e6)
    ask = "What is it? (A) BPSK (B) QPSK"
    answers = [f"({'AB'[i % 2]}) it is" for i in range(6)]
    rows = [{"question": ask, "answer": text, "iq_index_in_h5": i} for i, text in enumerate(answers)]
    write_questions(tmp_path / "x.json", rows)
    tokenizer, looked = make_tokenizer([ask, "it is"] * 3, 200), []
    original = QuestionDataset.fault
    monkeypatch.setattr(QuestionDataset, "fault", lambda *a: looked.append(1) or original(*a))

    def start(**options):
        looked.clear()
        data = QuestionDataset(
            [(tmp_path / "x.h5", tmp_path / "x.json")], tokenizer, skip_bad=True, **options
        )
        found = (data.skipped, data.unread, data.wordings, [data[i]["texts"] for i in range(len(data))])
        return found, len(looked)

    first, second = start(), start()
    assert first == (second[0], 6) and second[1] == 0 and len(first[0][3]) == 5
    assert start(max_length=400)[1] == 6 and start(with_answers=False)[1] == 6
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["IQ_data"][4] = 0
    os.utime(tmp_path / "x.h5", (1, 1))  # another time than before also where times are coarse
    assert len(start()[0][3]) == 4
