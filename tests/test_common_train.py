"""common/train.py and common/arguments.py: what every training loop relies on."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from torch.optim.lr_scheduler import LinearLR
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from common import train
from common.arguments import Parser, add_run_arguments, refuse
from common.checkpoint import atomic_csv, atomic_json, damage
from common.errors import Interrupted, UserError
from common.train import lr_at, parameter_groups
from tests import forked, toy_run
from tests.quick_python import python
from tests.sharded import world

TOY = str(Path(toy_run.__file__))


@pytest.fixture
def toy(tmp_path, capfd):
    """toy("name", "--option", "value") runs the toy script in this process: (run folder, log lines, text)."""

    def call(name, *options):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        out = tmp_path / name
        toy_run.main(toy_run.parse_args(["--out", str(out), *map(str, options)]))
        return out, lines(out), capfd.readouterr().out

    return call


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def near(a, b):
    """Equal to float32 reduction error: the numbers are sums of a few hundred terms of order 1."""
    return math.isclose(a, b, rel_tol=2e-5, abs_tol=1e-6)


# --- accumulation, processes, epochs


def test_accumulated_batches_equal_one_large_batch_though_samples_weigh_differently(toy):
    whole, halves = (
        toy("whole", "--batch-size", 16, "--max-steps", 1)[1][0],
        toy("halves", "--batch-size", 8, "--accum", 2, "--max-steps", 1)[1][0],
    )
    assert near(whole["loss"], halves["loss"]) and near(whole["grad"], halves["grad"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, toy):
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TOY]
    # with this seed the processes' samples weigh 21 and 15: equal weights would hide a mean of their own
    options = ["--batch-size", "4", "--accum", "2", "--max-steps", "1", "--seed", "5"]
    subprocess.run([*torchrun, "--out", str(tmp_path / "two"), *options], check=True, capture_output=True)
    one, two = toy("one", "--batch-size", 16, "--max-steps", 1, "--seed", 5)[1][0], lines(tmp_path / "two")[0]
    assert near(one["loss"], two["loss"]) and near(one["grad"], two["grad"])


def test_an_incomplete_step_at_the_end_of_an_epoch_is_left_out(toy, monkeypatch):
    seen = []
    note = train.check_finite
    monkeypatch.setattr(
        toy_run, "check_finite", lambda run, names, loss: (seen.append(names), note(run, names, loss))
    )
    _, log, _ = toy("a", "--batch-size", 8, "--accum", 3, "--epochs", 3)  # 8 batches an epoch: 2 steps of 3
    assert log[-1]["step"] == 6 and len(seen) == 18
    for epoch in range(3):  # no sample comes twice in an epoch
        names = [name for batch in seen[6 * epoch : 6 * epoch + 6] for name in batch]
        assert len(set(names)) == 48
    assert len({tuple(names) for names in seen}) == 18  # and each epoch has an order of its own


def test_epochs_on_the_command_line_take_the_place_of_a_default_number_of_steps(toy):
    assert toy("a", "--epochs", 0.5)[1][-1]["step"] == 4
    with pytest.raises(UserError, match="--epochs has no effect beside --max-steps"):
        toy("b", "--epochs", 2, "--max-steps", 3)


@pytest.mark.parametrize("options", [("--epochs", 0), ("--max-steps", 0, "--epochs", 0)])
def test_a_run_without_a_step_is_refused(toy, options):
    with pytest.raises(UserError, match="neither --max-steps nor --epochs asks for a step"):
        toy("a", *options)


def test_fewer_samples_than_one_step_are_refused(toy):
    with pytest.raises(UserError, match="64 training samples make 2 batches.*--accum 3"):
        toy("a", "--batch-size", 32, "--accum", 3)


def test_a_count_of_zero_gives_a_share_of_zero_not_nan(toy, monkeypatch):
    monkeypatch.setattr(
        toy_run.Noise,
        "__getitem__",
        lambda self, i: {"x": torch.ones(8), "weight": torch.tensor(0), "name": "n"},
    )
    shares = []
    note = toy_run.batches
    monkeypatch.setattr(
        toy_run, "batches", lambda *a, **k: ((b, shares.append(s) or s) for b, s in note(*a, **k))
    )
    with pytest.raises(UserError, match="loss is nan"):  # 0 / 0 is the toy's own
        toy("a", "--max-steps", 1)
    assert float(shares[0]) == 0.0


class Second:
    """An accelerator that claims to be that of the second process."""

    process_index = 1

    def __init__(self, accelerator):
        self.accelerator = accelerator

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


def test_each_process_draws_dropout_of_its_own(toy, monkeypatch):
    states = {}

    def begin(accelerator, *rest):
        before = torch.get_rng_state()
        second = train.start(Second(accelerator), *rest)
        second.stop.restore()
        second.log.close()
        states[1] = torch.get_rng_state()
        torch.set_rng_state(before)
        run = train.start(accelerator, *rest)
        states[0] = torch.get_rng_state()
        assert torch.equal(states[0], before)  # one process draws as it always did
        return run

    monkeypatch.setattr(toy_run, "start", begin)
    toy("a", "--max-steps", 1, "--seed", 3)
    assert torch.equal(states[1], torch.Generator().manual_seed(4).get_state())


@pytest.mark.slow
def test_dropout_of_two_processes_goes_on_to_the_bit_and_leaves_equal_weights(tmp_path):
    options = ["--batch-size", 4, "--max-steps", 4, "--save-every", 2, "--dropout", 0.5]

    def run(*more):
        done = world(toy_run, ["--out", tmp_path / "two", *options, *more], tmp_path / "log")
        assert done.returncode == 0, done.text
        return [line for line in done.text.splitlines() if line.startswith(("final", "weights"))]

    whole = run()
    assert len(whole) == 3 and len({line for line in whole if line.startswith("weights")}) == 1
    shutil.rmtree(tmp_path / "two/checkpoints/step-00000004")
    assert run("--resume") == whole


# --- finite or refused


@pytest.mark.parametrize("step", [1, 5, 7, 20])
def test_a_loss_that_is_not_finite_is_refused_before_anything_is_saved(toy, tmp_path, step):
    with pytest.raises(UserError, match=f"loss is nan at step {step}; batch: record-"):
        toy("a", "--nan-at", step)
    saved = sorted((tmp_path / "a/checkpoints").glob("step-*")) if step > 5 else []
    assert [int(p.name[5:]) for p in saved] == [s for s in (5, 10, 15) if s < step]
    assert not any(damage(p) for p in saved)


def test_a_gradient_that_is_not_finite_is_told_with_the_samples_of_its_step(toy, monkeypatch):
    note = toy_run.update

    def spoil(run, model, *rest):
        if run.state["step"] == 2:
            next(model.parameters()).grad.fill_(torch.inf)
        return note(run, model, *rest)

    monkeypatch.setattr(toy_run, "update", spoil)
    four = "; batch: " + ", ".join([r"record-\d+"] * 4) + "; no checkpoint"
    with pytest.raises(UserError, match=f"gradient norm is (nan|inf) at step 3{four}"):
        toy("a", "--batch-size", 2, "--accum", 2)


def test_the_time_of_an_evaluation_is_not_that_of_training(toy, monkeypatch):
    now, note = [0.0], toy_run.update

    def spend(seconds, result=None):
        now[0] += seconds
        return result

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(toy_run, "update", lambda *a: spend(1, note(*a)))
    monkeypatch.setattr(toy_run, "watched", lambda run, loader: spend(100, loader))
    _, log, _ = toy("a", "--max-steps", 5, "--eval-every", 2)
    assert [line["samples_per_s"] for line in log[1:]] == [8.0] * 4 and "odd" in log[1] and "odd" in log[3]


def test_weights_that_are_not_finite_are_never_saved(toy, tmp_path):
    with pytest.raises(UserError, match="weights are not finite after step 20.*step-00000015"):
        toy("a", "--wild-at", 20)
    assert (tmp_path / "a/last").resolve().name == "step-00000015"


def test_fp16_that_leaves_out_every_step_is_told_and_none_on_a_cpu(toy, monkeypatch):
    with pytest.raises(UserError, match="fp16 has no effect on a CPU"):
        toy("a", "--precision", "fp16")
    begin = toy_run.start

    def start(accelerator, *rest):
        run = begin(accelerator, *rest)
        accelerator.scaler = SimpleNamespace(scale=lambda loss: loss, get_scale=lambda: 0.5)
        return run

    monkeypatch.setattr(toy_run, "start", start)
    with pytest.raises(UserError, match="fp16 gradients are not finite at the scale 0.5"):
        toy("a")


def test_weights_that_are_not_finite_are_never_evaluated(toy, monkeypatch):
    # an evaluation may write the model, as the best so far
    monkeypatch.setattr(toy_run, "watched", lambda run, loader: pytest.fail("was evaluated"))
    with pytest.raises(UserError, match="weights are not finite after step 3"):
        toy("a", "--wild-at", 3, "--eval-every", 3)


class Elsewhere:
    """An accelerator that claims to be on a GPU, where nothing is looked at step by step."""

    def __init__(self, accelerator):
        self.accelerator, self.device = accelerator, torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_on_a_gpu_the_losses_are_looked_at_before_a_save_and_the_right_batch_is_named(
    toy, tmp_path, monkeypatch, bad
):
    def elsewhere(run, names, loss):
        run.accelerator = Elsewhere(run.accelerator)
        if run.state["step"] == 2:
            loss = loss * torch.nan if bad == "loss" else loss
            if bad == "gradient":
                run.unread.append((3, "gradient norm", ["culprit"], torch.tensor(torch.inf)))
                names = ["innocent"]
            else:
                names = ["culprit"]
        train.check_finite(run, names, loss)
        run.accelerator = run.accelerator.accelerator

    monkeypatch.setattr(toy_run, "check_finite", elsewhere)
    monkeypatch.setattr(
        train, "_look_at_weights", lambda run: pytest.fail("saved before the losses were looked at")
    )
    monkeypatch.setattr(toy_run, "update", lambda run, *a: run.state.update(step=run.state["step"] + 1))
    what = "loss is nan" if bad == "loss" else "gradient norm is inf"
    with pytest.raises(UserError, match=f"{what} at step 3; batch: culprit; no checkpoint was saved yet"):
        toy("a", "--log-every", 50, "--save-every", 4)


def test_clip_0_leaves_the_gradient_as_it_is(toy):
    def final(name, clip):
        text = toy(name, "--clip", clip, "--max-steps", 2)[2]
        return next(line for line in text.splitlines() if line.startswith("final"))

    assert final("none", 0) == final("large", 1e9) != final("small", 1e-3)


def test_losses_are_logged_as_means_over_the_whole_step(toy):
    _, one, _ = toy("a", "--batch-size", 8, "--max-steps", 1)
    _, two, _ = toy("b", "--batch-size", 4, "--accum", 2, "--max-steps", 1)
    assert near(one[0]["loss"], two[0]["loss"])
    _, still, _ = toy("c", "--batch-size", 64, "--max-steps", 3, "--lr", 0)  # all samples in each step
    assert near(still[0]["loss"], still[2]["loss"])


# --- resume, evaluation, stop


def test_resume_takes_this_command_lines_rate_and_decay(toy):
    toy("a", "--max-steps", 5)
    out, log, text = toy("a", "--max-steps", 6, "--resume", "--lr", 0.5)
    assert log[-1]["lr"] == 0.5 and log[4]["lr"] == pytest.approx(1e-2) and "resuming with lr = 0.5" in text


def test_resume_of_a_run_without_a_checkpoint_says_so(toy):
    with pytest.raises(UserError):
        toy("a", "--nan-at", 2)
    _, log, text = toy("a", "--resume", "--max-steps", 1)
    assert "holds no whole checkpoint yet: starting at step 0" in text and len(log) == 1


def test_evaluations_fall_on_their_steps_and_not_on_the_last(toy):
    _, log, _ = toy("a", "--eval-every", 5, "--log-every", 100)
    assert [line["step"] for line in log if "odd" in line] == [5, 10, 15]


@pytest.mark.parametrize(
    "where", ["with a save", "without a save", "in the last step", "in a save", "in the last save"]
)
def test_a_stop_is_honoured_in_the_step_it_comes_in(toy, tmp_path, monkeypatch, where):
    step = 8 if where == "without a save" else 20 if "last" in where else 10
    name = "save_step" if "in" in where and "save" in where else "update"
    module = train if name == "save_step" else toy_run
    note = getattr(module, name)

    def stopped_within(first, *rest):
        result = note(first, *rest)
        state = first.state if name == "update" else rest[1]
        if state["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(module, name, stopped_within)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"step-{step:08d}.*--resume") as stopped:
        toy("a")
    signal.signal(signal.SIGTERM, before)
    assert (
        stopped.value.signum == signal.SIGTERM and (tmp_path / "a/last").resolve().name == f"step-{step:08d}"
    )


@pytest.mark.slow
def test_a_stop_after_the_last_step_ends_the_closing_evaluation_at_once(tmp_path):
    process = subprocess.Popen(
        [python(), TOY, "--out", str(tmp_path / "a"), "--max-steps", "2", "--pause-at-end", "600"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + forked.PATIENCE
    while not (tmp_path / "a/last").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    _, error = process.communicate(timeout=forked.PATIENCE)
    assert process.returncode == 143 and "step-00000002" in error and "--resume" in error


def test_signals_go_back_to_their_owner_after_a_run(toy):
    before = signal.getsignal(signal.SIGTERM)
    toy("a", "--max-steps", 1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_profile_writes_a_trace_of_its_steps(toy):
    with pytest.raises(UserError, match="--profile 5:6: the last step is 4"):
        toy("b", "--profile", "5:6", "--max-steps", 5)
    out, _, text = toy("a", "--profile", "2:4", "--max-steps", 5)
    trace = json.loads((out / "profile-rank0.json").read_text())
    assert trace["traceEvents"] and "steps 2 to 3" in text


# --- schedules and groups


@pytest.fixture
def tracker(monkeypatch):
    """Stands for the package of wandb: an accelerate tracker that notes what it is told."""
    told = []

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, True

        def __init__(self, project, **options):
            super().__init__()
            if project == "refused":
                raise RuntimeError("no account\nlog in first")
            told.append(("project", project, options["name"]))

        tracker = property(lambda self: told)

        def store_init_configuration(self, values):
            told.append(("arguments", values["max_steps"]))

        def log(self, values, step):
            told.append(("log", step, values["loss"]))

        def finish(self):
            told.append(("finished",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    return told


def test_a_tracker_is_told_what_the_log_holds(toy, tracker, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/cwt_mae/train.py"])
    _, log, _ = toy("a", "--log-with", "wandb", "--max-steps", 2)
    assert tracker[:2] == [("project", "cwt_mae", "a"), ("arguments", "2")] and tracker[-1] == ("finished",)
    assert tracker[2:-1] == [("log", line["step"], line["loss"]) for line in log]
    monkeypatch.setattr(sys, "argv", ["refused/train.py"])
    with pytest.raises(UserError, match="^--log-with wandb: no account$"):
        toy("b", "--log-with", "wandb")


@pytest.mark.parametrize("name, said", [("mlflow", "not installed; bring it"), ("paper", "none of aim, ")])
def test_a_tracker_that_is_not_there_is_one_line(tracker, capsys, name, said):
    with pytest.raises(SystemExit):
        toy_run.parse_args(["--out", "x", "--log-with", name])
    assert said in capsys.readouterr().err


def test_schedules_equal_those_of_transformers():
    parameter = torch.nn.Parameter(torch.zeros(1))
    for name, other in (
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([parameter], 1.0)
        scheduler = other(optimizer, 7, 50)
        for step in range(50):
            assert lr_at(step, 50, 7, name, ramp="zero") == pytest.approx(
                scheduler.get_last_lr()[0], abs=1e-9
            )
            optimizer.step()
            scheduler.step()


def test_mmengine_ramp_equals_a_linear_ramp_that_ends_inside_the_warm_up():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    scheduler = LinearLR(optimizer, 1e-5, 1.0, total_iters=9)
    for step in range(10):
        assert lr_at(step, 100, 10, ramp="mmengine") == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_warm_up_is_a_fraction_below_one_and_a_number_of_steps_from_one_on():
    assert (
        [lr_at(s, 40, 0.1) for s in range(4)] == [lr_at(s, 40, 4) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    )
    assert lr_at(0, 40, 0) == 1.0 and lr_at(0, 40, 1) == 1.0


def test_schedules_fall_from_one_to_their_floor():
    for schedule in ("cosine", "linear"):
        assert lr_at(10, 100, 0.1, schedule, floor=0.2) == pytest.approx(1.0)
        assert lr_at(55, 100, 0.1, schedule, floor=0.2) == pytest.approx(0.6)
        assert lr_at(100, 100, 0.1, schedule, floor=0.2) == pytest.approx(0.2)
        assert lr_at(55, 100, 10, schedule) == pytest.approx(0.5)
    assert lr_at(99, 100, 0.1, "constant", floor=0.2) == 1.0


def test_every_trained_parameter_is_in_one_group_and_vectors_do_not_decay():
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(3, 4), "layer": torch.nn.Linear(4, 4), "off": torch.nn.Linear(2, 2)}
    )
    model["off"].requires_grad_(False)
    decayed, free = parameter_groups(model, 0.1, 0.5)
    assert (
        decayed["params"] == [model["layer"].weight]
        and decayed["weight_decay"] == 0.5
        and decayed["peak"] == 0.1
    )
    assert {id(p) for p in free["params"]} == {id(model["embed"].weight), id(model["layer"].bias)}
    assert free["weight_decay"] == 0.0


# --- the command line


def parse(*words, omit=(), **defaults):
    parser = Parser("A script.", prog="script.py")
    add_run_arguments(parser, omit=omit, **defaults)
    return parser.parse_args(["--out", "x", *words])


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--learning_rate=3e-4"], "lr", 3e-4),
        (["--learning-rate", "3e-4"], "lr", 3e-4),
        (["--per_device_train_batch_size", "5"], "batch_size", 5),
        (["--gradient_accumulation_steps", "5"], "accum", 5),
        (["--num-train-epochs", "0.5"], "epochs", 0.5),
        (["--warmup_steps", "7"], "warmup", 7),
        (["--max_grad_norm", "0.5"], "clip", 0.5),
        (["--mixed_precision", "bf16"], "precision", "bf16"),
        (["--save_total_limit", "9"], "keep", 9),
        (["--output_dir", "y"], "out", Path("y")),
        (["--dataloader_num_workers", "2"], "workers", 2),
    ],
)
def test_upstreams_names_mean_ours(words, name, value):
    args = parse(*words)
    assert getattr(args, name) == value and name in args._given


def test_only_what_stands_on_the_command_line_counts_as_given():
    args = parse("--lr=0.1", "--resume", epochs=4.0)
    assert args._given == {"out", "lr", "resume"} and args.epochs == 4.0
    refuse(args, ["eval_every", "epochs"], "here")
    with pytest.raises(UserError, match="--lr has no effect without --val; leave it out"):
        refuse(args, ["lr"], "without --val")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--accum", "0"], "--gradient-accumulation-steps: 0 must be at least 1"),
        (["--lr", "nan"], "nan is not finite"),
        (["--lr=-1e-3"], "must be at least 0"),
        (["--lr", "inf"], "inf is not finite"),
        (["--epochs", "1e999"], "1e999 is not finite"),
        (["--epochs", "many"], "invalid number value: 'many'"),
        (["--batch-size", "1.5"], "invalid whole number value: '1.5'"),
        (["--profile", "9:3"], "is not of the form A:B"),
        (["--precision", "fp8"], "invalid choice"),
        (["--learning-rat", "1"], "unrecognized arguments: --learning-rat"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        parse(*words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and said in error


def test_help_shows_the_defaults_that_say_something(capsys):
    with pytest.raises(SystemExit):
        parse("--help", lr=0.125, weight_decay=0.0)
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "peak learning rate (default: 0.125)" in text
        and "weight decay of AdamW (default: 0.0)" in text
        and "default: None" not in text
        and "default: False" not in text
    )


# --- what is written


def test_json_holds_no_nan_and_csv_every_row(tmp_path):
    atomic_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, 1.5, {"c": -math.inf}], "文": "字"})
    assert json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5, {"c": None}],
        "文": "字",
    }
    atomic_csv(tmp_path / "a.csv", [{"name": 'a "b", c', "value": 1}, {"name": "d", "value": 2}])
    assert (tmp_path / "a.csv").read_text() == 'name,value\n"a ""b"", c",1\nd,2\n'
    with pytest.raises(ValueError):
        atomic_csv(tmp_path / "a.csv", [{"name": 1}, {"other": 2}])
    assert (tmp_path / "a.csv").read_text().endswith("d,2\n")
