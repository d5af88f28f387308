"""em_mllm: no signal of a training set is in validation, calibration or test; scores against closed forms."""

import json
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

import em_mllm.convert
import em_mllm.finetune
import em_mllm.make_data
import em_mllm.train
from common.errors import UserError
from common.tiny_llm import make_tokenizer
from em_mllm.dataset import PackedSignals, QuestionDataset, SignalDataset, SignalFile, task_pairs
from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEForPreTraining
from em_mllm.optim import make_optimizers
from em_mllm.pretrain import measure, signal_files, simple_guesses
from em_mllm.scores import (
    HIGH_SNR_DB,
    accuracy_by,
    at_high_snr,
    calibration_error,
    draw,
    fit_temperature,
    open_scores,
    score,
    wilson,
)
from em_mllm.test import other_signals
from studies.em_mllm import fewshot, rtl433
from tests.em_world import tiny_sizes, write_h5, write_questions


def command(module, *arguments):
    args = module.parse_args([str(a) for a in arguments])
    module.main(args)
    return args


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Built-in data: signals of 128 points, four questions about each training signal."""
    folder = tmp_path_factory.mktemp("splits") / "data"
    few = ("--train", 4, "--val", 2, "--test", 2, "--points", 128, "--seed", 3)
    command(em_mllm.make_data, "--out", folder, *few)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["(A) FM (B) AM the answer is 正确答案"] * 3, 300)


def contents(folder) -> set[bytes]:
    """Every signal of the .h5 files of a folder, as bytes."""
    return {
        file.read(i).tobytes() for file in map(SignalFile, signal_files([folder])) for i in range(len(file))
    }


def assert_disjoint(*parts):
    for k, part in enumerate(parts):
        assert part and all(part.isdisjoint(other) for other in parts[:k])


def test_built_in_parts_share_no_signal(data):
    parts = [contents(data / part) for part in ("train", "val", "test")]
    assert_disjoint(*parts)
    assert [len(part) for part in parts] == [15 * 4 + 8 * 2, 23 * 2, 23 * 2]


def test_radioml_parts_share_no_signal(tmp_path):
    cells = [
        (name, snr, np.random.default_rng(n).standard_normal((10, 64, 2)))
        for n, (name, snr) in enumerate((n, s) for n in ("BPSK", "QPSK") for s in (0, 10))
    ]
    em_mllm.convert.convert_radioml(cells, tmp_path, per_cell=10, fs=1e6, seed=0)
    assert_disjoint(*(contents(tmp_path / part) for part in ("train", "val", "test")))


def test_training_captures_are_not_test_captures(tmp_path, monkeypatch):
    """Every view is replaced by the mean of its capture, which a circular shift leaves as it is."""
    for part, first in (("train", 0), ("test", 12)):
        y = np.arange(12) % 3
        iq = np.full((12, 64, 2), 127, np.uint8) + (first + np.arange(12, dtype=np.uint8))[:, None, None]
        iq[:, ::2] += 1
        names = dict(
            classes=np.array(["a", "b", "c"]), modulation=np.array(["OOK"] * 3), coding=np.array([""] * 3)
        )
        np.savez(tmp_path / f"{part}.npz", iq=iq, y=y, fs=250000, **names)
    monkeypatch.setattr(em_mllm.convert, "disturb", lambda z, *rest: z)
    mean = lambda z, kind: np.full((16, 2), z.mean().real, np.float32)
    monkeypatch.setattr(em_mllm.convert, "view", mean)
    files = [tmp_path / "train.npz", tmp_path / "test.npz"]
    command(em_mllm.convert, "rtl433", *files, "--out", tmp_path / "out", "--copies", 2)
    train, val, test = (contents(tmp_path / "out" / part) for part in ("train", "val", "test"))
    assert_disjoint(train, test)
    assert_disjoint(val, test)
    assert len(train) == len(test) == 12


def shown(subset) -> set[bytes]:
    """What the items of a set of questions show to the model, before any augmentation, as bytes."""
    return {x.tobytes() for i in range(len(subset)) for x in subset[i]["iq"]}


@pytest.mark.slow
@pytest.mark.parametrize("questions_per_signal", [0, 2])
def test_questions_held_out_show_no_training_signal(data, tokenizer, questions_per_signal):
    words = ("--task-dir", data / "train", "--signal-encoder-path", data)
    args = em_mllm.train.parse_args([*map(str, words), f"--questions-per-signal={questions_per_signal}"])
    source, train, val = em_mllm.train.make_data(args, tokenizer)
    assert_disjoint(shown(train), shown(val))
    assert len(val) == len(source) // 10
    # validation is not augmented, training is
    args.roll = True
    _, moved, val_again = em_mllm.train.make_data(args, tokenizer)
    assert shown(val_again) == shown(val) and shown(moved) != shown(train)
    # and a folder for validation is taken as it is, unless it is the training folder
    args.val_dir = data / "val"
    source, train, val = em_mllm.train.make_data(args, tokenizer)
    assert train is source and {f.path.parent for f in val.files} == {data / "val"}
    args.val_dir = data / "train"
    with pytest.raises(UserError, match="--val-dir"):
        em_mllm.train.make_data(args, tokenizer)


def test_of_few_questions_one_is_held_out_and_of_one_signal_none_can_be(tmp_path, tokenizer):
    """A loss over no validation question would be 0."""
    write_h5(tmp_path / "x.h5", np.random.default_rng(0).standard_normal((3, 32, 2)))
    args = em_mllm.train.parse_args(["--task-dir", str(tmp_path), "--signal-encoder-path", str(tmp_path)])
    for rows, sizes in (([0, 1, 2, 0], {(1, 3), (1, 2)}), ([1, 1, 1], None)):
        about = [{"question": "What?", "answer": "FM", "iq_index_in_h5": row} for row in rows]
        write_questions(tmp_path / "x.json", about)
        if sizes:
            _, train, val = em_mllm.train.make_data(args, tokenizer)
            assert (len(val), len(train)) in sizes
        else:
            with pytest.raises(UserError, match="--val-dir is missing"):
                em_mllm.train.make_data(args, tokenizer)


def test_labels_are_learned_from_training_files_alone(data, tmp_path, monkeypatch):
    SiTMAEForPreTraining(SiTMAEConfig(**tiny_sizes())).save_pretrained(tmp_path / "encoder")
    read, phase = {"training": set(), "train": set()}, ["training"]
    plain_read, plain_predict = SignalFile.read, em_mllm.finetune.predict

    def recorded(file, index):
        read.setdefault(phase[0], set()).add(file.path.parent.name)
        return plain_read(file, index)

    def predict(model, signals, scales):
        phase[0] = signals.files[0].path.parent.name
        answers = plain_predict(model, signals, scales)
        phase[0] = "training"
        return answers

    monkeypatch.setattr(SignalFile, "read", recorded)
    monkeypatch.setattr(em_mllm.finetune, "predict", predict)
    files = {part: data / part / "radar_jamming.h5" for part in ("train", "val", "test")}
    options = [word for part, path in files.items() for word in (f"--{part}", path)]
    options += ["--signal-encoder-path", tmp_path / "encoder", "--out", tmp_path / "run", "--eval-every", 1]
    command(em_mllm.finetune, *options, "--max-steps", 4, "--batch-size", 8)
    assert read == {"training": {"train"}, "train": set(), "val": {"val"}, "test": {"test"}}


def test_shots_are_of_every_class_once_and_the_probe_sees_no_test_signal(data, monkeypatch):
    label = np.repeat(np.arange(4), 6)
    rows = fewshot.draw_shots(label, 3, (0, 1))
    assert len(set(rows)) == 12 and np.bincount(label[rows]).tolist() == [3] * 4
    fitted = []
    monkeypatch.setattr(fewshot, "make_encoder", lambda path, seed=None: None)
    bytes_of = lambda _, part, device: np.array([hash(part[i]["iq"].tobytes()) for i in range(len(part))])
    monkeypatch.setattr(fewshot, "embed", bytes_of)

    def probe(x, y, test_x):
        fitted.append((set(x.tolist()), set(test_x.tolist()), y))
        return np.zeros(len(test_x), int)

    monkeypatch.setattr(fewshot, "probe", probe)
    train, test = (
        SignalDataset([data / part / "modulation.h5"], ("label", "snr")) for part in ("train", "test")
    )
    args = SimpleNamespace(methods=["probe"], signal_encoder_path=None, draws=2, seed=0)
    answers = fewshot.compare(args, train, test, [1, 2], "cpu")
    assert len(fitted) == 8
    for x, test_x, y in fitted:
        assert x.isdisjoint(test_x) and len(test_x) == 30 and len(x) == len(y) and len(y) in (15, 30)
    summary = fewshot.summarise(answers, test)
    assert summary["probe, random"][1]["accuracy"] == pytest.approx(1 / 15)


def test_unseen_devices_are_told_apart_on_other_captures_than_shown(monkeypatch):
    names = [*rtl433.UNSEEN, "known_1", "known_2"]
    capture = np.tile(np.arange(18), 3)  # three copies of 18 captures
    label = np.arange(18)[capture] % 6
    train = SimpleNamespace(columns={"label": label}, __len__=lambda: len(label))
    fitted = []

    def fit(path, pretrained, seed, data, rows, *rest):
        assert not np.isin(label[rows], np.arange(4)).any()  # the labels of unseen devices are never learned
        return SimpleNamespace(sit=None)

    monkeypatch.setattr(rtl433, "make_encoder", lambda *a: None)
    monkeypatch.setattr(rtl433, "fit", fit)
    monkeypatch.setattr(rtl433, "embed", lambda encoder, part, device: capture[part.indices])
    monkeypatch.setattr(rtl433, "probe", lambda x, y, t: fitted.append((set(x), set(t))) or np.zeros(len(t)))
    args = SimpleNamespace(signal_encoder_path=None, seed=0, steps=2)
    rtl433.unseen_devices(args, train, names, capture, "cpu", draws=2)
    assert len(fitted) == 12
    for x, t in fitted:
        assert x.isdisjoint(t) and len(x | t) == 12 and len(x) in (4, 8)


def test_the_wrong_signal_has_another_label_of_the_same_task(data, tokenizer):
    questions = QuestionDataset(task_pairs(data / "test"), tokenizer)
    swap = other_signals(questions)
    assert len(swap) == 46
    for row, other in swap.items():
        ours, theirs = (questions.files[questions.file_of[r]] for r in (row, other))
        index, wrong = (questions.records[r]["iq_index_in_h5"] for r in (row, other))
        assert ours.column("label")[index] != theirs.column("label")[wrong] and ours.path == theirs.path


def test_a_wrong_signal_without_a_label_is_another_one(tmp_path, tokenizer):
    write_h5(tmp_path / "x.h5", np.ones((3, 32, 2), "f4"), label=np.full((3, 1), np.nan))
    rows = [{"question": "Which? (A) FM (B) AM", "iq_index_in_h5": i // 4} for i in range(12)]
    write_questions(tmp_path / "x.json", rows)
    questions = QuestionDataset(task_pairs(tmp_path), tokenizer, with_answers=False)
    swap = other_signals(questions)
    assert len(swap) == 12 and all(row // 4 != other // 4 for row, other in swap.items())


def test_a_wrong_signal_is_of_another_class_by_name_not_by_number(tmp_path, tokenizer):
    """Two files of one task count the same classes in another order."""
    for name, classes in (("x", ["FM", "AM"]), ("y", ["AM", "FM"])):
        label = np.array([[0.0], [1.0], [np.nan]])
        write_h5(tmp_path / f"{name}.h5", np.ones((3, 32, 2), "f4"), label=label, classes=json.dumps(classes))
    about = [(f"{name}.h5", row) for name in "xy" for row in range(2)]
    ask = {"question": "Which? (A) FM (B) AM"}
    rows = [{**ask, "h5_path": file, "iq_index_in_h5": row} for file, row in about]
    write_questions(tmp_path / "x.json", rows)
    pairs = [(tmp_path / "x.h5", tmp_path / "x.json")]
    swap = other_signals(QuestionDataset(pairs, tokenizer, with_answers=False))
    name = [("FM", "AM"), ("AM", "FM")]
    names = [name[row // 2][row % 2] for row in range(4)]
    assert len(swap) == 4 and all(names[row] != names[other] for row, other in swap.items())


def test_a_label_that_is_none_is_told_with_its_own_file(tmp_path):
    for name, label in (("a", [[0.0], [1.0]]), ("b", [[0.0], [0.5]]), ("c", [[0.0], [1.0]])):
        write_h5(tmp_path / f"{name}.h5", np.ones((2, 32, 2), "f4"), label=np.array(label))
    files = ("--train", tmp_path / "a.h5", tmp_path / "b.h5", "--test", tmp_path / "c.h5", "--encoder", "cnn")
    files += ("--out", tmp_path / "out")
    with pytest.raises(UserError, match="b.h5: label"):
        em_mllm.finetune.read_data(em_mllm.finetune.parse_args([*map(str, files)]))


def test_accuracy_is_drawn_at_every_snr():
    answer = {"options": {"A": "x", "B": "y"}, "extracted": "A", "pred": "A", "likeliest": "A", "truth": "A"}
    answer |= {"scores": [1.0, 0.0], "task": "t", "class": "x", "answer": "(A) x", "text": "(A)"}
    levels = (40.0, -31.0, 52.5, -0.1, None)
    assert list(score([{**answer, "snr_db": db} for db in levels])["by_snr"]) == ["-35", "-5", "40", "50"]


def test_device_tasks_name_every_class_as_the_questions_do():
    meta = {"classes": ["a", "b"], "coding": np.array(["", "PWM"]), "modulation": np.array(["OOK", ""])}
    names = em_mllm.convert.device_names(meta)
    assert names == {"device": ["a", "b"], "coding": ["none", "PWM"], "keying": ["OOK", "none"]}


# ---- closed forms


@pytest.mark.parametrize("hits, count", [(0, 5), (3, 10), (833, 1000), (7, 7)])
def test_interval_is_wilsons_of_95_percent(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_temperature_is_the_likeliest():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=g)
    truth = torch.distributions.Categorical(logits=logits).sample()
    answers = [
        {"scores": (3 * s).tolist(), "options": dict(zip("ABCD", "wxyz")), "truth": "ABCD"[t]}
        for s, t in zip(logits, truth)
    ]
    cost = lambda t: float(torch.nn.functional.cross_entropy(3 * logits / t, truth))
    best = minimize_scalar(cost, bounds=(0.2, 10), method="bounded").x
    assert fit_temperature(answers) == pytest.approx(best, rel=0.04)  # steps of the grid: 7 %


def test_scores_of_open_answers_ignore_white_space_and_count_words():
    true = {"answer": "BPSK signal at 3 dB", "snr_db": HIGH_SNR_DB}
    same, part = {**true, "text": "BPSK  signal at 3 dB"}, {**true, "text": "BPSK signal"}
    scores = open_scores([same, part])
    assert scores["exact"] == 0.5 and scores["rougeL"] == pytest.approx((1 + 2 * 2 / 7) / 2)
    assert at_high_snr([same, {**part, "snr_db": HIGH_SNR_DB - 1e-3}, {**part, "snr_db": None}]) == [same]


def test_accuracy_of_each_value():
    rows = [{"pred": p, "truth": "A", "task": t} for p, t in (("A", "x"), ("B", "x"), ("A", "y"), ("B", "z"))]
    assert accuracy_by(rows, "task") == {"x": 0.5, "y": 1.0, "z": 0.0}


def test_class_scores_and_regression_errors_of_known_numbers():
    label, snr = np.array([0, 0, 0, 1]), np.array([np.nan, 9.9, 10.0, 20.0])
    scores = em_mllm.finetune.score(label, np.array([0, 1, 0, 0]), snr)
    assert scores == {"accuracy": 0.5, "chance": 0.75, "count": 4, "accuracy_high_snr": 0.5}
    train = SimpleNamespace(columns={"pri": np.array([1.0, 2.0, 30.0, np.nan])})
    test = SimpleNamespace(columns={"pri": np.array([3.0, np.nan, 6.0])})
    errors = em_mllm.finetune.regression_errors({"pri": np.array([4.0, 99.0, 6.0])}, train, test)
    assert errors == {"mae_pri": {"model": 0.5, "training median": 2.5}}


def test_guesses_without_a_model_on_a_ramp():
    """One signal of 5 patches of 4 points, the third hidden: linear interpolation is exact, the nearest patch
    is 4 off."""
    ramp = torch.arange(20.0).reshape(5, 4)
    patches = torch.cat([torch.zeros(1, 8), torch.cat([ramp, -ramp], 1)])[None]
    ids = torch.zeros(1, 6, dtype=torch.int64)
    mask = torch.tensor([[0, 0, 0, 1, 0, 0]])
    errors = {name: float(e[0, 3]) for name, e in simple_guesses(patches, ids, mask, 1).items()}
    assert errors["linear"] == pytest.approx(0, abs=1e-6) and errors["nearest"] == 16
    assert errors["zeros"] == pytest.approx(float((ramp[2] ** 2).mean()))


def test_regression_targets_are_scaled_by_training_signals(data):
    args = SimpleNamespace(multitask=True, train=[data / "train/radar_jamming.h5"])
    with h5py.File(args.train[0]) as file:
        expected = float(np.nanmean(np.abs(file["pri"][:])))
    scales = em_mllm.finetune.regression_scales(
        args, SignalDataset(args.train, em_mllm.finetune.REGRESSION_TASKS)
    )
    assert scales["pri"] == pytest.approx(expected)
    assert em_mllm.finetune.regression_scales(SimpleNamespace(multitask=False), None) == {}


def test_a_regression_of_zeros_keeps_its_unit_and_infinite_values_scale_nothing():
    columns = {name: np.array([np.nan, 0.0]) for name in em_mllm.finetune.REGRESSION_TASKS}
    columns |= {
        "isr": np.array([0.0, 0.0]),
        "pri": np.array([np.inf, -3.0]),
        "pulse_width": np.full(2, np.nan),
    }
    args = SimpleNamespace(multitask=True, train=["x.h5"])
    scales = em_mllm.finetune.regression_scales(args, SimpleNamespace(columns=columns))
    assert (scales["isr"], scales["pri"]) == (1.0, 3.0) and "pulse_width" not in scales
    errors = em_mllm.finetune.regression_errors(
        {"pri": np.array([1.0, 1.0]), "isr": np.array([1.0, 3.0])},
        SimpleNamespace(columns=columns),
        SimpleNamespace(columns={"pri": np.full(2, np.nan), "isr": np.zeros(2)}),
    )
    assert errors == {"mae_isr": {"model": 2.0, "training median": 0.0}}


def test_a_file_whose_signals_are_all_left_out_takes_no_part_in_the_classes(tmp_path):
    def write(name, iq, labels, classes):
        label = np.array(labels, "f4")[:, None]
        return write_h5(tmp_path / name, iq, label=label, classes=json.dumps(classes))

    waves = np.random.default_rng(0).standard_normal((2, 64, 2)).astype("f4")
    good = write("good.h5", waves, [0, 1], ["AM", "FM"])
    bad = write("bad.h5", np.zeros_like(waves), [0, 7], ["PM", "FM"])
    args = em_mllm.finetune.parse_args(
        ["--train", str(bad), str(good), "--test", str(good), "--skip-bad", "--out", "x", "--encoder", "cnn"]
    )
    with pytest.raises(UserError, match="--test"):  # the same file for both
        em_mllm.finetune.read_data(args)
    other = write("other.h5", waves[::-1].copy(), [0, 1], ["FM", "AM"])
    args.test = [other, write("bad too.h5", np.zeros_like(waves), [0, 7], ["PM", "FM"])]
    train, _, test, classes = em_mllm.finetune.read_data(args)
    assert len(train) == len(test) == 2 and train.skipped == {"is all zero": 2}
    assert [classes[int(k)] for k in test.columns["label"]] == ["FM", "AM"]
    with pytest.raises(UserError, match="bad.h5: no usable signal is left of 2"):
        SignalDataset([bad], skip_bad=True)


def test_the_closing_measurement_reads_the_rows_it_uses(data, monkeypatch):
    config = SiTMAEConfig(**tiny_sizes(points=160))
    signals = SignalDataset(signal_files([data / "test"]))
    rows, read = PackedSignals(signals, config, config.num_positions, 0, shuffle=False), []
    take = PackedSignals.__getitem__
    monkeypatch.setattr(PackedSignals, "__getitem__", lambda self, i: (read.append(i), take(self, i))[1])
    measure(SiTMAEForPreTraining(config), rows, batches=2, batch_size=3)
    assert read == list(range(6)) and len(rows) > 6


def test_confusion_matrix_has_the_truth_by_row(tmp_path):
    answers = [
        {"options": {"A": "x", "B": "y"}, "truth": "A", "pred": "B", "class": "x", "snr_db": None},
        {"options": {"A": "x", "B": "y"}, "truth": "B", "pred": "B", "class": "y", "snr_db": None},
    ]
    draw(answers, {"by_snr": {}}, tmp_path)
    assert (tmp_path / "confusion.csv").read_text() == "true,x,y\nx,0,1\ny,0,1\n"


def test_calibration_error_is_of_the_likeliest_option():
    """Two answers of confidence .731, one right: |.5 - .731|; what the generated text says does not count."""
    one = {"options": {"A": "x", "B": "y"}, "scores": [1.0, 0.0], "likeliest": "A", "pred": "B"}
    answers = [{**one, "truth": "A"}, {**one, "truth": "B"}, {**one, "truth": "A"}]
    assert calibration_error(answers, 1.0) == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() - 2 / 3)
    assert calibration_error(answers, 1 / np.log(2)) == pytest.approx(0, abs=1e-6)  # confidence is 2 / 3


def test_vectors_and_embeddings_are_not_decayed_and_muon_takes_the_matrices_of_the_layers():
    parts = {"embeddings": torch.nn.Embedding(4, 3), "layers": torch.nn.ModuleList([torch.nn.Linear(3, 3)])}
    model = torch.nn.ModuleDict({"body": torch.nn.ModuleDict(parts), "head": torch.nn.Linear(3, 2)})
    matrix = parts["layers"][0].weight
    (adamw,) = make_optimizers(model, "adamw", 0.1, 0.5)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.5 if parameter.ndim == 2 and "embed" not in name else 0), name
    adamw, muon = make_optimizers(model, "muon", 0.1, 0.5)
    (group,) = muon.param_groups
    assert group["params"] == [matrix] and group["peak"] == pytest.approx(1.0)
    assert all(p is not matrix for g in adamw.param_groups for p in g["params"])
    with pytest.raises(UserError, match="--optimizer muon has no effect"):
        make_optimizers(model["head"], "muon", 0.1, 0.5)
