"""Run a script's main in a fork of a server process that has imported everything: a start costs
milliseconds, not seconds.

The server (multiprocessing's forkserver) is a fresh Python that has imported and run nothing of autograd,
whose threads no fork survives: torch refuses a backward pass in a fork of a process that made one, and a
test process has made many.
"""

import collections
import importlib
import multiprocessing
import os
import resource
import sys
import threading
import traceback

from tqdm import tqdm

from common.errors import run

Done = collections.namedtuple("Done", "returncode text")

ROOMS = ("common", "em_mllm", "cwt_mae", "flmm", "dia_pangu", "pruning")
SLOW_IMPORTS = (
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.integrations.tensor_parallel",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "tests.toy_run",
    "tests.forked",
)
_server = multiprocessing.get_context("forkserver")


def start(script, arguments, log, limit=None, before=None) -> multiprocessing.Process:
    """Run `script.main(script.parse_args())` in a fork of the server as the command line would; returns the
    process.

    script: an imported module. log: file that takes stdout and stderr. limit: bytes beyond which a write to
    a file fails. before: function called in the fork first, one that its module's name finds.
    """
    imported = [name for name in sys.modules if name.split(".")[0] in ROOMS]
    _server.set_forkserver_preload(
        [*SLOW_IMPORTS, *imported]
    )  # counts at the first call, which starts the server
    words = [str(a) for a in arguments]
    process = _server.Process(
        target=_main, args=(script.__name__, words, log, limit, before, dict(os.environ))
    )
    process.start()
    return process


def _main(name, arguments, log, limit, before, environment):
    """What the fork does; it ends here, with the script's exit status."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        own_locks()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if before:
            before()
        script = importlib.import_module(name)
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


def own_locks():
    """For a fork that may be killed: tqdm's lock is shared with the parent, which would wait for the dead
    fork for ever.
    """
    tqdm.set_lock(threading.RLock())


def finish(process, seconds=None) -> int:
    """Wait for a process: its exit status, negative for a signal; one that takes longer than `seconds` is
    killed.
    """
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def call(script, arguments, log, seconds=120, **options) -> Done:
    """Run a script to its end; one that takes longer than `seconds` is killed."""
    code = finish(start(script, arguments, log, **options), seconds)
    return Done(code, log.read_text(errors="replace"))
