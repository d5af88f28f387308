"""Faults of the machine, in every project's training: kill -9 in each phase, full disk, no right to write,
damage, clocks that jump.
"""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common import lock
from common.checkpoint import damage
from tests import forked
from tests.worlds import *  # noqa: F403  the fixtures cwt, em, grounding, ct, llm

pytestmark = pytest.mark.slow
TRAININGS = [
    ("cwt", "train"),
    ("cwt", "finetune"),
    ("em", "pretrain"),
    ("em", "train"),
    ("grounding", "train"),
    ("ct", "train"),
    ("llm", "heal"),
]
STEPS = 5


@pytest.fixture(scope="module", params=TRAININGS, ids=["-".join(t) for t in TRAININGS])
def training(request, tmp_path_factory):
    """start(out, ...) and call(out, ...) of one project's training of STEPS steps, saved after each."""
    name, command = request.param
    home = tmp_path_factory.mktemp("training")
    world = request.getfixturevalue(name)
    script, arguments = world.commands[command]

    def line(out, more):
        given = [str(a) for a in arguments(world.folder)]
        given = [a for a in given if a != "--overwrite"]
        given[given.index(str(world.folder / "run"))] = str(out)
        return [
            *given,
            "--max-steps",
            STEPS,
            "--save-steps" if name in ("ct", "llm") else "--save-every",
            1,
            "--logging-steps" if name in ("ct", "llm") else "--log-every",
            1,
            *more,
        ]

    def start(out, *more, log="log.txt", **options):
        return forked.start(script, line(out, more), home / log, **options)

    def call(out, *more, log="log.txt", **options):
        return forked.call(script, line(out, more), home / log, **options)

    whole = home / "whole"
    done = call(whole)
    assert done.returncode == 0, done.text
    return SimpleNamespace(start=start, call=call, whole=whole, log=home / "log.txt")


def losses(out):
    return {
        line["step"]: line["loss"]
        for line in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in line
    }


def checkpoints(out):
    return sorted(p.name for p in (out / "checkpoints").glob("step-*"))


def same(whole, cut):
    """Equal losses, and to the bit equal tensors in every weight file that the uninterrupted run left."""
    assert losses(whole) == losses(cut) and len(losses(whole)) >= STEPS - 1
    for file in sorted(p.relative_to(whole) for p in whole.rglob("*.safetensors")):
        one, two = load_file(whole / file), load_file(cut / file)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file


def slow_saves():
    """In the fork: a save takes long enough to be hit."""
    sync = os.fsync

    def slow(fd):
        time.sleep(0.02)
        sync(fd)

    os.fsync = slow


def the_other_comes_first():
    """In the fork: what has its folder writes nothing to it until another process has come and gone."""
    sync = os.fsync

    def patient(fd):
        while lock._held and not Path(os.environ["OTHER_HAS_GONE"]).exists():
            time.sleep(0.01)
        sync(fd)

    os.fsync = patient


def clock_goes_back():
    """In the fork: the clock shows a time three years ago."""
    now = time.time
    time.time = lambda: now() - 1e8


def test_kill_in_every_phase_loses_nothing(training, tmp_path):
    out, hit = tmp_path / "cut", []
    phases = {
        "load": lambda: True,
        "step": lambda: len(checkpoints(out)) > had or logged(out) > lines,
        "save": lambda: list(out.glob("checkpoints/.saving-*")),
        "evaluate": lambda: len(checkpoints(out)) and checkpoints(out)[-1] == f"step-{STEPS:08d}",
    }
    for phase, reached in phases.items():
        had, lines, before = len(checkpoints(out)), logged(out), checkpoints(out)[-1:]
        process = training.start(
            out, *(["--resume"] if (out / "config.json").exists() else []), before=slow_saves
        )
        while not reached():
            assert process.is_alive(), (phase, training.log.read_text())
            time.sleep(0.001)
        process.kill()
        hit += [phase] * (forked.finish(process) == -signal.SIGKILL)
        assert checkpoints(out)[-1:] >= before  # a finished checkpoint is never lost
        assert all(not damage(out / "checkpoints" / name) for name in checkpoints(out))
    done = training.call(out, *(["--resume"] if (out / "config.json").exists() else []))
    assert done.returncode == 0 and "Traceback" not in done.text, done.text
    assert len(hit) >= 3
    same(training.whole, out)


def logged(out):
    return (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0


def test_full_disk_and_no_right_to_write_are_one_line(training, tmp_path):
    done = training.call(tmp_path / "full", limit=5000)
    assert done.returncode == 2 and "Traceback" not in done.text, done.text
    assert sum(line.startswith("error: ") for line in done.text.splitlines()) == 1
    assert all(not damage(tmp_path / "full/checkpoints" / name) for name in checkpoints(tmp_path / "full"))
    done = training.call("/proc/run")  # nobody may write there, root included
    assert done.returncode == 2 and "/proc/run" in done.text and "Traceback" not in done.text, done.text


def test_damaged_last_checkpoint_and_jumping_clock_change_nothing(training, tmp_path):
    out = tmp_path / "cut"
    done = training.call(out)
    last = out / "checkpoints" / checkpoints(out)[-1]
    file = max(last.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for i, name in enumerate(checkpoints(out)):  # the newest looks oldest
        os.utime(out / "checkpoints" / name, (1e9 - i, 1e9 - i))
    done = training.call(out, "--resume", before=clock_goes_back)
    assert done.returncode == 0, done.text
    assert last.name in done.text and "trying the checkpoint before it" in done.text
    same(training.whole, out)


def test_two_runs_in_one_folder_are_kept_apart(training, tmp_path):
    out, gone = tmp_path / "both", tmp_path / "gone"
    first = training.start(out, before=the_other_comes_first, environment={"OTHER_HAS_GONE": str(gone)})
    while not ((out / "run.lock").exists() and (out / "run.lock").read_text()):
        assert first.is_alive(), training.log.read_text()
        time.sleep(0.01)
    second = training.call(out, "--overwrite", log="second.txt")
    gone.touch()
    assert forked.finish(first) == 0
    assert second.returncode == 2 and f"in use by process {first.pid}" in second.text, second.text
    same(training.whole, out)
