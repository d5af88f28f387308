"""A Python that starts at once: `python()` is the path of a program that stands where a launcher or a recipe
expects an interpreter, and takes `script.py args`, `-m module args`, `-c code args` and `-` (standard input).

Behind it is a server that has imported the slow libraries (warm.py) and nothing of this project. For each
call this file hands its open files, folder, variables and words to a fork of that server, passes signals on
and leaves with the fork's exit status; killed, it takes the fork with it.
"""

import functools
import json
import os
import signal
import socket
import sys

INTERPRETER = sys.executable  # tests may put a stub in its place
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def client():
    """Have a fork do what this process was started for."""
    place = socket.socket(socket.AF_UNIX)
    place.connect(os.environ["QUICK_PYTHON"])
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(place, [len(request).to_bytes(8, "big")], [0, 1, 2])
    place.sendall(request)
    answers = place.makefile()
    number = int(answers.readline())
    for name in PASSED_ON:
        signal.signal(name, lambda which, frame: os.kill(number, which))
    status = int(answers.readline() or 256)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def serve(path: str):
    """Fork for every call until the process that started the server has gone."""
    import gc
    import select
    import shutil

    import warm  # noqa: F401

    del sys.path[0]  # this folder, which an interpreter does not look into
    gc.freeze()  # a collection would walk, and so copy, everything that is imported
    door = socket.socket(socket.AF_UNIX)
    door.bind(path)
    door.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as from a terminal, also where the tests run under nohup
    print("ready", flush=True)
    while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
        caller, _ = door.accept()
        if os.fork() == 0:
            door.close()
            answer(caller)
        caller.close()
    shutil.rmtree(os.path.dirname(path))


def answer(caller: socket.socket):
    """Fork the process that runs the script; tell the caller its number and, in the end, its status."""
    import contextlib
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, files, _, _ = socket.recv_fds(caller, 8, 3)
    request = b""
    while len(request) < int.from_bytes(length, "big"):
        request += caller.recv(1 << 20)
    number = os.fork()
    if number == 0:
        caller.close()
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        run(*json.loads(request))
    caller.sendall(b"%d\n" % number)

    def follow():
        caller.recv(1)  # nothing is sent: the caller has gone
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        caller.sendall(b"%d\n" % status)
    os._exit(0)


def run(words: list, folder: str, variables: dict):
    """Be the interpreter for these words; ends this process."""
    import atexit
    import runpy
    import threading
    import traceback

    import torch

    words = words[words[0] == "-u" :]  # torchrun asks for unbuffered output
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS") or os.cpu_count()))
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    sys.executable = variables["QUICK_PYTHON"].removesuffix(".door")
    sys.path[:0] = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        if words[0] == "-m":
            sys.argv, sys.path[:0] = words[1:], [folder]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] in ("-c", "-"):
            sys.argv, sys.path[:0] = words[:1] + words[1 + (words[0] == "-c") :], [folder]
            text = words[1] if words[0] == "-c" else sys.stdin.read()
            exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(words[0]))]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code or 0)


@functools.cache
def python() -> str:
    """Start the server, which lives as long as this process; returns the path of its program."""
    import shlex
    import subprocess
    import tempfile

    program = f"{tempfile.mkdtemp()}/python"
    door, real, this = (shlex.quote(path) for path in (f"{program}.door", INTERPRETER, __file__))
    with open(program, "w") as file:
        file.write(f'#!/bin/sh\nQUICK_PYTHON={door} exec {real} -S {this} "$@"\n')
    os.chmod(program, 0o755)
    server = subprocess.Popen(
        [INTERPRETER, __file__, "--serve", f"{program}.door"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdout.readline() == b"ready\n"
    return program


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        client()
