"""Errors that a user can act on: one line on stderr, no traceback, exit status 2."""

import errno
import os
import signal
import sys
import time

# How gloo and NCCL say that another process of the run has gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")

# A disk that is full, over quota, read-only or broken, and a file that may not grow.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
# How torch.save's writer of zip files says the same.
ZIP_WRITER = ("inline_container.cc", "PytorchStreamWriter failed", "iostream error")


# What asks a run to stop: Ctrl-C, a scheduler, a closed terminal, and Slurm before its time limit.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class UserError(Exception):
    """Something the user can mend. The message is one line: which file or field, what is wrong, what to
    do."""

    def __init__(self, message: str):
        # A loader's worker passes an error on with its traceback, whose last line is the error.
        super().__init__(str(message).rpartition(f"{__name__}.UserError: ")[2].strip())


class Interrupted(Exception):
    """A run that was asked to stop and has saved itself. The message says how to resume."""

    def __init__(self, message: str, signum: int = signal.SIGINT):
        super().__init__(message)
        self.signum = signum


def run(main, *args):
    """Call `main(*args)` and turn what a user can act on into one line and an exit status.

    UserError and a full disk: 2. Interrupted, Ctrl-C: 128 + signal number, as a shell reports it. A process
    that lost the others because one of them ended: 75. Every other exception is a defect of ours and keeps
    its traceback.
    """
    try:
        _settle_process()
        main(*args)
        # One of several ends here, with its process group alive: DDP's reducer, which goes after the group
        # where a script destroys that, was seen to wait for gloo for ever, in 1 of 25 runs.
        if os.environ.get("WORLD_SIZE", "1") != "1":
            end(0)
    except SystemExit as leaving:
        end(leaving.code)
    except UserError as error:
        leave(f"error: {error}", 2)
    except Interrupted as error:
        leave(str(error), 128 + error.signum)
    except KeyboardInterrupt:
        leave("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # `... | head`: the reader left, nothing to report
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if problem := write_problem(error):
            name = getattr(error, "filename", None) or "an output file"
            leave(f"error: {problem} while writing {name}; make room or choose another --out", 2)
        if type(error).__name__ == "OutOfMemoryError":  # of torch, on a GPU
            leave(f"error: {str(error).splitlines()[0]}; lower --batch-size, or see --dry-run", 2)
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(text in str(error) for text in LOST):
            raise
        leave("lost the other processes; the first error above says why", 75)


def _settle_process():
    """What every script wants of its process, before anything else."""
    if os.environ.get("RANK", "0") == "0":  # the others may wait for it in a call that no handler interrupts
        for number in STOPS:
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _stop_early)
    for stream in (sys.stdout, sys.stderr):  # names of files may hold what a terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def catch_stops(handler) -> dict:
    """Have `handler` called for each of STOPS; returns {signal: who had it before}. Whoever started us with
    nohup asked that a closed terminal should not matter."""
    caught = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


def _stop_early(signum, frame):
    """End where nothing can be saved: in preparations, or in a script that trains nothing. What is half
    written is deleted on the way out, which a further signal does not cut short."""
    catch_stops(signal.SIG_IGN)
    print(f"stopped by {signal.Signals(signum).name}; nothing to save here", file=sys.stderr, flush=True)
    sys.exit(128 + signum)


def write_problem(error: BaseException) -> str:
    """What kept a file from being written, such as a full disk; "" if the error is another one.

    Python says it by an OSError, safetensors by an error of its own, torch.save by a RuntimeError of its zip
    writer, and a distributed save by the errors of all processes. Other RuntimeErrors are none: a GPU without
    memory, say.
    """
    for inner in getattr(error, "failures", {}).values():  # torch.distributed.checkpoint
        if problem := write_problem(inner[0]):
            return problem
    if isinstance(error, OSError) and error.errno in FULL:
        return error.strerror
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if type(error).__name__ == "SafetensorError" and "os error" in text:
        return text
    if isinstance(error, RuntimeError) and any(word in str(error) for word in ZIP_WRITER):
        return "the file system took no more data"
    return ""


def leave(message: str, status: int):
    """Print one line to stderr (ranks above 0 name themselves) and exit with `status`."""
    rank = os.environ.get("RANK", "0")
    # A launcher that saw another process end before this one would end it before it has said why.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(("" if rank == "0" else f"[rank {rank}] ") + " ".join(message.split()), file=sys.stderr, flush=True)
    end(status)


def end(status):
    """Exit; one of several processes at once, because gloo's threads can abort it while the interpreter shuts
    down."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and (status is None or isinstance(status, int)):
        if status == 2 and os.environ.get("RANK", "0") != "0":
            time.sleep(1)  # the main process says why, and the launcher ends all when it sees the first end
        from common.lock import release

        release()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
