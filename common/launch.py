"""Start a script on every process that the environment asks for: `python -m common.launch script.py args...`

One process: the script runs here. Several (NPROC_PER_NODE x NNODES > 1): torchrun's elastic launcher.
ACCELERATE_CONFIG set: accelerate's launcher with that yaml. A process that ends with a user error ends the
launch with its exit status.
"""

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from common.errors import UserError, run

CONFIGS = Path(__file__).parent / "accelerate"


def main(script: str, *arguments: str):
    processes, nodes = int(os.environ.get("NPROC_PER_NODE", 1)), int(os.environ.get("NNODES", 1))
    rank = os.environ.get("NODE_RANK", "0")
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    config = os.environ.get("ACCELERATE_CONFIG", "")
    if processes > 1:  # share the cores out instead of one thread for each process
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
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

        options = [
            "--config_file",
            str(path),
            "--num_processes",
            str(processes * nodes),
            "--num_machines",
            str(nodes),
            "--machine_rank",
            rank,
            "--main_process_ip",
            address,
            "--main_process_port",
            port,
        ]
        start(lambda: launch_command(launch_command_parser().parse_args([*options, script, *arguments])))
    elif processes * nodes > 1:
        from torch.distributed.run import main as torchrun

        place = [
            f"--nnodes={nodes}",
            f"--node_rank={rank}",
            f"--master_addr={address}",
            f"--master_port={port}",
        ]
        place = ["--standalone"] if nodes == 1 else place
        start(lambda: torchrun([*place, f"--nproc_per_node={processes}", script, *arguments]))
    else:
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def start(launcher):
    """Run a launcher; when a process of it failed, leave with that process's exit status instead of a
    traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launcher()
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        sys.exit(min((code for code in codes if code > 0), default=1))
    except SignalException as error:  # the processes have saved themselves
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m common.launch script.py [arguments]")
    run(main, *sys.argv[1:])
