"""Run a script's main in a fork of a server process that has imported everything: a start costs
milliseconds, not seconds.

The server (multiprocessing's forkserver) is a fresh Python that has imported and run nothing of autograd,
whose threads no fork survives: torch refuses a backward pass in a fork of a process that made one, and a
test process has made many.
"""

import collections
import gc
import importlib
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from common.errors import run
from common.figures import plt

Done = collections.namedtuple("Done", "returncode text")

PATIENCE = 600  # seconds after which what hangs is ended; says nothing of how fast a machine has to be
ROOMS = ("common", "em_mllm", "cwt_mae", "flmm", "dia_pangu", "pruning")
_server = multiprocessing.get_context("forkserver")


def start(
    script, arguments, log, limit=None, before=None, cwd=None, environment=(), errors=None
) -> multiprocessing.Process:
    """Run `script.main(script.parse_args())` in a fork of the server as the command line would, on the device
    of `stand_in`; returns the process.

    script: an imported module, or the path of a file that is run as __main__. log: file that takes stdout
    and stderr. limit: bytes beyond which a write to a file fails. before: function called in the fork first,
    one that its module's name finds. cwd: folder that the script stands in. environment: variables that
    differ from this process's. errors: file that takes stderr instead.
    """
    words = [str(a) for a in arguments]
    variables = {**os.environ, **dict(environment)}
    name = script if isinstance(script, Path) else script.__name__
    return _start(_main, name, words, log, limit, before, cwd or os.getcwd(), variables, errors or log)


def stand_in():
    """Make the processor a device whose collectives know no float64 (as HCCL's and MPS's), and whose memory
    nobody counts by CUDA's name."""
    from accelerate import Accelerator

    for name in ("reduce", "gather", "gather_for_metrics"):
        plain = getattr(Accelerator, name)

        def checked(self, value, *arguments, plain=plain, **options):
            for part in value if isinstance(value, (list, tuple)) else [value]:
                assert not (torch.is_tensor(part) and part.dtype == torch.float64), "float64 on the device"
            return plain(self, value, *arguments, **options)

        setattr(Accelerator, name, checked)
    for name in ("max_memory_allocated", "memory_allocated", "synchronize", "current_device", "set_device"):
        setattr(torch.cuda, name, None)


def _start(function, *arguments):
    imported = [name for name in sys.modules if name.split(".")[0] in ROOMS]
    before = ["tests.warm", "tests.toy_run", "tests.forked", *imported, "tests.frozen"]
    _server.set_forkserver_preload(before)  # counts at the first start, the server's own
    process = _server.Process(target=function, args=arguments)
    process.start()
    return process


def check(function, *arguments):
    """Call a module's function in a new process, which may fork; fail if it raises."""
    assert finish(_start(function, *arguments)) == 0, "the error is printed above"


def _main(script, arguments, log, limit, before, cwd, environment, errors):
    """What the fork does; it ends here, with the script's exit status."""
    code = 1
    multiprocessing.set_start_method(None, force=True)  # loaders start workers as they would without us
    gc.enable()  # see tests/frozen.py
    plt.rcParams.update({"figure.constrained_layout.use": False, "savefig.dpi": 50})  # small pictures, fast
    try:
        os.environ.clear()
        os.environ.update(environment)
        tqdm.set_lock(threading.RLock())  # the server's is shared: a killed process would keep it for ever
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if errors != log:
            with open(errors, "w") as file:
                os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(cwd)
        if limit:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        stand_in()
        if before:
            before()
        if isinstance(script, Path):
            sys.argv = [str(script), *arguments]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
        else:
            script = importlib.import_module(script)
            sys.argv = [script.__file__, *arguments]
            run(script.main, script.parse_args())
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(process) -> int:
    """Wait for a process: its exit status, negative for a signal; one that hangs is killed."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def call(script, arguments, log, **options) -> Done:
    """Run a script to its end."""
    code = finish(start(script, arguments, log, **options))
    return Done(code, log.read_text(errors="replace"))


def run_file(path, *arguments, processes=1, cwd=None, **environment):
    """Do what `python path arguments` does, or torchrun with several processes, but start at once.

    Returns what subprocess.run would: returncode (that of the first rank that failed), stdout and stderr (of
    all ranks).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {name: str(value) for name, value in environment.items()}
    with tempfile.TemporaryDirectory() as folder:
        started, folder = [], Path(folder)
        for rank in range(processes):
            if processes > 1:
                ranks = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                }
                meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                variables |= {name: str(value) for name, value in {**ranks, **meeting}.items()}
            logs = {"log": folder / f"out-{rank}", "errors": folder / f"err-{rank}"}
            started.append(start(Path(path), arguments, cwd=cwd, environment=variables, **logs))
        codes = [finish(process) for process in started]
        out, err = ("".join(p.read_text() for p in sorted(folder.glob(f"{k}-*"))) for k in ("out", "err"))
    return SimpleNamespace(returncode=next((code for code in codes if code), 0), stdout=out, stderr=err)
