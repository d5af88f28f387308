"""Run a script's main in a fork of the test process, which has imported everything: a start costs milliseconds, not seconds."""

import collections
import os
import resource
import signal
import sys
import threading
import traceback

from tqdm import tqdm

from common.errors import run

Done = collections.namedtuple("Done", "returncode text")


def start(script, arguments, log, limit=None, before=None) -> int:
    """Fork, run `script.main(script.parse_args())` there as the command line would, and return the pid.

    script: an imported module. log: file that takes stdout and stderr. limit: bytes beyond which a write to a file fails.
    before: function called in the fork first.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own_locks()
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if before:
                before()
            sys.argv = [script.__file__, *map(str, arguments)]
            run(script.main, script.parse_args())
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return pid


def own_locks():
    """For a fork that may be killed: tqdm's lock is shared with the parent, which would wait for the dead fork for ever."""
    tqdm.set_lock(threading.RLock())


def finish(pid) -> int:
    """Wait for a fork: its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def call(script, arguments, log, seconds=120) -> Done:
    """Run a script to its end; one that takes longer than `seconds` is killed."""
    pid = start(script, arguments, log)
    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(seconds)
    code = finish(pid)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    return Done(code, log.read_text(errors="replace"))
