"""Runs pytest in forks of one process that has imported the libraries: a mutant costs its tests, no import.

Started by __main__.py in a copy of the repository. Reads lines of JSON {arguments, log, seconds} and answers
each with pytest's exit status, or "timeout".
"""

import importlib
import json
import os
import signal
import sys
import time

sys.path[0] = os.getcwd()  # the copy, not this folder
for library in ("torch", "transformers", "accelerate", "peft", "sklearn", "scipy.signal", "h5py", "pytest"):
    importlib.import_module(library)


def run(arguments: list[str], log: str):
    """In the fork: pytest, with everything that it prints in `log`; leaves with its exit status."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = sys.modules["pytest"].main(arguments)
    sys.stdout.flush()
    os._exit(status)


def wait(child: int, seconds: float):
    """The exit status of the fork `child`; after `seconds` it is killed with all that it started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout"


for line in sys.stdin:
    job = json.loads(line)
    fork = os.fork()
    if fork == 0:
        run(job["arguments"], job["log"])
    print(json.dumps(wait(fork, job["seconds"])), flush=True)
