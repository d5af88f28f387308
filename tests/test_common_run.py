"""What must survive: interruption, kill -9, a full disk, a damaged checkpoint, a second process, several processes."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOY = [sys.executable, str(ROOT / "tests/toy_run.py")]


def toy(out, *options, processes=1, check=True, **environment):
    command = [*TOY] if processes == 1 and not environment else [sys.executable, "-m", "common.launch", TOY[1]]
    done = subprocess.run([*command, "--out", str(out), *options], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "NPROC_PER_NODE": str(processes), **environment})
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def final(done):
    return done.stdout.strip().splitlines()[-1]


def losses(out):
    return [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


def test_run_directory_describes_the_run(tmp_path):
    toy(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["arguments"]["steps"] == 20 and config["processes"] == 1 and config["versions"]["torch"]
    assert len(losses(tmp_path / "a")) == 20 and list((tmp_path / "a/tb").iterdir())
    assert sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir()) == ["step-00000010", "step-00000015", "step-00000020"]
    assert (tmp_path / "a/last").resolve().name == "step-00000020"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_run_says_how_to_resume_and_ends_bit_equal(tmp_path, signum, processes):
    size = str(8 // processes)
    whole = toy(tmp_path / "whole", "--workers", "2", "--batch-size", size, processes=processes)
    command = [sys.executable, "-m", "common.launch", TOY[1], "--out", str(tmp_path / "cut"), "--workers", "2", "--batch-size", size, "--pause", ".2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "NPROC_PER_NODE": str(processes)}, start_new_session=True)
    while process.poll() is None and not ((tmp_path / "cut/log.jsonl").exists() and len(losses(tmp_path / "cut")) >= 3):
        time.sleep(.05)
    process.send_signal(signum)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, text
    assert "--resume" in text and "Traceback" not in text
    resumed = toy(tmp_path / "cut", "--workers", "2", "--batch-size", size, "--resume", processes=processes)
    assert final(resumed) == final(whole)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_kill_at_any_moment_loses_only_steps_since_the_last_save(tmp_path):
    # Width 150,000: a checkpoint of 31 MB is most of the time being written, so that kills fall into saves too.
    options = ["--width", "150000", "--steps", "30"]
    whole, chance, kills, in_save = toy(tmp_path / "whole", *options), random.Random(0), 0, 0
    out = tmp_path / "cut"
    for _ in range(20):
        before = sorted(p.name for p in out.glob("checkpoints/step-*"))
        process = subprocess.Popen([*TOY, "--out", str(out), *options, *(["--resume"] if (out / "config.json").exists() else [])],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started = time.monotonic()
        while not (out / "log.jsonl").exists() and time.monotonic() - started < 30 and process.poll() is None:
            time.sleep(.01)
        try:
            process.wait(timeout=2.2 + 1.2 * chance.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        assert "Traceback" not in process.stderr.read()
        in_save += bool(list(out.glob("checkpoints/.saving-*")))
        after = sorted(p.name for p in out.glob("checkpoints/step-*"))
        assert not before or max(after) >= max(before)    # a finished checkpoint is never lost
        if after and max(after) == "step-00000030":
            break
    resumed = toy(out, *options, "--resume")
    assert final(resumed) == final(whole)
    assert losses(out) == losses(tmp_path / "whole")
    assert kills and not list(out.glob("checkpoints/.saving-*"))


def test_full_disk_leaves_the_previous_checkpoint_whole(tmp_path):
    toy(tmp_path / "a", "--steps", "10")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))   # writes past 20 kB fail
    full = subprocess.run([*TOY, "--out", str(tmp_path / "b"), "--width", "1000"], preexec_fn=limit, capture_output=True, text=True)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert "step-00000005" in full.stderr and "last good checkpoint: none" in full.stderr
    assert not list((tmp_path / "b/checkpoints").iterdir())
    again = subprocess.run([*TOY, "--out", str(tmp_path / "a"), "--resume"], capture_output=True, text=True,
                           preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, resource.RLIM_INFINITY)))
    assert again.returncode == 2 and "step-00000010" in again.stderr.split("last good checkpoint")[1]
    assert final(toy(tmp_path / "a", "--resume")) == final(toy(tmp_path / "c"))


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "state"])
def test_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, harm):
    whole, _ = toy(tmp_path / "whole"), toy(tmp_path / "a", "--steps", "15")
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
    assert "step-00000015" in resumed.stderr and "trying the checkpoint before it" in resumed.stderr
    assert final(resumed) == final(whole)


def test_second_process_on_the_same_run_is_refused(tmp_path):
    first = subprocess.Popen([*TOY, "--out", str(tmp_path / "a"), "--pause", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "a/config.json").exists():
        time.sleep(.05)
    second = toy(tmp_path / "a", "--resume", check=False)
    first.kill()
    first.wait()
    assert second.returncode == 2 and f"in use by process {first.pid}" in second.stderr


def test_used_or_foreign_folder_is_refused_and_left_alone(tmp_path):
    toy(tmp_path / "a", "--steps", "5")
    assert "--overwrite" in toy(tmp_path / "a", check=False).stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    for options in ([], ["--overwrite"], ["--resume"]):
        done = toy(tmp_path / "mine", *options, check=False)
        assert done.returncode == 2 and "thesis.txt" in done.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    toy(tmp_path / "a", "--overwrite", "--steps", "7")
    assert len(losses(tmp_path / "a")) == 7


@pytest.mark.parametrize("processes", [1, 2])
def test_nan_loss_names_step_batch_and_last_good_checkpoint(tmp_path, processes):
    done = toy(tmp_path / "a", "--nan-at", "8", "--batch-size", str(8 // processes), processes=processes, check=False)
    assert done.returncode == 2, done.stderr
    line = next(line for line in done.stderr.splitlines() if "loss is nan" in line)
    assert "step 8" in line and "record-" in line and "step-00000005" in line and "Traceback" not in done.stderr


def test_two_processes_follow_the_loss_curve_of_one(tmp_path):
    toy(tmp_path / "one", "--batch-size", "8")
    toy(tmp_path / "two", "--batch-size", "4", processes=2)
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"))) < 1e-5


def test_fsdp2_yaml_follows_the_same_curve(tmp_path):
    toy(tmp_path / "one", "--batch-size", "8")
    toy(tmp_path / "two", "--batch-size", "4", processes=2, ACCELERATE_CONFIG="fsdp2")
    assert max(abs(a - b) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"))) < 1e-5


@pytest.mark.parametrize("name, said", [("zero2", "pip install deepspeed"), ("zero3", "pip install deepspeed"), ("zero9", "fsdp2, zero2, zero3")])
def test_accelerate_config_that_cannot_be_used_is_one_line(tmp_path, name, said):
    if said.startswith("pip"):
        pytest.importorskip("torch")
        try:
            import deepspeed  # noqa: F401
            pytest.skip("DeepSpeed is installed")
        except ImportError:
            pass
    done = toy(tmp_path / "a", check=False, ACCELERATE_CONFIG=name)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_user_error_of_one_process_ends_all_without_traceback(tmp_path):
    toy(tmp_path / "a", "--steps", "5")
    done = toy(tmp_path / "a", processes=2, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sum("already holds a run" in line for line in done.stderr.splitlines()) == 1
