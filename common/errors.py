"""Errors that a user can act on: one line on stderr, no traceback, exit status 2."""

import errno
import os
import signal
import sys

# How gloo and NCCL say that another process of the run has gone.
LOST = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


class UserError(Exception):
    """Something the user can mend. The message is one line: which file or field, what is wrong, what to
    do."""


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
        main(*args)
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
    except RuntimeError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or not any(text in str(error) for text in LOST):
            raise
        leave("lost the other processes; the first error above says why", 75)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        leave(
            f"error: {error.strerror} while writing {error.filename or 'an output file'}; make room or "
            "choose another --out",
            2,
        )


def leave(message: str, status: int):
    """Print one line to stderr (ranks above 0 name themselves) and exit with `status`."""
    rank = os.environ.get("RANK", "0")
    print(("" if rank == "0" else f"[rank {rank}] ") + " ".join(message.split()), file=sys.stderr, flush=True)
    end(status)


def end(status):
    """Exit; one of several processes at once, because gloo's threads can abort it while the interpreter shuts
    down."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and (status is None or isinstance(status, int)):
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)
