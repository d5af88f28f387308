"""One process at a time writes to a run folder.

A POSIX lock on OUT/run.lock where the file system has locks: `kill -9` frees it and loader workers do not
keep it. Elsewhere (Lustre without flock) a file OUT/.run.owner, which only one process can make: it names
host and process, and its time is renewed while the process lives.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import sys
import threading
from pathlib import Path

from common.errors import UserError

BEAT = 15  # seconds between two renewals of the owner file
STALE = 120  # seconds without one after which a process on another host counts as gone
_held = {}  # {folder: open lock file, or the thread's switch}: a lock lives as long as its file


def hold(out: Path):
    """Take the folder `out` for this process until it ends; UserError naming the process that has it."""
    file = open(out / "run.lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            raise _in_use(out, f"process {file.read().strip() or '?'}") from None
        file.close()
        _own(out)
        print(
            f"{out}: this file system has no locks ({error.strerror}); {out / '.run.owner'} stands for one",
            file=sys.stderr,
        )
        return
    if owner := _living_owner(out):  # of a host that has no locks there
        raise _in_use(out, owner)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    _held[out.resolve()] = file


def _in_use(out: Path, owner: str) -> UserError:
    return UserError(f"{out} is in use by {owner}; wait for it or choose another folder")


def _own(out: Path):
    """Make the owner file and keep its time new; one that a dead process left is taken away first."""
    path = out / ".run.owner"
    if owner := _living_owner(out):
        raise _in_use(out, owner)
    dead, gone = _text(path), out / f".run.owner-{os.getpid()}"
    try:  # of two processes that find a dead owner, one renames it; of two that make a file, one succeeds
        path.rename(gone)
        if _text(gone) != dead:  # another process was faster and lives
            gone.rename(path)
        gone.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(_me())
    except FileExistsError:
        raise _in_use(out, _living_owner(out) or "another process") from None
    ended = _held[out.resolve()] = threading.Event()

    def renew():
        while not ended.wait(BEAT):
            try:
                os.utime(path)
            except OSError:  # a full or lost disk: the next one may succeed
                pass

    threading.Thread(target=renew, daemon=True).start()
    atexit.register(release)


def _me() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())})


def release():
    """Delete the owner files of this process; a process that leaves by os._exit calls it before."""
    for folder, held in list(_held.items()):
        path = folder / ".run.owner"
        if isinstance(held, threading.Event) and not held.is_set() and _text(path) == _me():
            held.set()
            path.unlink(missing_ok=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _living_owner(out: Path) -> str:
    """Who owns the folder by an owner file, or an empty string if nobody who lives does."""
    path = out / ".run.owner"
    try:
        owner = json.loads(path.read_text())
        host, pid, born = owner["host"], int(owner["pid"]), owner["born"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError):  # cut within its first write
        host, pid, born = "", 0, ""
    if host == socket.gethostname():
        return f"process {pid}" if born == _born(pid) and pid != os.getpid() else ""
    clock = out / f".run.clock-{os.getpid()}"  # the file server's time, which may differ from ours
    clock.touch()
    age = clock.stat().st_mtime - path.stat().st_mtime
    clock.unlink()
    return f"process {pid} on {host} ({age:.0f} s ago)" if age < STALE else ""


def _born(pid: int) -> str:
    """When a process of this host started, in a form that tells it from a later one with its number; "" if
    there is none."""
    try:
        # the name of a process, which stands in it, may be any bytes
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "?"
