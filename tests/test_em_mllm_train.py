"""em_mllm: the scripts as a user starts them. Resume is exact, two processes equal one, launchers and errors
behave."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from common.errors import UserError
from em_mllm.dataset import SignalDataset
from em_mllm.signal_file import SignalFile
from studies.em_mllm import real, rtl433
from studies.recipe import options
from tests import forked
from tests.em_world import tiny_sizes
from tests.parity import assert_same_first_step
from tests.quick_python import python
from tests.test_em_mllm_shards import pack

ROOT = Path(__file__).resolve().parents[1]
EM, STUDY = ROOT / "em_mllm", ROOT / "studies/em_mllm"


def start(*command, cwd=ROOT, processes=1, check=True, **environment):
    """Run a script of em_mllm in processes of its own; several on gloo."""
    done = forked.run_file(*command, cwd=cwd, processes=processes, **environment)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def inside(script, *arguments):
    """Run a script of em_mllm in this process, which saves the seconds of its imports."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(True)
    module = importlib.import_module(".".join(Path(script).relative_to(ROOT).with_suffix("").parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        module.main(module.parse_args())
    AcceleratorState._reset_state(True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a pre-trained encoder and a tiny LLM, made by the scripts themselves."""
    folder = tmp_path_factory.mktemp("em")
    few = ("--train", 4, "--val", 1, "--test", 1, "--points", 256)
    start(EM / "make_data.py", "--out", folder / "data", *few)
    start(STUDY / "make_llm.py", "--out", folder / "llm", "--steps", 2)
    (folder / "config.json").write_text(json.dumps(tiny_sizes(32, points=272, initializer_range=0.1)))
    start(*pretrain(folder, folder / "mae"), "--max-steps", 4, "--val", folder / "data/val")
    return folder


def pretrain(home, out):
    data = ["--data", home / "data/train", "--config", home / "config.json", "--min-points", 64]
    return [
        *(EM / "pretrain.py", *data, "--batch-size", 4),
        *("--spectrum-weight", 0.5, "--log-every", 1, "--out", out),
    ]


def train(home, out, *more):
    data = ["--task-dir", home / "data/train", "--val-dir", home / "data/val"]
    parts = ["--signal-encoder-path", home / "mae/encoder", "--llm-model-path", home / "llm"]
    how = ["--signal-tokens", 2, "--questions-per-signal", 2, "--lr", 1e-3, "--log-every", 1]
    return [EM / "train.py", *data, *parts, *how, "--output-dir", out, *more]


def ask(home):
    return [EM / "test.py", "--task-dir", home / "data/test"]


def logged(out, name):
    """The values of one field of the log, in order."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def losses(out):
    return logged(out, "loss")


def weights(folder):
    return {
        f"{p.relative_to(folder)}:{k}": v
        for p in sorted(folder.rglob("*.safetensors"))
        for k, v in load_file(p).items()
    }


@pytest.mark.slow
def test_pretraining_leaves_an_encoder_metrics_and_pictures(home):
    metrics = json.loads((home / "mae/metrics.json").read_text())
    assert set(metrics["mse_hidden"]) == {"zeros", "nearest", "linear", "model"} and set(
        metrics["mse_spectrum"]
    ) == {"mean of these signals", "model"}
    assert 0.5 < metrics["packing_efficiency"] <= 1
    assert (home / "mae/figures/reconstruction.png").stat().st_size > 5000 and (
        home / "mae/figures/reconstruction.csv"
    ).exists()
    assert all(k.startswith(("sit.", "decoder.")) for k in load_file(home / "mae/encoder/model.safetensors"))


@pytest.mark.parametrize("script", [pretrain, train])
@pytest.mark.slow
def test_two_processes_take_the_first_step_of_one(home, tmp_path, script):
    inside(*script(home, tmp_path / "one"), "--max-steps", 1, "--batch-size", 4)
    start(*script(home, tmp_path / "two"), "--max-steps", 1, "--batch-size", 2, processes=2)
    assert_same_first_step(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("script", [pretrain, train])
@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(home, tmp_path, script):
    """Stopped in mid-epoch after step 3 of 7 and gone on: the same weights as without the stop. The stopped
    pre-training reads the same signals from tar shards."""
    folder = {pretrain: "encoder", train: "model"}[script]
    whole, cut = [*script(home, tmp_path / "whole")], [*script(home, tmp_path / "cut")]
    if script is pretrain:
        pack(SignalDataset(sorted((home / "data/train").glob("*.h5"))), tmp_path / "shards")
        cut += ["--data", tmp_path / "shards" / "{0..2}.tar"]
    more = ["--max-steps", 7, "--batch-size", 8, "--save-every", 3] + (
        ["--use-lora"] if script is train else []
    )  # dropout: random states matter
    start(*whole, *more)
    start(*cut, *more)
    checkpoints = tmp_path / "cut/checkpoints"
    for late in ("step-00000006", "step-00000007"):
        shutil.rmtree(checkpoints / late)
    start(*cut, *more, "--resume")
    a, b = weights(tmp_path / "whole" / folder), weights(tmp_path / "cut" / folder)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune", "multitask", "train"])
def test_gradient_accumulation_equals_the_larger_batch(home, tmp_path, script, monkeypatch):
    """Also where the epoch ends between two steps, and where the micro-batches differ in answer tokens or
    known values. With so small a rate the weights stay, so that rounding errors do not grow from step to
    step."""
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)  # its masks belong to a micro-batch

    def gradients(out, *sizes):
        if script == "train":
            inside(*train(home, out, "--max-steps", 9, "--lr", 1e-9, *sizes))
        else:
            data = home / "data/train" / ("modulation.h5" if script == "finetune" else "radar_jamming.h5")
            sizes = [*sizes, *(["--multitask"] if script == "multitask" else [])]
            files = ["--train", data, "--test", str(data).replace("/train/", "/test/")]
            encoder = ["--signal-encoder-path", home / "mae/encoder"]
            command = [EM / "finetune.py", *files, *encoder, "--out", out]
            # 60 signals: 7 steps of 8, the other 4 begin no step
            inside(*command, "--max-steps", 9, "--lr", 1e-9, "--log-every", 1, *sizes)
        return logged(out, "grad")

    whole, halves = (
        gradients(tmp_path / "a", "--batch-size", 8),
        gradients(tmp_path / "b", "--batch-size", 4, "--accum", 2),
    )
    assert len(whole) == 9
    np.testing.assert_allclose(halves, whole, rtol=1e-4)


@pytest.mark.slow
def test_train_then_test_then_one_recording_then_submission(home, tmp_path):
    inside(*train(home, tmp_path / "run", "--max-steps", 2, "--batch-size", 4, "--freeze-llm"))
    model, data = tmp_path / "run/model", home / "data/test"
    options = ["--wrong-signal", "--calibrate-dir", home / "data/val", "--max-new-tokens", 10]
    done = start(EM / "test.py", "--model", model, "--task-dir", data, "--out", tmp_path / "test", *options)
    assert "four-choice accuracy" in done.stdout
    metrics = json.loads((tmp_path / "test/metrics.json").read_text())
    assert (
        metrics["four_choice"] == 23
        and metrics["open"]["count"] == 23
        and set(metrics["by_task"]) == {"modulation", "radar_jamming"}
    )
    rows = [json.loads(line) for line in (tmp_path / "test/predictions.jsonl").read_text().splitlines()]
    assert metrics["accuracy"] == pytest.approx(
        np.mean([r["pred"] == r["truth"] for r in rows if "truth" in r])
    )
    drawn = {f"{name}.{kind}" for name in ("accuracy_snr", "confusion") for kind in ("png", "csv")}
    assert {p.name for p in (tmp_path / "test/figures").iterdir()} == drawn
    submission = ["--submission", tmp_path / "s.json", "--max-new-tokens", 4]
    with pytest.raises(UserError, match="an id stands twice"):  # both files count from 0
        inside(EM / "test.py", "--model", model, "--task-dir", data, *submission)
    one = ["--task-files", data / "modulation.h5", data / "modulation.json"]
    (tmp_path / "run/test/figures").mkdir(parents=True)
    for old in ("metrics.json", "figures/old.png"):
        (tmp_path / "run/test" / old).write_text("{}")
    done = subprocess.run(
        ["bash", EM / "run_test.sh", *map(str, one + submission)],
        capture_output=True,
        text=True,
        env={**os.environ, "MODEL": str(model), "PYTHON": python(), "NPROC_PER_NODE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "run/test/figures/old.png").exists()  # run_test.sh writes beside the model
    inside(EM / "test.py", "--validate", tmp_path / "s.json", *one)
    assert len(json.loads((tmp_path / "s.json").read_text())["answers"]) == 15
    z = np.exp(2j * np.pi * 0.1 * np.arange(3000)).astype(np.complex64)
    z.tofile(tmp_path / "x.cf32")
    question = ["--question", "Which? (A) FM (B) AM (C) TONE (D) OOK", "--max-new-tokens", 8]
    done = start(EM / "test.py", "--model", model, "--iq", tmp_path / "x.cf32", "--fs", 1e6, *question)
    assert "answer: (" in done.stdout and "3000 samples at 1e+06 Hz" in done.stdout


@pytest.mark.parametrize(
    "command, words",
    [
        (lambda h: train(h, h / "x", "--signal-encoder-path", h / "absent"), "absent"),
        (lambda h: train(h, h / "x", "--llm-model-path", h / "absent"), "absent"),
        (lambda h: train(h, h / "x", "--max-length", 5), "--max-length is 5"),
        (lambda h: train(h, h / "x", "--batch-size", 5000), "--batch-size"),
        (lambda h: [*ask(h), "--model", h / "absent", "--out", h / "y"], "no multimodal.json"),
        (lambda h: [EM / "pretrain.py", "--data", h / "llm", "--out", h / "x"], "holds no .h5"),
    ],
)
def test_user_errors_name_the_fault_before_any_output(home, command, words):
    with pytest.raises(UserError, match=words) as error:
        inside(*command(home))
    assert "\n" not in str(error.value)
    assert not (home / "x").exists() and not (home / "y").exists()


def test_a_user_error_is_one_line_and_exit_status_2(home):
    done = start(*train(home, home / "x", "--max-length", 5), check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and not (home / "x").exists()


@pytest.mark.slow
def test_two_processes_give_the_same_answers_as_one(home, tmp_path):
    inside(*train(home, tmp_path / "run", "--max-steps", 2, "--batch-size", 4, "--freeze-llm"))
    files = [home / "data/test/radar_jamming.h5", home / "data/test/radar_jamming.json"]
    rows = []
    for processes in (1, 2):
        out = tmp_path / f"by-{processes}"
        options = ["--task-files", *files, "--wrong-signal", "--batch-size", 4, "--max-new-tokens", 6]
        options += ["--out", out]
        start(EM / "test.py", "--model", tmp_path / "run/model", *options, processes=processes)
        rows.append([json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()])
    for one, two in zip(*rows, strict=True):
        np.testing.assert_allclose(
            one.pop("scores", 0), two.pop("scores", 0), atol=1e-3
        )  # the batches, and so their padding, differ
        assert one == two


@pytest.mark.parametrize(
    "options, words",
    [
        (["--legacy"], {"legacy": True, "chat": False}),
        (["--chat-template", "--precision", "bf16"], {"legacy": False, "chat": True}),
        (["--dtype", "bfloat16", "--use-lora"], {"dtype": "bfloat16", "llm": "adapter"}),
    ],
)
@pytest.mark.slow
def test_every_kind_of_training_ends_in_a_model_that_answers(home, tmp_path, options, words):
    tokens = [] if "--legacy" in options else ["--signal-tokens", 2]
    parts = ["--signal-encoder-path", home / "mae/encoder", "--llm-model-path", home / "llm", *tokens]
    how = ["--task-dir", home / "data/train", "--max-steps", 2, "--log-every", 1, *options]
    inside(EM / "train.py", *parts, *how, "--output-dir", tmp_path / "run")
    assert all(np.isfinite(losses(tmp_path / "run")))
    assert words.items() <= json.loads((tmp_path / "run/model/multimodal.json").read_text()).items()
    few = ["--limit", 4, "--max-new-tokens", 4, "--out", tmp_path / "test"]
    inside(*ask(home), "--model", tmp_path / "run/model", *few)
    assert json.loads((tmp_path / "test/metrics.json").read_text())["four_choice"] >= 4


@pytest.mark.slow
def test_finetune_joins_classes_of_several_files_and_leaves_a_model_for_training(home, tmp_path):
    def finetune(out, train, test, *more):
        paths = lambda part, names: [home / f"data/{part}/{name}.h5" for name in names]
        files = ["--train", *paths("train", train), "--test", *paths("test", test)]
        how = ["--signal-encoder-path", home / "mae/encoder", "--batch-size", 8, "--steps", 2]
        return [EM / "finetune.py", *files, *how, "--log-every", 1, "--out", out, *more]

    inside(*finetune(tmp_path / "a", ("modulation", "radar_jamming"), ("radar_jamming", "modulation")))
    metrics = json.loads((tmp_path / "a/metrics.json").read_text())
    assert metrics["count"] == 23 and load_file(tmp_path / "a/model/model.safetensors")[
        "classifier.weight"
    ].shape == (23, 32)
    # the last of two wins
    inside(*train(home, tmp_path / "b", "--signal-encoder-path", tmp_path / "a/model", "--max-steps", 1))
    inside(*finetune(tmp_path / "c", ("radar_jamming",), ("radar_jamming",), "--multitask", "--linear-probe"))
    assert {"mae_pri", "mae_isr"} < json.loads((tmp_path / "c/metrics.json").read_text()).keys()
    cnn = ["--encoder", "cnn", "--conjugate", "--phase"]
    command = finetune(tmp_path / "cnn", ("radar_jamming",), ("radar_jamming",), *cnn)
    where = command.index("--signal-encoder-path")
    inside(*command[:where], *command[where + 2 :])
    inside(*train(home, tmp_path / "e", "--signal-encoder-path", tmp_path / "cnn/model", "--max-steps", 1))
    taught = ("--teacher", tmp_path / "c/model", "--noise-db", -5, 5)
    with pytest.raises(UserError, match="beside --multitask"):
        inside(*finetune(tmp_path / "f", ("radar_jamming",), ("radar_jamming",), *taught, "--multitask"))
    with pytest.raises(UserError, match="knows the classes PULSE"):
        inside(*finetune(tmp_path / "f", ("modulation",), ("modulation",), *taught))
    with pytest.raises(UserError, match="class BPSK is not among the training classes"):
        inside(*finetune(tmp_path / "d", ("radar_jamming",), ("modulation",)))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "given, flags",
    [
        ({"TASK_DIR": "data/train", "SIGNAL_ENCODER_PATH": "mae/encoder", "LLM_MODEL_PATH": "llm"}, []),
        (
            {"LLM_MODEL_PATH": "llm"},
            ["--signal-encoder-path=mae/encoder", "--task-files"]
            + [f"data/train/radar_jamming.{suffix}" for suffix in ("h5", "json")],
        ),
    ],
)
@pytest.mark.slow
def test_run_train_launcher_trains_on_what_it_is_given(home, tmp_path, given, flags):
    command = ["bash", str(EM / "run_train.sh"), *flags, "--max-steps", "1", "--log-every", "1"]
    given = {**given, "OUTPUT_DIR": str(tmp_path / "run"), "PYTHON": python(), "NPROC_PER_NODE": "1"}
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env={**os.environ, **given})
    assert done.returncode == 0 and "making" not in done.stdout, done.stderr[-2000:]
    config = json.loads((tmp_path / "run/config.json").read_text())["arguments"]
    assert (config["lr"], config["freeze_llm"]) == (1e-4, False)  # not the settings of the built-in run
    assert bool(config["task_files"]) == bool(flags) and (tmp_path / "run/model/multimodal.json").exists()


ENCODER, LLM, MODEL, TASKS = "--signal-encoder-path", "--llm-model-path", "--model", "--task-dir"


@pytest.mark.parametrize(
    "script, words, added",
    [
        ("run_train.sh", "--task-files a.h5 a.json", {ENCODER, LLM, "--output-dir"}),
        ("run_train.sh", "--task_dir a", {ENCODER, LLM, "--output-dir"}),
        ("run_train.sh", "--task-dir a --trained-dir b", {"--output-dir"}),
        ("run_train.sh", "--task_files a.h5 a.json --trained_dir=b", {"--output-dir"}),
        ("run_test.sh", "", {MODEL, TASKS, "--out"}),
        ("run_test.sh", "--task_files=a.h5", {MODEL, "--out"}),
        ("run_test.sh", "--iq a.wav", {MODEL}),
        ("run_test.sh", "--validate a.json b.jsonl", set()),
    ],
)
def test_a_launcher_adds_what_its_flags_leave_open(script, words, added):
    given = {**os.environ, "PYTHON": "/bin/echo"}
    done = subprocess.run(["bash", EM / script, *words.split()], capture_output=True, text=True, env=given)
    said = done.stdout.split("launch", 1)[1].split()
    assert done.returncode == 0 and {w for w in said if w.startswith("--")} - set(words.split()) == added


@pytest.mark.slow
def test_study_of_real_captures_from_files_to_questions(home, tmp_path):
    """Captures of twelve devices that differ in pulse length: every condition is measured, and questions
    about device, coding, keying."""
    names = [*rtl433.UNSEEN, *(f"device_{i}" for i in range(8))]
    rng = np.random.default_rng(0)
    for part, count in (("train", 36), ("test", 12)):
        y = np.arange(count) % 12
        carrier = 60 * np.exp(0.3j * np.arange(2048))
        pulses = np.stack([np.arange(2048) // (16 * (k + 1)) % 2 for k in y])[..., None] * np.stack(
            [carrier.real, carrier.imag], 1
        )
        turn = slice(
            None, None, 1 if part == "train" else -1
        )  # the test file numbers the classes the other way round
        np.savez(
            tmp_path / f"{part}.npz",
            iq=(127.5 + pulses + rng.normal(0, 2, (count, 2048, 2))).clip(0, 255).astype(np.uint8),
            y=(y if part == "train" else 11 - y).astype(np.int16),
            classes=np.array(names)[turn],
            modulation=np.array(["OOK", "FSK"] * 6)[turn],
            coding=np.array(["PWM", "PPM", ""] * 4)[turn],
            fs=250000,
        )
    captures = [tmp_path / "train.npz", tmp_path / "test.npz"]
    inside(EM / "convert.py", "rtl433", *captures, "--out", tmp_path / "data", "--copies", 2)
    levels = ["clean", *(f"{n}dB" for n in (20, 10, 5, 0, -5, -10))]
    assert {p.name for p in (tmp_path / "data/test").iterdir()} == {
        f"{k}{s}" for k in levels for s in ("", "_shift")
    }
    assert SignalFile(tmp_path / "data/test/clean/device.h5").column("label").tolist() == list(range(12))
    # captures to be asked about, none to learn from
    inside(EM / "convert.py", "rtl433", captures[1], "--out", tmp_path / "alone")
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {"test", "tasks.json"}
    assert SignalFile(tmp_path / "alone/test/clean/device.h5").classes == names[::-1]
    study = ["--captures", *captures, "--data", tmp_path / "data", "--steps", 4, "--seeds", 2]
    encoder = ["--signal-encoder-path", home / "mae/encoder"]
    inside(STUDY / "rtl433.py", *study, *encoder, "--out", tmp_path / "study")
    metrics = json.loads((tmp_path / "study/metrics.json").read_text())
    assert metrics["count"] == 12 and metrics["chance"] == pytest.approx(1 / 12)
    assert metrics["conditions"]["pulse lengths, clean training"]["clean"] > 0.5
    for name, runs in metrics["seeds"].items():
        assert len(runs) == 2 and runs[0] != runs[1]  # two seeds are two trainings
        assert metrics["conditions"][name]["0dB_shift"] == pytest.approx(
            np.mean([r["0dB_shift"] for r in runs])
        )
    assert set(metrics["few_captures"]) == {f"{n}, {k} captures" for n in metrics["seeds"] for k in (1, 3)}
    assert (
        all(0 <= v <= 1 for v in metrics["unseen_devices"].values()) and len(metrics["unseen_devices"]) == 6
    )
    tasks = real.by_name(real.questions(tmp_path / "data/train"), tmp_path / "names")
    encoder = ["--signal-encoder-path", tmp_path / "study/encoder"]
    command = train(home, tmp_path / "run", *encoder, "--task-files", *tasks, "--max-steps", 1)
    where = command.index("--task-dir")
    inside(*command[:where], *command[where + 4 :])  # without --task-dir and --val-dir
    notes = json.loads((tmp_path / "run/model/multimodal.json").read_text())
    assert notes["wordings"] == {"en": "{name}", "zh": "{name}"}  # and so are the options scored


@pytest.mark.slow
@pytest.mark.parametrize("recipe, results", [("first", 0), ("builtin", 5), ("cnn", 4), ("rates", 1)])
def test_recipes_run_from_nothing_at_smoke_size(tmp_path, recipe, results):
    """The stages of the recipe in forks of this test's server; data and runs below tmp_path."""
    pytest.importorskip("rouge_score")
    parts = ("cnn", "smollm2") if recipe == "cnn" else (recipe,)  # the second goes on from the first
    modules = [importlib.import_module(f"studies.em_mllm.{part}") for part in parts]
    base, run = tmp_path / "data", tmp_path / "em_mllm"

    def stage(script, *arguments, threads=None, **flags):
        words = [*arguments, *options(flags)]
        if script.endswith("make_data.py") and "--points" not in words:
            words += ["--points", 256]
        done = forked.run_file(ROOT / script, *words)
        assert done.returncode == 0, f"{script} {words}: {done.stderr[-2000:]}"

    small = {"SMOKE": True, "CORES": 1, "LABEL_STEPS": 2, "LLM_STEPS": 2}
    places = {"BASE": base, "RUN": run, "RUNS": tmp_path, "JOINED": run / "smollm2-0"}
    replaced = {"stage": stage, "size": lambda full, smoke: smoke, "smollm2": lambda: base / "llm"}
    with pytest.MonkeyPatch.context() as patch:
        for module in (*modules, importlib.import_module("studies.em_mllm.joint")):
            for name, value in {**small, **places, **replaced}.items():
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        base.mkdir(exist_ok=True)
        for module in modules:
            module.main()
    assert len(list((run / "results").glob("*.json"))) >= results
    model = {"first": "base", "rates": "joint"}.get(recipe, "seed-0/joint")
    assert (run / model / "model/multimodal.json").is_file()


@pytest.mark.slow
def test_real_captures_are_scored_by_a_model_of_generated_ones(tmp_path, data_root, monkeypatch):
    from studies.em_mllm import transfer

    def stage(script, **flags):
        done = forked.run_file(ROOT / script, *options(flags))
        assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"

    places = {"REAL": data_root, "RUNS": tmp_path, "BASE": tmp_path / "data", "RUN": tmp_path / "run"}
    for name, value in {"stage": stage, "size": lambda full, smoke: smoke, **places}.items():
        monkeypatch.setattr(transfer, name, value)
    transfer.main()
    (row,) = (tmp_path / "em_mllm/results").glob("*.json")
    row = json.loads(row.read_text())
    assert 0 <= row["value"] <= 1 and row["controls"].keys() == {
        "three numbers, logistic regression",
        "largest class",
    }
