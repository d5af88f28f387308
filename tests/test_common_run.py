"""What must survive: interruption, kill -9, a full disk, a damaged checkpoint, a second process, several
processes.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from common import launch
from common.checkpoint import atomic_dir, atomic_json, damage, link
from common.errors import UserError
from common.run import StopSignal, loader_worker, seed_everything
from tests import forked, toy_run
from tests.forked import Done
from tests.parity import assert_same_first_step
from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]
TOY = str(ROOT / "tests/toy_run.py")


def forked_toy(out, *options, output="forked.log", limit=None):
    """Start toy_run.py's main in a fork. output: file beside `out` that takes stdout and stderr."""
    return forked.start(toy_run, ["--out", out, *options], out.parent / output, limit)


def toy(out, *options, processes=1, check=True, limit=None, **environment):
    """Run toy_run.py to its end: in a fork, or for several processes by the launcher; returns status and
    all output.
    """
    if processes == 1 and not environment:
        code = forked.finish(forked_toy(out, *options, output="toy.log", limit=limit))
        done = Done(code, (out.parent / "toy.log").read_text())
        (out.parent / "toy.log").unlink()
    else:
        command = [python(), "-m", "common.launch", TOY, "--out", str(out), *options]
        ended = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "NPROC_PER_NODE": str(processes), **environment},
        )
        done = Done(ended.returncode, ended.stdout)
    if check:
        assert done.returncode == 0, done.text
    return done


def final(done):
    return next(line for line in done.text.splitlines() if line.startswith("final"))


def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(processes) -> (output, run folder) of one whole run with 8 samples in each step."""
    runs = {}

    def whole(processes):
        if processes not in runs:
            out = tmp_path_factory.mktemp("whole") / "run"
            runs[processes] = toy(out, "--batch-size", str(8 // processes), processes=processes), out
        return runs[processes]

    return whole


def test_run_directory_describes_the_run(tmp_path):
    toy(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["arguments"]["max_steps"] == 20 and config["processes"] == 1 and config["versions"]["torch"]
    assert len(losses(tmp_path / "a")) == 20 and list((tmp_path / "a/tb").iterdir())
    assert sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000015",
        "step-00000020",
    ]
    assert (tmp_path / "a/last").resolve().name == "step-00000020"
    plain = (
        (tmp_path / "a/log.jsonl").stat().st_mode
    )  # as the user's umask has it; safetensors makes private files
    assert {p.stat().st_mode for p in (tmp_path / "a/last").resolve().iterdir()} == {plain}


@pytest.mark.slow
@pytest.mark.parametrize("processes, signum", [(1, signal.SIGTERM), (2, signal.SIGINT), (2, signal.SIGUSR1)])
def test_stopped_run_says_how_to_resume_and_ends_bit_equal(tmp_path, uninterrupted, signum, processes):
    whole, folder = uninterrupted(processes)
    size = str(8 // processes)
    options = ["--out", str(tmp_path / "cut"), "--workers", "2", "--batch-size", size, "--pause", ".5"]
    process = subprocess.Popen(
        [python(), "-m", "common.launch", TOY, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "NPROC_PER_NODE": str(processes)},
    )
    while process.poll() is None and not (
        (tmp_path / "cut/log.jsonl").exists() and len(losses(tmp_path / "cut")) >= 3
    ):
        time.sleep(0.05)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=forked.PATIENCE)
    assert process.returncode == 128 + signum, text
    assert "--resume" in text and "Traceback" not in text
    assert f"{signal.Signals(signum).name}: saving after this step" in text  # and not a launcher's SIGTERM
    resumed = toy(tmp_path / "cut", "--workers", "2", "--batch-size", size, "--resume", processes=processes)
    assert final(resumed) == final(whole)
    assert losses(tmp_path / "cut") == losses(folder)


def test_a_signal_to_one_process_stops_all_in_the_same_step(monkeypatch):
    asked = torch.tensor([int(signal.SIGTERM)])  # of another process
    monkeypatch.setattr("common.run.group", lambda: "all")
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda own, most, group: own.copy_(own.maximum(asked))
    )
    stop = StopSignal(SimpleNamespace(num_processes=2, is_main_process=True))
    try:
        assert stop() and stop.signum == signal.SIGTERM
        asked.zero_()
        assert stop(), "what was asked once is not forgotten"
    finally:
        stop.restore()


@pytest.mark.slow
def test_one_of_two_processes_killed_ends_both_and_the_run_goes_on(tmp_path, uninterrupted):
    whole, folder = uninterrupted(2)
    options = ["--out", str(tmp_path / "cut"), "--batch-size", "4", "--pause", ".5"]
    launcher = subprocess.Popen(
        [python(), "-m", "common.launch", TOY, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "NPROC_PER_NODE": "2"},
    )
    while launcher.poll() is None and not (
        (tmp_path / "cut/log.jsonl").exists() and len(losses(tmp_path / "cut")) >= 6
    ):
        time.sleep(0.05)
    words = {p: p.info["cmdline"] or () for p in psutil.process_iter(["cmdline"])}
    ranks = [
        p for p in words if {TOY, str(tmp_path / "cut")} <= {*words[p]} and "common.launch" not in words[p]
    ]
    assert len(ranks) == 2
    ranks[1].kill()
    launcher.communicate(timeout=forked.PATIENCE)
    assert launcher.returncode not in (0, 2) and not any(
        p.is_running() and p.status() != "zombie" for p in ranks
    )
    assert not damage(tmp_path / "cut/checkpoints/step-00000005")
    resumed = toy(tmp_path / "cut", "--batch-size", "4", "--resume", processes=2)
    assert final(resumed) == final(whole) and losses(tmp_path / "cut") == losses(folder)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_goes_on(tmp_path, uninterrupted):
    """MAX_RESTARTS with --resume auto: one command for the start and for what comes after a fault."""
    whole, folder = uninterrupted(2)
    options = ["--batch-size", "4", "--resume", "auto", "--die-at", "8"]
    done = toy(tmp_path / "cut", *options, processes=2, MAX_RESTARTS="1")
    assert "resumed from" in done.text and final(done) == final(whole)
    assert losses(tmp_path / "cut") == losses(folder)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    # 4 MB to save every 5 steps: about half of the time goes into saving
    options = ["--width", "20000", "--max-steps", "200"]
    whole, out, chance, in_save = tmp_path / "whole", tmp_path / "cut", random.Random(0), 0
    assert forked.finish(forked_toy(whole, *options)) == 0
    for kill in range(20):
        before = max((p.name for p in out.glob("checkpoints/step-*")), default="")
        known = (out / "log.jsonl").stat().st_size if kill else 0
        process = forked_toy(out, *options, *(["--resume"] if kill else []))
        # a few steps beyond the last kill: twenty of them do not reach the end on any machine
        further = known + (chance.randrange(300) if kill else 0)
        while not (out / "log.jsonl").exists() or (out / "log.jsonl").stat().st_size <= further:
            assert process.is_alive(), (tmp_path / "forked.log").read_text()
            time.sleep(0.002)
        if kill % 2:  # in a save, whatever share of the time this machine spends in them
            while process.is_alive() and not list(out.glob("checkpoints/.saving-*")):
                time.sleep(0.001)
        else:
            time.sleep(0.01 * chance.random())
        process.kill()
        assert forked.finish(process) == -signal.SIGKILL
        in_save += bool(list(out.glob("checkpoints/.saving-*")))
        after = max((p.name for p in out.glob("checkpoints/step-*")), default="")
        assert after >= before  # a finished checkpoint is never lost
        assert not after or not damage(out / "checkpoints" / after)
    code = forked.finish(forked_toy(out, *options, "--resume"))
    assert code == 0, (tmp_path / "forked.log").read_text()
    assert in_save and "Traceback" not in (tmp_path / "forked.log").read_text()
    assert losses(out) == losses(whole) and len(losses(out)) == 200
    last = [torch.load(run / "last/optimizer.bin", weights_only=True)["state"] for run in (whole, out)]
    assert all(torch.equal(last[0][i][k], last[1][i][k]) for i in last[0] for k in ("exp_avg", "exp_avg_sq"))
    assert (out / "last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()


@pytest.mark.slow
def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    toy(tmp_path / "a", "--max-steps", "10")
    full = toy(tmp_path / "b", "--width", "1000", limit=20_000, check=False)
    assert full.returncode == 2 and "Traceback" not in full.text
    assert "step-00000005" in full.text and "last good checkpoint: none" in full.text
    assert not list((tmp_path / "b/checkpoints").iterdir())
    again = toy(tmp_path / "a", "--resume", limit=3_000, check=False)
    assert again.returncode == 2 and "step-00000010" in again.text.split("last good checkpoint")[1]
    assert final(toy(tmp_path / "a", "--resume")) == final(toy(tmp_path / "c"))


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "state"])
def test_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, harm):
    whole, _ = toy(tmp_path / "whole"), toy(tmp_path / "a", "--max-steps", "15")
    weights = tmp_path / "a/checkpoints/step-00000015/model.safetensors"
    data = bytearray(weights.read_bytes())
    if harm == "cut":
        weights.write_bytes(data[:-7])
    elif harm == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif harm == "remove":
        weights.unlink()
    else:
        (weights.parent / "state.json").write_text("{")
    resumed = toy(tmp_path / "a", "--resume")
    assert "step-00000015" in resumed.text and "trying the checkpoint before it" in resumed.text
    assert final(resumed) == final(whole)


def test_the_best_checkpoint_stays_when_old_ones_go(tmp_path):
    toy(tmp_path / "a", "--max-steps", "5")
    (tmp_path / "a/last").unlink()  # of a run that was copied with its links followed
    shutil.copytree(tmp_path / "a/checkpoints/step-00000005", tmp_path / "a/last")
    link(tmp_path / "a", "best", tmp_path / "a/checkpoints/step-00000005")
    toy(tmp_path / "a", "--keep", "1", "--resume")
    kept = sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000020"]


def test_a_damaged_later_checkpoint_takes_no_place_and_a_copy_is_its_owner_s(tmp_path):
    steps = tmp_path / "a/checkpoints"
    toy(tmp_path / "a", "--max-steps", "15")
    shutil.copytree(steps / "step-00000005", steps / "step-00000005.mine")
    for step in (10, 15):
        (steps / f"step-000000{step}" / "state.json").unlink()
    toy(tmp_path / "a", "--max-steps", "10", "--keep", "1", "--resume")
    assert not damage(steps / "step-00000010") and (tmp_path / "a/last").resolve().name == "step-00000010"
    toy(tmp_path / "a", "--keep", "1", "--resume")
    assert sorted(p.name for p in steps.iterdir()) == ["step-00000005.mine", "step-00000020"]


def test_a_log_that_a_power_cut_has_spoilt_goes_on(tmp_path):
    toy(tmp_path / "a", "--max-steps", "5")
    with open(tmp_path / "a/log.jsonl", "ab") as log:
        log.write(b'\0\0\0}\n3}\n{"loss": 1.0}\n\xff}\n{"step": 6, "lo')
    toy(tmp_path / "a", "--max-steps", "7", "--resume")
    assert len(losses(tmp_path / "a")) == 7


def test_an_error_of_a_loader_s_worker_is_its_own_line(tmp_path):
    try:
        raise UserError("x.h5: row 5 holds nan; drop it")
    except UserError:
        wrapped = torch._utils.ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError, match="^x.h5: row 5 holds nan; drop it$"):
        wrapped.reraise()


def outlive_a_worker():
    stop = StopSignal(SimpleNamespace(num_processes=1, is_main_process=False))
    batches = iter(DataLoader(range(8), num_workers=1, worker_init_fn=loader_worker))
    next(batches)
    try:
        for pid in (os.getpid(), batches._workers[0].pid):
            os.kill(pid, signal.SIGTERM)  # a scheduler's, to the whole process group
        time.sleep(0.2)
        assert batches._workers[0].is_alive() and next(batches) == 1
        os.kill(batches._workers[0].pid, signal.SIGKILL)  # its time is over, the save is not
        time.sleep(0.5)
    finally:
        del batches
        stop.restore()
    assert stop()


def test_a_worker_that_ends_within_the_last_save_takes_nothing_with_it():
    forked.check(outlive_a_worker)


def test_names_that_are_no_text_are_shown_and_kept(tmp_path):
    out = tmp_path / os.fsdecode(b"run \xff")
    done = toy(out, check=False)
    assert done.returncode == 2 and "run \\udcff: is no name in UTF-8" in done.text and not out.exists()
    atomic_json(tmp_path / "config.json", {"data": str(out)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"data": str(out)}


def test_equal_seeds_give_equal_draws_and_ranks_differ():
    def draws(seed, rank):
        seed_everything(seed, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first, again, other_rank, other_seed = draws(3, 0), draws(3, 0), draws(3, 1), draws(5, 0)
    assert first == again
    for one, rank, seed in zip(first, other_rank, other_seed):  # Python, numpy, torch
        assert len({one, rank, seed}) == 3


@pytest.mark.slow
def test_second_process_on_the_same_run_is_refused(tmp_path):
    first = forked_toy(tmp_path / "a", "--pause", "60")
    while not (tmp_path / "a/config.json").exists():
        assert first.is_alive()
        time.sleep(0.05)
    second = toy(tmp_path / "a", "--resume", check=False)
    first.kill()
    forked.finish(first)
    assert second.returncode == 2 and f"in use by process {first.pid}" in second.text


def test_used_or_foreign_folder_is_refused_and_left_alone(tmp_path):
    toy(tmp_path / "a", "--max-steps", "5")
    assert "--overwrite" in toy(tmp_path / "a", check=False).text
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for options in ([], ["--overwrite"], ["--resume"]):
        done = toy(tmp_path / "mine", *options, check=False)
        assert done.returncode == 2 and "thesis.txt" in done.text
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    # what a killed export left, and what belongs to the model of before
    (tmp_path / "a/.model.77.tmp").mkdir()
    for name in (".model.safetensors.77.tmp.safetensors", "calibration.json", "notes.txt"):
        (tmp_path / "a" / name).touch()
    toy(tmp_path / "a", "--overwrite", "--max-steps", "7")
    assert len(losses(tmp_path / "a")) == 7
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert "notes.txt" in left and not [name for name in left if "tmp" in name or "calib" in name]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/.config.json.7.tmp.json").touch()  # by a kill in the first write
    toy(tmp_path / "killed", "--max-steps", "5")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_nan_loss_names_step_batch_and_last_good_checkpoint(tmp_path, processes):
    done = toy(
        tmp_path / "a", "--nan-at", "8", "--batch-size", str(8 // processes), processes=processes, check=False
    )
    assert done.returncode == 2, done.text
    line = next(line for line in done.text.splitlines() if "loss is nan" in line)
    assert "step 8" in line and "record-" in line and "step-00000005" in line and "Traceback" not in done.text


def print_names():
    """In the fork: each batch's names are printed where the loop takes note of its loss."""
    note = toy_run.check_finite

    def check_finite(run, names, loss):
        print("names", *names)
        note(run, names, loss)

    toy_run.check_finite = check_finite


@pytest.mark.slow
def test_two_processes_share_out_an_epoch_without_overlap(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    line = ["--out", tmp_path / "a", "--batch-size", "4", "--epochs", "1"]
    logs, started = [tmp_path / "0.txt", tmp_path / "1.txt"], []
    for rank, log in enumerate(logs):
        place = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(forked.start(toy_run, line, log, before=print_names, environment=place))
    assert [forked.finish(process) for process in started] == [0, 0], logs[0].read_text()
    lines = [line.split()[1:] for log in logs for line in log.read_text().splitlines() if "names" in line]
    names = [name for line in lines for name in line]
    assert len(lines) == 16 and sorted(names) == sorted(f"record-{i}" for i in range(64))


@pytest.mark.slow
def test_two_processes_take_the_first_step_of_one(tmp_path):
    toy(tmp_path / "one", "--batch-size", "8", "--max-steps", "1")
    toy(tmp_path / "two", "--batch-size", "4", "--max-steps", "1", processes=2)
    assert_same_first_step(tmp_path / "one", tmp_path / "two")


def test_a_folder_takes_the_place_of_a_link_and_not_of_what_it_points_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "model").symlink_to("mine")
    with atomic_dir(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["new"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "model"] and not any(
        (tmp_path / "mine").iterdir()
    )


@pytest.mark.parametrize(
    "name, value, script",
    [
        *[("NPROC_PER_NODE", value, TOY) for value in ("two", "0", "-1", "1.5")],
        *[(name, "x", TOY) for name in ("NNODES", "NODE_RANK", "MASTER_PORT", "MAX_RESTARTS")],
        ("NODE_RANK", "1", TOY),
        ("HOME", "/", "nosuch.py"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line(monkeypatch, name, value, script):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name}={value}: must be" if script == TOY else "no such script"):
        launch.main(script)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU is here: the files can be used")
@pytest.mark.parametrize(
    "name, said",
    [
        ("fsdp2", "GPUs and NPUs only"),
        ("zero2", "deepspeed|GPUs and NPUs only"),
        ("zero3", "deepspeed|GPUs and NPUs only"),
        ("zero9", "none of fsdp2, zero2, zero3"),
    ],
)
@pytest.mark.slow
def test_accelerate_config_that_cannot_be_used_is_one_line(tmp_path, name, said):
    done = toy(tmp_path / "a", check=False, ACCELERATE_CONFIG=name)
    assert done.returncode == 2 and re.search(said, done.text) and len(done.text.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name, kind", [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_the_yaml_files_as_meant(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / f"common/accelerate/{name}.yaml"))
    assert config.distributed_type.value == kind
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    else:  # the script's own --accum and clipping must stay in force
        assert (
            config.deepspeed_config["zero_stage"] == int(name[-1])
            and "gradient_accumulation_steps" not in config.deepspeed_config
        )


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="no GPU")
def test_fsdp2_follows_the_same_curve(tmp_path):
    toy(tmp_path / "one", "--batch-size", "8", "--max-steps", "1")
    toy(tmp_path / "two", "--batch-size", "8", "--max-steps", "1", ACCELERATE_CONFIG="fsdp2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_plain_torchrun_joins_its_processes(tmp_path):
    torchrun = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, TOY, "--out", str(tmp_path / "a"), "--max-steps", "2"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert (
        json.loads((tmp_path / "a/config.json").read_text())["processes"] == 2
        and len(losses(tmp_path / "a")) == 2
    )


@pytest.mark.slow
def test_user_error_of_one_process_ends_all_without_traceback(tmp_path):
    toy(tmp_path / "a", "--max-steps", "5")
    done = toy(tmp_path / "a", processes=2, check=False)
    assert done.returncode == 2 and "Traceback" not in done.text
    assert sum("already holds a run" in line for line in done.text.splitlines()) == 1
