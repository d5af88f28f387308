"""Long runs on shared machines: locks, stops in every phase, another number of processes, full disks, odd
file systems, clusters."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from common import checkpoint, launch, lock, train
from common.checkpoint import _share, atomic_path, damage, find_resume, link, linked
from common.errors import Interrupted, UserError, write_problem
from tests import forked, toy_run
from tests.sharded import world
from tests.test_common_train import lines, toy  # noqa: F401  toy is a fixture

ROOT = Path(__file__).resolve().parents[1]


# --- one process at a time


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without POSIX locks."""

    def lockf(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", lockf)


def owner(out, host=None, pid=0, born="", age=0.0):
    path = out / ".run.owner"
    path.write_text(json.dumps({"host": host or lock.socket.gethostname(), "pid": pid, "born": born}))
    os.utime(path, (time.time() - age,) * 2)


def test_without_locks_a_file_keeps_a_second_process_out(tmp_path, no_locks, capsys):
    lock.hold(tmp_path)
    assert "has no locks (Function not implemented)" in capsys.readouterr().err
    assert json.loads((tmp_path / ".run.owner").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / ".run.owner").exists()
    parent = os.getppid()
    owner(tmp_path, pid=parent, born=lock._born(parent), age=1e6)  # alive here, however long it was silent
    with pytest.raises(UserError, match=f"in use by process {parent}"):
        lock.hold(tmp_path)
    owner(tmp_path, "elsewhere", pid=7, age=lock.STALE / 2)
    with pytest.raises(UserError, match="in use by process 7 on elsewhere"):
        lock.hold(tmp_path)


@pytest.mark.parametrize(
    "dead",
    [
        {"pid": 2**22 + 1, "born": "5"},  # no such process
        {"pid": os.getppid(), "born": "5"},  # a later process with its number
        {"host": "elsewhere", "pid": 7, "age": lock.STALE * 2},
    ],
)
def test_what_a_dead_process_left_is_taken_over(tmp_path, no_locks, dead):
    owner(tmp_path, **dead)
    lock.hold(tmp_path)
    assert json.loads((tmp_path / ".run.owner").read_text())["pid"] == os.getpid()
    lock.release()


def test_an_owner_without_locks_keeps_out_a_host_that_has_locks(tmp_path):
    owner(tmp_path, "elsewhere", pid=7)
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        lock.hold(tmp_path)


@pytest.mark.parametrize("number, said", [(errno.EAGAIN, "is in use by"), (errno.EACCES, "is in use by")])
def test_only_a_lock_of_another_means_in_use(tmp_path, monkeypatch, number, said):
    monkeypatch.setattr(fcntl, "lockf", lambda *a: (_ for _ in ()).throw(OSError(number, "no")))
    with pytest.raises(UserError, match=said):
        lock.hold(tmp_path)


# --- run folders that were cut short


def test_a_cut_overwrite_leaves_a_run_and_a_model_folder_is_none(toy, tmp_path, monkeypatch):  # noqa: F811
    out, _, _ = toy("a", "--max-steps", 5)
    unlink = Path.unlink

    def cut(path, **options):
        if path.name == "config.json":
            raise KeyboardInterrupt
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", cut)
    with pytest.raises(KeyboardInterrupt):
        toy("a", "--overwrite", "--max-steps", 5)
    monkeypatch.setattr(Path, "unlink", unlink)
    left = {path.name for path in out.iterdir() if not path.name.startswith(".deleted")}
    assert "config.json" in left and not left & {"checkpoints", "last", "log.jsonl"}
    (out / "config.json").unlink()
    (out / ".deleted-tb-7").mkdir()
    (out / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        toy("a", "--max-steps", 5)
    assert len(toy("a", "--overwrite", "--max-steps", 4)[1]) == 4
    assert not list(out.glob(".deleted*"))
    # a language model's folder has a config.json too
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_text("years of work")
    for option in ("--overwrite", "--resume"):
        with pytest.raises(UserError, match="holds config.json but no run"):
            toy("model", option)
    assert (model / "model.safetensors").read_text() == "years of work"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"arguments": 3}', None])
def test_checkpoints_outlive_their_config(toy, text):  # noqa: F811
    out, _, _ = toy("a", "--max-steps", 5)
    if text is None:
        (out / "config.json").unlink()
    else:
        (out / "config.json").write_text(text)
    _, log, said = toy("a", "--max-steps", 6, "--resume")
    assert "step-00000005" in said and log[-1]["step"] == 6
    assert json.loads((out / "config.json").read_text())["arguments"]["max_steps"] == 6


def test_another_model_at_resume_is_one_line_and_changes_nothing(toy):  # noqa: F811
    out, _, _ = toy("a", "--max-steps", 5)
    before = (out / "config.json").read_text()
    with pytest.raises(
        UserError, match="step-00000005 is of another model .size mismatch.*config.json names"
    ):
        toy("a", "--max-steps", 6, "--resume", "--width", 24)
    assert (out / "config.json").read_text() == before
    toy("a", "--max-steps", 6, "--resume")
    assert json.loads((out / "config.json").read_text())["arguments"]["width"] == 16


def test_auto_starts_and_goes_on_with_one_command(toy):  # noqa: F811
    command = ["--resume", "auto", "--max-steps"]
    assert len(toy("a", *command, 5)[1]) == 5
    _, log, said = toy("a", *command, 7)
    assert len(log) == 7 and "resumed from" in said
    with pytest.raises(SystemExit):
        toy_run.parse_args(["--out", "x", "--resume", "always"])


def test_a_resume_knows_its_arguments_where_text_is_not_utf_8(tmp_path):
    """As in a GBK locale, in which Python reads files that do not say otherwise in another encoding."""
    (tmp_path / "config.json").write_text('{"arguments": {"data": "数据"}}', encoding="utf-8")
    code = "from pathlib import Path; from common.run import _read_config; print(len(_read_config(Path())))"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


# --- stops


def stop_at(monkeypatch, step, signum, where="update"):
    """Let a signal come in the step's update or in its evaluation."""
    own = getattr(toy_run, where)

    def update(run, *rest):
        norm = own(run, *rest)
        if run.state["step"] == step:
            os.kill(os.getpid(), signum)
        return norm

    def watched(run, rows):
        for row in rows:
            if run.state["step"] == step and row == 1:
                os.kill(os.getpid(), signum)
            yield from own(run, [row])

    monkeypatch.setattr(toy_run, where, update if where == "update" else watched)
    return lambda: monkeypatch.setattr(toy_run, where, own)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_hang_up_and_the_cluster_s_signal_save_too(toy, monkeypatch, signum):  # noqa: F811
    stop_at(monkeypatch, 7, signum)
    before = signal.signal(signum, signal.SIG_DFL)  # the suite may run under nohup, which ignores a hang-up
    with pytest.raises(Interrupted, match="step-00000007") as stopped:
        toy("a")
    assert stopped.value.signum == signum
    signal.signal(signum, before)


def test_a_stop_within_an_evaluation_saves_at_once_and_a_resume_makes_it_first(
    toy,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    options = ["--eval-every", 5, "--log-every", 1, "--max-steps", 12]
    _, whole, text = toy("whole", *options)
    before = signal.getsignal(signal.SIGTERM)
    give_back = stop_at(monkeypatch, 5, signal.SIGTERM, "watched")
    with pytest.raises(Interrupted, match="step-00000005"):
        toy("a", *options)
    signal.signal(signal.SIGTERM, before)
    assert not any("odd" in line for line in lines(tmp_path / "a"))
    give_back()
    _, log, again = toy("a", *options, "--resume")
    assert [line["step"] for line in log if "odd" in line] == [5, 10]
    losses = [[line["loss"] for line in some if "loss" in line] for some in (whole, log)]
    assert losses[0] == losses[1] and final(text) == final(again)


def final(text):
    return next(line for line in text.splitlines() if line.startswith("final"))


def test_a_second_ctrl_c_counts_after_a_second(monkeypatch):
    stop = train.StopSignal(SimpleNamespace(num_processes=1, is_main_process=False))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal has sent already
        assert stop()
        stop.asked -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        stop.restore()


def wait_at_the_data():
    """In the fork: preparing the data takes long."""

    def slow(*arguments, **options):
        print("preparing", flush=True)
        try:
            time.sleep(600)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # `timeout` sends it to the whole group and to the parent
            print("cleaned up", flush=True)

    toy_run.make_loader = slow


def test_a_stop_while_data_are_prepared_ends_the_run_cleanly(tmp_path):
    log = tmp_path / "log.txt"
    process = forked.start(toy_run, ["--out", tmp_path / "a"], log, before=wait_at_the_data)
    while "preparing" not in (log.read_text() if log.exists() else ""):
        assert process.is_alive()
        time.sleep(0.05)
    process.terminate()
    assert forked.finish(process) == 143
    assert "nothing to save" in log.read_text() and "cleaned up" in log.read_text()


# --- another number of samples in a step


@pytest.mark.parametrize("size, accum, again", [(4, 1, 0), (2, 4, 0), (16, 1, 8), (1, 3, 0), (5, 1, 4)])
def test_a_resume_with_other_batches_goes_on_behind_the_samples_seen(
    toy,  # noqa: F811
    monkeypatch,
    size,
    accum,
    again,
):
    seen, note = [], toy_run.check_finite

    def check_finite(run, names, loss):
        seen.extend(names)
        note(run, names, loss)

    monkeypatch.setattr(toy_run, "check_finite", check_finite)
    toy("whole", "--batch-size", 8, "--max-steps", 8)
    order = list(seen)
    toy("a", "--batch-size", 8, "--max-steps", 3)
    seen.clear()
    _, _, text = toy("a", "--batch-size", size, "--accum", accum, "--max-steps", 4, "--resume")
    start = 24 - again
    assert seen == order[start : start + size * accum]
    told = f"8 x 1 x 1 = 8 before, {size} x 1 x {accum} = {size * accum} now"
    assert told in text and (f"{again} of them come again" in text) == bool(again)


def test_a_process_without_random_states_is_told_and_seeded(toy):  # noqa: F811
    out, _, _ = toy("a", "--max-steps", 5)
    folder = out / "checkpoints/step-00000005"
    (folder / "random_states_0.pkl").unlink()
    state = json.loads((folder / "state.json").read_text())
    del state["files"]["random_states_0.pkl"]
    (folder / "state.json").write_text(json.dumps(state))
    assert "no random states of process 0" in toy("a", "--max-steps", 6, "--resume")[2]


# --- disks


def zip_error():
    """What torch.save raises on a full disk."""
    try:
        torch.save({"a": torch.zeros(100_000)}, "/dev/full")
    except RuntimeError as error:
        return error


def safetensors_error():
    try:
        save_file({"a": torch.zeros(100)}, "/proc/no/such/file")
    except Exception as error:
        return error


def test_a_full_disk_is_known_by_every_name_and_nothing_else_is():
    full = OSError(errno.ENOSPC, "No space left on device")
    inner = SimpleNamespace(failures={0: (full, None)})
    for error in (full, OSError(errno.EDQUOT, "Quota"), zip_error(), safetensors_error(), inner):
        assert write_problem(error), error
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        FileNotFoundError(errno.ENOENT, "no"),
        ValueError("write"),
    ):
        assert not write_problem(error), error


def test_a_full_disk_at_the_end_is_one_line(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), zip_error()):
        with pytest.raises(UserError, match="head.bin: could not be written .*make room"):
            with atomic_path(tmp_path / "head.bin") as path:
                path.write_text("half")
                raise error
    with pytest.raises(torch.OutOfMemoryError), atomic_path(tmp_path / "head.bin"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not list(tmp_path.iterdir())


def test_memory_errors_of_a_save_keep_their_name(toy, monkeypatch):  # noqa: F811
    def save_state(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.Accelerator, "save_state", save_state)
    with pytest.raises(torch.OutOfMemoryError):
        toy("a", "--max-steps", 5)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path):
    arguments = ["--out", tmp_path / "a", "--save-every", 0, "--max-steps", 60]
    done = forked.call(toy_run, arguments, tmp_path / "log.txt", limit=4096)
    assert done.returncode == 2 and "Traceback" not in done.text, done.text
    assert "log.jsonl: the log could not be written (File too large)" in done.text


def full_board():
    """In the fork: TensorBoard's thread meets a full disk."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    RecordWriter.write = write


def test_a_full_disk_under_tensorboard_is_one_line(tmp_path):
    done = forked.call(toy_run, ["--out", tmp_path / "a"], tmp_path / "log.txt", before=full_board)
    assert done.returncode == 2 and "Traceback" not in done.text, done.text
    assert "could not be written (No space left on device)" in done.text


def test_a_file_system_without_rights_links_and_folder_syncs_is_enough(toy, monkeypatch):  # noqa: F811
    def refuse(number):
        def raises(*arguments, **options):
            raise OSError(number, os.strerror(number))

        return raises

    sync = os.fsync

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "no")
        sync(fd)

    monkeypatch.setattr(Path, "chmod", refuse(errno.EPERM))
    monkeypatch.setattr(Path, "symlink_to", refuse(errno.EPERM))
    monkeypatch.setattr(os, "fsync", fsync)
    out, _, _ = toy("a", "--max-steps", 10)
    assert (out / "last").read_text() == "checkpoints/step-00000010"
    assert linked(out, "last") == (out / "checkpoints/step-00000010").resolve()
    link(out, "best", out / "checkpoints/step-00000005")
    toy("a", "--max-steps", 20, "--keep", 1, "--resume")
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000020"]


# --- checksums


def test_every_file_is_summed_up_once_and_read_once(toy, monkeypatch):  # noqa: F811
    read, crc32 = [], checkpoint._crc32
    monkeypatch.setattr(checkpoint, "_crc32", lambda path: read.append(path.name) or crc32(path))
    out, _, _ = toy("a", "--max-steps", 5)
    files = sorted(json.loads((out / "last/state.json").read_text())["files"])
    assert sorted(read) == files and len(files) == 3
    read.clear()
    toy("a", "--max-steps", 5, "--resume")
    assert sorted(read) == files


def test_the_processes_of_a_machine_share_out_the_files(monkeypatch, tmp_path):
    names = ["__0_0.distcp", "__1_0.distcp", ".metadata", "optimizer.bin", "random_states_1.pkl", "w.bin"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shares = [_share(names, SimpleNamespace(process_index=r, num_processes=4)) for r in range(4)]
    assert sorted(sum(shares, [])) == sorted(names)
    assert "__1_0.distcp" in shares[1] and "random_states_1.pkl" in shares[1] and not shares[2] + shares[3]


def test_each_part_of_a_damaged_checkpoint_is_looked_at_by_someone(toy):  # noqa: F811
    out, _, _ = toy("a", "--max-steps", 5)
    for name in json.loads((out / "last/state.json").read_text())["files"]:
        data = (out / "last" / name).read_bytes()
        (out / "last" / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        whys = [damage((out / "last").resolve(), part, 2) for part in range(2)]
        assert sorted(whys) == ["", f"{name} has changed since it was saved"]
        assert find_resume(out) is None
        (out / "last" / name).write_bytes(data)
    assert find_resume(out).name == "step-00000005"


# --- several machines and clusters


def own_disk():
    """In the fork: each process stands for a machine with a disk of its own."""
    from common import run

    folder = Path(f"machine-{os.environ['RANK']}")
    folder.mkdir()
    os.chdir(folder)
    run.PROBE_SECONDS = 1


@pytest.mark.slow
def test_machines_that_do_not_share_the_run_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = world(
        toy_run, ["--out", "run"], tmp_path / "log", before=own_disk, environment={"LOCAL_WORLD_SIZE": 1}
    )
    assert done.returncode == 2 and "Traceback" not in done.text, done.text
    assert sum("give an --out on a disk that all share" in line for line in done.text.splitlines()) == 1
    assert not list(tmp_path.rglob("run"))


def only_patient_waits():
    """In the fork: fail where a process could wait for another for longer than NCCL lets it."""
    import torch.distributed as dist

    patient, new_group = [], dist.new_group

    def made(*arguments, **options):
        group = new_group(*arguments, **options)
        if options.get("timeout", timedelta()) > timedelta(hours=1):
            patient.append(group)
        return group

    dist.new_group = made
    for name in ("broadcast_object_list", "all_gather_object", "gather_object", "barrier"):
        own = getattr(dist, name)

        def call(*arguments, own=own, **options):
            known = [*arguments, *options.values()]
            assert any(group is one for group in patient for one in known), f"{own.__name__} waits 10 minutes"
            return own(*arguments, **options)

        setattr(dist, name, call)


def test_processes_that_wait_for_one_are_patient(tmp_path):
    line = [
        "--out",
        tmp_path / "a",
        "--max-steps",
        2,
        "--save-every",
        1,
        "--eval-every",
        1,
        "--resume",
        "auto",
    ]
    for steps in (2, 3):  # a run, and its resume
        line[3] = steps
        done = world(toy_run, line, tmp_path / "log", before=only_patient_waits)
        assert done.returncode == 0, done.text


def test_after_a_stop_the_processes_have_the_time_that_a_save_takes(monkeypatch):
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException

    given, listed = [], []
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM")  # as torchrun sets it
    monkeypatch.setattr(
        PContext, "start", lambda self: listed.append(os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"])
    )
    monkeypatch.setattr(PContext, "close", lambda self, death_sig, timeout: given.append(timeout))
    statuses = launch.patient_shutdown(1234)
    PContext.start(None)
    assert "SIGUSR1" in listed[0]
    ended = SimpleNamespace(subprocess_handlers={0: SimpleNamespace(proc=SimpleNamespace(returncode=143))})
    PContext.close(ended)  # another process has failed: those that wait for it are not waited for
    try:
        raise SignalException("", signal.SIGTERM)
    except SignalException as error:
        PContext.close(ended, error.sigval)
    assert given == [30, 1234] and statuses == {0: 143}


@pytest.mark.parametrize("codes, status", [({0: 143, 1: 143}, 143), ({0: -9, 1: -9}, 1), ({0: 2, 1: 75}, 2)])
def test_the_launch_status_says_whether_the_run_saved_itself(monkeypatch, codes, status, capsys):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def launcher():
        raise SignalException("", signal.SIGTERM)

    monkeypatch.setattr(launch, "patient_shutdown", lambda seconds: codes)
    with pytest.raises(SystemExit) as left:
        launch.start(launcher)
    assert left.value.code == status and ("not saved" in capsys.readouterr().err) == (status != 143)


def test_restarts_are_passed_to_torchrun(monkeypatch):
    seen = []
    monkeypatch.setattr("torch.distributed.run.main", seen.append)
    monkeypatch.setattr(launch, "patient_shutdown", lambda seconds: {})
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # which it sets too
    launch.main(__file__, "--resume", "auto")
    assert "--max_restarts=3" in seen[0] and seen[0][-3:] == [__file__, "--resume", "auto"]
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    launch.main(__file__)
    assert "--rdzv_backend c10d --rdzv_endpoint node7:29500" in " ".join(seen[1])


STUBS = {
    # one launcher on each node, and a signal that goes to all of them
    "srun": "#!/bin/bash\nshift 2\n"
    'for ((n = 0; n < SLURM_NNODES; n++)); do SLURM_NODEID=$n "$@" & runs+=($!); done\n'
    'trap \'kill -USR1 "${runs[@]}"\' USR1\nwait "${runs[@]}"; wait "${runs[@]}"\n',
    "scontrol": '#!/bin/bash\necho "$@" >>"$CALLS"\nif [ "$1" = show ]; then echo node7; fi\n',
    # stands for the launcher: a run that saves itself when it is told to, or ends
    "python": '#!/bin/bash\necho "$MASTER_ADDR $NNODES $NODE_RANK of $SRUN_CPUS_PER_TASK: $@" >>"$CALLS"\n'
    'trap "exit 138" USR1\ntouch "$STARTED-$NODE_RANK"\nfor i in $(seq $TICKS); do sleep 0.1; done\n',
}


@pytest.mark.parametrize("ticks, nodes, requeued", [(600, 1, True), (600, 2, True), (1, 1, False)])
def test_a_slurm_job_saves_itself_before_its_limit_and_is_requeued(tmp_path, ticks, nodes, requeued):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
    }
    environment |= {"CALLS": str(calls), "TICKS": str(ticks), "STARTED": str(tmp_path / "started")}
    environment |= {"SLURM_JOB_ID": "42", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[7]"}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "16"}
    script = tmp_path / "spool.sh"  # Slurm runs a copy
    script.write_text((ROOT / "common/slurm.sh").read_text())
    job = subprocess.Popen(["bash", script, "x/train.py", "--out", "a b"], env=environment, cwd="/")
    if requeued:
        while len(list(tmp_path.glob("started-*"))) < nodes:
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(forked.PATIENCE) == (138 if requeued else 0)
    said = calls.read_text()
    for rank in range(nodes):
        assert f"node7 {nodes} {rank} of 16: -m common.launch x/train.py --out a b --resume auto" in said
    assert ("requeue 42" in said) == requeued


def test_only_an_editable_installation_is_made(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks
    for name in ("setup.py", "pyproject.toml", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").touch()
    command = [sys.executable, "setup.py", "-q", "build_py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install -e ." in done.stderr and not (tmp_path / "build").exists()


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    from common.figures import new_figure, save_figure

    figure, axis = new_figure()
    axis.set_title("cost of $5_run and \\frac$")
    assert save_figure(figure, tmp_path / "a.png").is_file()
