"""studies/recipe.py: what a stage is started with, and how a recipe fails and stops."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from common.errors import UserError
from studies import recipe
from tests.forked import PATIENCE
from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]

# Stands for Python: writes down how it was called; the script's name says what it does then.
STUB = """#!/usr/bin/env bash
name=$(basename "$3")
case "$name" in waits*) trap 'sleep 0.3; echo saved >>"$CALLS/'"$name"'"; exit 143' TERM ;; esac
echo "$NPROC_PER_NODE|$OMP_NUM_THREADS|$PYTHONPATH|$*" >"$CALLS/$name"
case "$name" in
  fails*) exit 3 ;;
  killed*) kill -KILL $$ ;;
  waits*) sleep 60 >/dev/null 2>&1 & wait ;;
esac
"""


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The folder in which the stub that stands for Python writes one file for each stage."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    (tmp_path / "calls").mkdir()
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(recipe.sys, "executable", str(stub))
    return tmp_path / "calls"


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "did not come about"
        time.sleep(0.02)


def test_keywords_become_options():
    given = dict(
        batch_size=8, lr=0.0, skip_bad=True, legacy=False, val=None, files=["a", Path("b c")], seed=0
    )
    words = ["--batch-size", "8", "--lr", "0.0", "--skip-bad", "--files", "a", "b c", "--seed", "0"]
    assert recipe.options(given) == words


def test_a_stage_gets_its_arguments_processes_and_threads(calls):
    recipe.stage("em_mllm/train.py", "input one", processes=3, threads=5, max_steps=2)
    processes, threads, path, words = (calls / "train.py").read_text().strip().split("|")
    assert (processes, threads) == ("3", "5") and path.split(os.pathsep)[0] == str(ROOT)
    assert words == f"-m common.launch {ROOT}/em_mllm/train.py input one --max-steps 2"
    recipe.stage("em_mllm/test.py")
    assert (calls / "test.py").read_text().startswith("1|1|")


@pytest.mark.parametrize("script, status", [("fails.py", 3), ("killed.py", -signal.SIGKILL)])
def test_a_stage_that_fails_is_an_error_that_names_it(calls, script, status):
    with pytest.raises(UserError, match=f"{script} ended with exit status {status}"):
        recipe.stage(script)


def test_a_failure_ends_the_stages_beside_it_and_starts_no_other(calls):
    def fails():
        wait_for((calls / "waits.py").exists)
        recipe.stage("fails.py")

    parts = [lambda: recipe.stage("waits.py"), fails, lambda: recipe.stage("never.py")]
    with pytest.raises(UserError, match="fails.py"):
        recipe.side_by_side(*parts, cores=2)
    wait_for(lambda: "saved" in (calls / "waits.py").read_text())
    assert not (calls / "never.py").exists()


def test_a_stage_that_ended_well_is_left_out_the_next_time(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "SKIP_DONE", True)
    monkeypatch.setattr(recipe, "RUNS", tmp_path)
    (tmp_path / "out").mkdir()

    def ran(script, **flags):
        (calls / script).unlink(missing_ok=True)
        recipe.stage(script, **flags)
        return (calls / script).exists()

    assert ran("train.py", out=tmp_path / "out") and not ran("train.py", out=tmp_path / "out")
    assert ran("train.py", out=tmp_path / "out", lr=2)  # other arguments are another stage
    (tmp_path / "out").rmdir()
    assert ran("train.py", out=tmp_path / "out")  # what it made is gone
    with pytest.raises(UserError):
        recipe.stage("fails.py")
    with pytest.raises(UserError):
        recipe.stage("fails.py")
    monkeypatch.setattr(recipe, "SKIP_DONE", False)
    (tmp_path / "out").mkdir()
    assert ran("train.py", out=tmp_path / "out")


def test_parts_side_by_side_are_all_done_and_no_more_run_at_a_time_than_there_are_cores():
    running, most, done = set(), [], []

    def part(i):
        running.add(i)
        most.append(len(running))
        time.sleep(0.02)
        running.discard(i)
        done.append(i)

    recipe.side_by_side(*[lambda i=i: part(i) for i in range(5)], cores=2)
    assert sorted(done) == [0, 1, 2, 3, 4] and max(most) <= 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_stages_and_the_recipe(calls, tmp_path, signum):
    script = tmp_path / "builtin.py"
    script.write_text(
        "import sys\nfrom studies.recipe import recipe, stage\n"
        f"sys.executable = {recipe.sys.executable!r}\n"
        "recipe(lambda: stage('waits.py'))\n"
    )
    process = subprocess.Popen([python(), str(script)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (calls / "waits.py").exists() or process.poll() is not None)
    process.send_signal(signum)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signum and f"stopped by {signal.Signals(signum).name}" in error
    assert "saved" in (calls / "waits.py").read_text()  # the stage has saved before the prompt comes back


def test_a_failed_stage_ends_the_recipe_with_one_line_and_status_2(calls, tmp_path):
    script = tmp_path / "builtin.py"
    script.write_text(
        "import sys\nfrom studies.recipe import recipe, stage\n"
        f"sys.executable = {recipe.sys.executable!r}\n"
        "recipe(lambda: stage('fails.py'))\n"
    )
    done = subprocess.run([python(), str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: fails.py ended with exit status 3")
    assert len(done.stderr.splitlines()) == 1


def test_help_and_unknown_options_start_no_stage(calls, tmp_path):
    script = tmp_path / "builtin.py"
    script.write_text(
        '"""Recipe: trains a toy."""\n'
        "import sys\nfrom studies.recipe import recipe, stage\n"
        f"sys.executable = {recipe.sys.executable!r}\n"
        "recipe(lambda: stage('train.py'))\n"
    )

    def started(*words):
        return subprocess.run([python(), str(script), *words], cwd=ROOT, capture_output=True, text=True)

    shown = started("--help")
    assert shown.returncode == 0 and "trains a toy" in shown.stdout and "SMOKE=1" in shown.stdout
    refused = started("--smoke")
    assert refused.returncode == 2 and "--smoke" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not list(calls.iterdir())
    assert started().returncode == 0 and (calls / "train.py").exists()


@pytest.mark.parametrize("smoke, sizes", [("", "1500"), ("1", "4")])
def test_the_environment_chooses_the_sizes_and_the_folders(tmp_path, smoke, sizes):
    code = "from studies.recipe import *; print(size(1500, smoke=4), RUNS, REAL, CORES, sep='|')"
    environment = {
        **os.environ,
        "SMOKE": smoke,
        "RUNS": "r",
        "DATA_ROOT": str(tmp_path),
        "OMP_NUM_THREADS": "3",
    }
    done = subprocess.run(
        [python(), "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.stdout.decode().strip() == f"{sizes}|{tmp_path}/r|{tmp_path}|3"


def test_a_stage_runs_a_real_script(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.sys, "executable", python())
    recipe.stage("tests/toy_run.py", out=tmp_path / "a", max_steps=2, save_every=0, overwrite=True)
    assert len((tmp_path / "a/log.jsonl").read_text().splitlines()) == 2
