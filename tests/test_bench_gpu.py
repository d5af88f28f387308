"""bench/gpu.sh without a GPU: every step's code runs at tiny sizes, and one that fails harms no other."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_steps
from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]


def start(out, *options):
    environment = {**os.environ, "PYTHON": python()}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    return done, json.loads((out / "gpu.json").read_text())


def test_steps_and_limits_name_the_same_things():
    assert list(gpu.LIMITS) == list(gpu_steps.STEPS)
    assert max(gpu.LIMITS.values()) < 120


@pytest.mark.slow
def test_dry_run_measures_something_in_each_of_its_steps(tmp_path, bfloat16):
    """Three of the nine steps; `bash bench/gpu.sh --dry-run` runs them all."""
    steps = ["cwt", "pruning", "attention"]
    done, results = start(tmp_path, "--dry-run", "--budget", "3600", "--steps", *steps)
    assert done.returncode == 0, done.stderr
    for name, step in results["steps"].items():
        assert step["rows"] and "failed" not in step, (name, step)
        for row in step["rows"]:
            assert not row["note"].startswith("failed"), row
    assert list(results["steps"]) == steps
    assert results["about"]["torch"] and results["about"]["transformers"]
    named = [row for step in results["steps"].values() for row in step["rows"] if row["baseline"]]
    assert len(named) > 8 and all(row["unit"] is not None for row in named)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the sentence that no GPU was at hand")
def test_without_a_gpu_the_table_says_so_and_the_other_steps_go_on(tmp_path):
    done, results = start(tmp_path, "--steps", "dia", "attention")
    assert done.returncode == 0, done.stderr
    assert [step["failed"] for step in results["steps"].values()] == [
        "RuntimeError: no CUDA device here; --dry-run exercises the code on the CPU"
    ] * 2
    assert done.stdout.count("FAILED: RuntimeError: no CUDA device here") == 4


@pytest.mark.slow
def test_what_does_not_fit_the_budget_is_skipped_and_named(tmp_path):
    done, results = start(tmp_path, "--dry-run", "--budget", "1", "--steps", "cwt")
    assert done.returncode == 0, done.stderr
    assert results["steps"] == {"cwt": {"skipped": "1 s of the budget were left"}}


@pytest.mark.slow
def test_a_late_step_keeps_the_rows_that_it_has_measured(monkeypatch, tmp_path):
    script = tmp_path / "late.py"
    row = json.dumps({"what": "a", "value": 1.0, "unit": "s"})
    script.write_text(f"import time\nprint({'ROW ' + row!r}, flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu, "__file__", str(script))
    result = gpu.run_step("cwt", True, 10)
    assert result["failed"] == "stopped after its 10 seconds"
    assert [row["what"] for row in result["rows"]] == ["a"]


def test_the_one_hot_baseline_equals_the_lookup():
    from dia_pangu.src.Model.my_embedding_layer import lookup

    torch.manual_seed(0)
    weight, extra, ids = torch.randn(50, 8), torch.randn(2, 5, 8), torch.randint(0, 55, (2, 20))
    assert torch.equal(gpu_steps.one_hot_lookup(weight, extra, ids), lookup(weight, extra, ids))


def test_the_conv1d_baseline_gives_upstreams_images():
    from cwt_mae.model import cwt_wrap

    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0)).cumsum(1)
    ours = cwt_wrap(x, 64, legacy=True, normalize=True)
    theirs = gpu_steps.conv1d_images(x, 64, normalize=True)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
