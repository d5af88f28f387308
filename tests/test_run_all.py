"""run_all goes on when a project fails, waits where one needs another, shows results with their control."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from studies.run_all import REAL_MINUTES, minutes_left
from studies.summary import collect, number, page, write_result
from tests.forked import PATIENCE
from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]

RESULT = """
"$PYTHON" - <<'PY'
import os, pathlib
from common.figures import new_figure, save_figure
from studies.summary import write_result
folder = pathlib.Path(os.environ["RUNS"]) / "{name}"
figure, axis = new_figure()
axis.plot([1, 2, 3])
save_figure(figure, folder / "figures/loss.png")
write_result(folder, "beats & <rhythm>", "macro-F1", 0.61, {{"chance": 0.25, "random init": 0.5}},
             interval=(0.58, 0.64),
             figures=[(folder / "figures/loss.png", "loss against step")], note="held-out records, 3 seeds")
(folder / "base").mkdir()
lines = ['{{"step": 1, "loss": 2.0}}', '{{"step": 9, "loss_spec": 1.0}}', '{{"step": 10, "lo']
(folder / "base/log.jsonl").write_text("\\n".join(lines))
PY
"""


@pytest.fixture
def tree(tmp_path):
    """A repository copy with three projects whose recipes are a few lines of bash."""
    for part in ("common", "studies"):
        shutil.copytree(
            ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", "builtin.py")
        )
    scripts = {
        "cwt_mae": RESULT.format(name="cwt_mae") + 'echo "threads $OMP_NUM_THREADS smoke $SMOKE"',
        "dia_pangu": 'sleep 1; touch "$RUNS/dia_pangu/model"; echo "error: no lungs"; echo more; exit 3',
        "pruning": 'test -e "$RUNS/dia_pangu/model" || exit 9\n' + RESULT.format(name="pruning"),
    }
    for name, text in scripts.items():
        (tmp_path / name).mkdir(exist_ok=True)
        recipe(tmp_path, name, "set -e\n" + text)
    return tmp_path


def recipe(tree, name, text, file="builtin.py"):
    """Write studies/<name>/builtin.py, or another file, which becomes a bash that runs `text`."""
    code = f"import os\nos.execvp('bash', ['bash', '-c', {text!r}])\n"
    (tree / "studies" / name / file).write_text(code)


def start(tree, *options, **environment):
    env = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHON": python(),
        "RUNS": str(tree / "runs"),
        **environment,
    }
    return subprocess.run(
        [python(), "-m", "studies.run_all", *options], cwd=tree, capture_output=True, text=True, env=env
    )


@pytest.mark.slow
def test_one_failure_does_not_stop_the_others_and_is_named(tree):
    done = start(tree, "--jobs", "2", "--smoke")
    assert done.returncode == 1, done.stderr
    assert (
        "dia_pangu failed with exit status 3: error: no lungs\n" in done.stderr
        and "Traceback" not in done.stderr
    )
    summary = {p["name"]: p for p in json.loads((tree / "runs/summary.json").read_text())["projects"]}
    assert [summary[n]["status"] for n in ("cwt_mae", "pruning")] == ["ok", "ok"]
    assert summary["cwt_mae"]["rows"][0]["controls"] == {"chance": 0.25, "random init": 0.5}
    assert summary["cwt_mae"]["peak_mb"] > 10 and summary["dia_pangu"]["seconds"] >= 1
    for text in ("macro-F1", "0.610 [0.580, 0.640]", "random init 0.500", "dia_pangu (failed"):
        assert text in done.stdout
    assert "smoke 1" in (tree / "runs/cwt_mae/run_all.log").read_text()


@pytest.mark.slow
def test_a_real_run_starts_the_real_recipes_and_keeps_what_was_done(tree):
    (tree / "studies/real_models.py").write_text("import os\nprint('models in', os.environ['RUNS'])\n")
    bash = RESULT.format(name="cwt_mae") + 'echo "data $DATA_ROOT skip $SKIP_DONE"'
    recipe(tree, "cwt_mae", bash, "real.py")
    write_result(tree / "runs/real/cwt_mae", "an earlier stage", "AUC", 0.7, {"chance": 0.5})
    recipe(tree, "pruning", RESULT.format(name="pruning"), "real.py")
    for folder in ("ecg", "ct"):
        (tree / folder).mkdir()
    done = start(tree, "--real", "--jobs", "1", "cwt_mae", "pruning", DATA_ROOT=str(tree))
    assert done.returncode == 0, done.stderr
    long, short = REAL_MINUTES["pruning"], REAL_MINUTES["cwt_mae"]
    said = [f"models in {tree}/runs/real", f"about {long + short} minutes with 1", "pruning: started"]
    said += [f"about {short} minutes left", "cwt_mae: started", "cwt_mae: ok"]  # the longer one first
    places = [done.stdout.index(words) for words in said]
    assert places == sorted(places)
    assert "an earlier stage" in done.stdout and "real data from" in done.stdout
    assert f"data {tree} skip 1" in (tree / "runs/real/cwt_mae/run_all.log").read_text()


def test_the_time_left_is_that_of_what_runs_and_waits(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 600.0)
    pruning, flmm, cwt_mae = (REAL_MINUTES[name] for name in ("pruning", "flmm", "cwt_mae"))
    assert minutes_left([], {}, 2) == 0
    assert minutes_left(["flmm"], {"pruning": 0}, 1) == flmm + pruning - 10
    assert minutes_left(["flmm", "cwt_mae"], {"pruning": 0}, 2) == (flmm + cwt_mae + pruning - 10) / 2
    assert minutes_left([], {"pruning": 0}, 2) == pruning - 10, "one project uses one place"
    assert minutes_left([], {"pruning": 0, "cwt_mae": -60 * 90}, 2) == pruning - 10, "late, but not below 0"


def test_page_is_one_file_with_inline_pictures_alt_text_and_escapes(tree):
    start(tree, "cwt_mae")
    page = (tree / "runs/summary.html").read_text()
    assert page.count('alt="training loss of every run"') == 1 and page.count('alt="loss against step"') == 1
    assert "beats &amp; &lt;rhythm&gt;" in page and 'alt="loss against step"' in page
    assert set(re.findall(r'src="([^"]{0,22})', page)) == {"data:image/png;base64,"}
    assert not re.search(r'(href|src)="https?:', page)


def test_the_headline_of_a_project_stands_above_what_is_folded(tmp_path):
    for name, headline in (("a detail", False), ("what counts", True)):
        write_result(tmp_path / "runs/flmm", name, "IoU", 0.5, {"chance": 0.2}, headline=headline)
    project = {
        "name": "flmm",
        "status": "ok",
        "seconds": 1,
        "peak_mb": 2,
        "rows": collect(tmp_path / "runs", "flmm"),
    }
    above, folded = page([project], "a run").split("<details>")
    assert "what counts: IoU" in above and "a detail" not in above
    assert "1 more result," in folded and "a detail: IoU" in folded


@pytest.mark.slow
def test_pruning_starts_when_the_model_is_there_and_not_on_an_old_one(tree):
    made = tree / "runs/dia_pangu/ft/metrics.json"
    made.parent.mkdir(parents=True)
    made.touch()
    os.utime(made, (1e9, 1e9))  # of an earlier run
    recipe(
        tree,
        "dia_pangu",
        """set -e; sleep 2; [ ! -e "$RUNS/pruning/run_all.log" ]
touch "$RUNS/dia_pangu/ft/metrics.json"; until [ -e "$RUNS/pruning/done" ]; do sleep .1; done""",
    )
    recipe(tree, "pruning", 'touch "$RUNS/pruning/done"')
    done = start(tree, "dia_pangu", "pruning", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_cores_are_shared_out(tree):
    cores = len(os.sched_getaffinity(0))
    recipe(tree, "pruning", 'echo "threads $OMP_NUM_THREADS "')
    start(tree, "cwt_mae", "pruning", "--jobs", "2")
    for name in ("cwt_mae", "pruning"):
        assert f"threads {max(1, cores // 2)} " in (tree / f"runs/{name}/run_all.log").read_text()
    if cores > 1:
        start(tree, "pruning", "--jobs", "1")
        assert f"threads {cores} " in (tree / "runs/pruning/run_all.log").read_text()


def test_results_of_an_earlier_run_are_gone_when_a_project_fails(tree):
    write_result(tree / "runs/dia_pangu", "old reports", "BLEU-4", 0.5, {"chance": 0.1})
    recipe(tree, "dia_pangu", "exit 3")
    done = start(tree, "dia_pangu/")
    assert done.returncode == 1 and "old reports" not in done.stdout
    assert not json.loads((tree / "runs/summary.json").read_text())["projects"][0]["rows"]


@pytest.mark.parametrize(
    "options, environment, said",
    [
        (["nosuch"], {}, "nosuch: no such project"),
        (["--real"], {"DATA_ROOT": "/no/such"}, "DATA_ROOT=/no/such"),
        (["--real"], {"DATA_ROOT": ""}, "DATA_ROOT is not set"),
        (["--real", "cwt_mae/"], {"DATA_ROOT": "/"}, "holds no ecg/ for cwt_mae"),
        (["--jobs", "-1"], {}, "at least 0"),
        (["--smok"], {}, "--smok"),  # run_all.sh itself looks for --real as it is written
    ],
)
def test_wrong_arguments_are_one_line(tree, options, environment, said):
    done = start(tree, *options, **environment)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tree / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "signum, real", [(signal.SIGINT, []), (signal.SIGTERM, ["--real"]), (signal.SIGHUP, [])]
)
def test_the_prompt_comes_back_when_the_projects_have_saved_themselves(tree, signum, real):
    (tree / "studies/real_models.py").write_text("")
    (tree / "ecg").mkdir()
    text = "trap 'sleep 1; echo saved; exit 143' TERM; echo up; sleep 60 & wait"
    recipe(tree, "cwt_mae", text, "real.py" if real else "builtin.py")
    given = {"DATA_ROOT": str(tree), "PYTHONPATH": str(tree), "RUNS": str(tree / "runs")}
    env, runs = {**os.environ, **given}, tree / "runs" / ("real" if real else "")
    process = subprocess.Popen(
        [python(), "-m", "studies.run_all", "cwt_mae", *real],
        cwd=tree,
        env=env,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    log = runs / "cwt_mae/run_all.log"
    while not (log.exists() and "up" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    write_result(runs / "cwt_mae", "beats", "accuracy", 0.5, {"chance": 0.1})
    second = start(tree, "cwt_mae", *real, **given)  # it would delete the results of the first
    assert second.returncode == 2 and "cwt_mae is in use by process" in second.stderr
    assert "up" in log.read_text() and collect(runs, "cwt_mae")
    process.send_signal(signum)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signum and str(log) in error
    assert "saved" in log.read_text()


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0.000"),
        (0.61, "0.610"),
        (0.00042, "0.00042"),
        (-9.5, "-9.500"),
        (37.218, "37.22"),
        (12345.6, "12346"),
    ],
)
def test_small_and_large_numbers_keep_their_digits_in_the_table(value, text):
    assert number(value) == text


def test_result_without_control_is_refused(tmp_path):
    with pytest.raises(ValueError, match="control"):
        write_result(tmp_path, "task", "accuracy", 0.9, {})
