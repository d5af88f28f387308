"""The memory plan of --dry-run against what a run takes."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from common.memory import LiveBytes, lines_of, memory_table
from tests import forked, toy_run

SIZES = ["--width", 500_000, "--batch-size", 64, "--max-steps", 3, "--log-every", 9, "--save-every", 0]


def resident(name):
    """A line of /proc/self/status in bytes: VmRSS, or VmHWM, the most so far."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure():
    """In the fork: print the most memory that the steps take beyond what was there before the model."""
    before = {}
    open_run, update = toy_run.open_run, toy_run.update

    def opened(*arguments):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before["bytes"] = resident("VmRSS")
        return open_run(*arguments)

    def updated(run, *rest):
        norm = update(run, *rest)
        if run.last:
            print("took", resident("VmHWM") - before["bytes"], flush=True)
        return norm

    toy_run.open_run, toy_run.update = opened, updated


@pytest.mark.slow
def test_the_plan_is_what_a_run_takes_to_a_fifth(tmp_path):
    done = forked.call(toy_run, ["--out", tmp_path / "a", *SIZES], tmp_path / "log.txt", before=measure)
    assert done.returncode == 0, done.text
    took = int(re.search(r"took (\d+)", done.text)[1]) / 2**30
    done = forked.call(toy_run, ["--out", tmp_path / "b", *SIZES, "--dry-run"], tmp_path / "log.txt")
    assert done.returncode == 0 and not (tmp_path / "b").exists(), done.text
    plan = float(next(line for line in done.text.splitlines() if line.startswith("one GPU")).split()[-1])
    assert plan == pytest.approx(took, rel=0.2)


def test_what_lives_is_counted_while_it_lives():
    known = torch.zeros(1000)
    with LiveBytes([known]) as live:
        view = known.view(10, 100)
        one = known + 1
        two = one * 2
        assert live.live == live.peak == 8000 and view.shape == (10, 100)
        del one
        gc.collect()
        assert live.live == 4000 and live.peak == 8000
        alive = weakref.ref(two)
    assert alive() is not None


def test_sharding_divides_what_it_divides():
    table = memory_table(weights=800, trained=100, peak=1000, layer=40, root=80, gpus=8)
    assert table["one GPU"]["together"] == 800 + 800 + 1000
    assert table["DDP"]["together"] == table["one GPU"]["together"] + 400
    shard = table["FSDP2, 8 GPUs"]
    assert shard["weights"] == 100 + 80 + 2 * 40 and shard["gradients"] == 50 and shard["optimizer"] == 100
    assert shard["activations"] == 600 and shard["together"] == 260 + 100 + 600 + 50
    small = memory_table(weights=800, trained=100, peak=10, layer=800, root=0, gpus=2)
    assert small["FSDP2, 2 GPUs"]["weights"] == 800
    assert small["one GPU"]["together"] == 800 + 800 + 400 + 400  # the optimizer's step needs room of its own
    assert lines_of(table)[1].split() == ["one", "GPU", "0.000", "0.000", "0.000", "0.000", "0.000"]
