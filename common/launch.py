"""Start a script on every process that the environment asks for: `python -m common.launch script.py args...`

One process: the script runs here. Several (NPROC_PER_NODE x NNODES > 1): torchrun's elastic launcher.
ACCELERATE_CONFIG set: accelerate's launcher with that yaml. What these two lack and this file adds: a process
that ends with a user error ends the launch with its exit status; after a stop signal (SIGUSR1 too) all
processes have STOP_TIMEOUT seconds to save themselves, where torchrun kills them after 30, and the exit
status says whether they did. MAX_RESTARTS=3 starts failed processes again: give the script --resume auto.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from common.errors import UserError, run
from common.files import cores

CONFIGS = Path(__file__).parent / "accelerate"
STOP_TIMEOUT = 1800  # seconds; a checkpoint of 84 GB takes minutes to write
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that the launcher passes on


def from_environment(name: str, usual: int, least: int = 0) -> int:
    """A whole number that the environment gives; `usual` where it gives none."""
    text = os.environ.get(name) or str(usual)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: must be a whole number from {least} on")
    return int(text)


def main(script: str, *arguments: str):
    if not Path(script).is_file():
        raise UserError(f"{script}: no such script; give its path as seen from {Path.cwd()}")
    processes, nodes = from_environment("NPROC_PER_NODE", 1, 1), from_environment("NNODES", 1, 1)
    rank, port = from_environment("NODE_RANK", 0), from_environment("MASTER_PORT", 29500)
    address, config = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("ACCELERATE_CONFIG", "")
    restarts, meeting = from_environment("MAX_RESTARTS", 0), []
    if rank >= nodes:
        raise UserError(f"NODE_RANK={rank}: must be below NNODES={nodes}")
    if restarts:
        # Each start has a store of its own. In one store they would find where the processes of the start
        # before were, and wait for these.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        meeting = ["--rdzv_backend", "c10d"]
    if processes > 1:  # share the cores out instead of one thread for each process
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    if config:
        path = CONFIGS / f"{config}.yaml" if (CONFIGS / f"{config}.yaml").is_file() else Path(config)
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.yaml")))
            raise UserError(f"ACCELERATE_CONFIG={config}: no such file, and none of {known}")
        if "deepspeed_config" in path.read_text() and find_spec("deepspeed") is None:
            raise UserError(
                f"{path} needs DeepSpeed, which is not installed; `pip install deepspeed`, or use "
                "ACCELERATE_CONFIG=fsdp2"
            )
        if "_config:" in path.read_text() and not torch.accelerator.is_available():
            raise UserError(
                f"{path}: accelerate shards models on GPUs and NPUs only, and none is here; leave "
                "ACCELERATE_CONFIG unset"
            )
        from accelerate.commands.launch import launch_command, launch_command_parser

        options = {
            "config_file": path,
            "num_processes": processes * nodes,
            "num_machines": nodes,
            "machine_rank": rank,
            "main_process_ip": address,
            "main_process_port": port,
            "max_restarts": restarts,
        }
        options = [f"--{name}={value}" for name, value in options.items()] + meeting
        start(lambda: launch_command(launch_command_parser().parse_args([*options, script, *arguments])))
    elif processes * nodes > 1:
        from torch.distributed.run import main as torchrun

        place = [f"--nnodes={nodes}", f"--node_rank={rank}"]
        if meeting:
            place += [*meeting, "--rdzv_endpoint", f"{address}:{port}"]
        else:
            place += [f"--master_addr={address}", f"--master_port={port}"]
        place = ["--standalone"] if nodes == 1 else place
        place += [f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
        start(lambda: torchrun([*place, script, *arguments]))
    else:
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def start(launcher):
    """Run a launcher; when a process of it failed, leave with that process's exit status instead of a
    traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    statuses = patient_shutdown(from_environment("STOP_TIMEOUT", STOP_TIMEOUT))
    try:
        launcher()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(min((code for code in codes if code > 0), default=1))
    except SignalException as error:
        # By their status the processes say whether they saved themselves (75: another one had left already).
        asked, fine = int(error.sigval), (128 + error.sigval, -error.sigval, 75, 0)
        bad = {rank: code for rank, code in statuses.items() if code not in fine}
        if bad:
            told = ", ".join(f"process {rank} ended with {code}" for rank, code in bad.items())
            print(f"stopped, but not saved: {told}", file=sys.stderr)
            sys.exit(min((code for code in bad.values() if code > 0), default=1))
        sys.exit(128 + asked)


def patient_shutdown(seconds: float) -> dict[int, int]:
    """Let torchrun's processes take `seconds` to end after a stop signal to the launcher, and let SIGUSR1 be
    one.

    Those that hang because another one failed still get torchrun's own 30. Returns {rank: exit status},
    which is filled when they have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException

    begin, close, statuses = PContext.start, PContext.close, {}

    def attentive(self):
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = SIGNALS  # in place of torchrun's own list
        begin(self)

    def patient(self, death_sig=None, timeout=30):
        stopped = isinstance(sys.exc_info()[1], SignalException)
        close(self, death_sig, seconds if stopped else timeout)
        if stopped:
            handlers = getattr(self, "subprocess_handlers", {})
            statuses.update({rank: handler.proc.returncode for rank, handler in handlers.items()})

    PContext.start, PContext.close = attentive, patient
    return statuses


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m common.launch script.py [arguments]")
    run(main, *sys.argv[1:])
