"""What a data set holds: found in one pass over its folders, and remembered for the next start.

    files = scan([folder], (".npz", ".csv"))                 # one pass, whatever the number of files
    arrays = remember(make, files, about={"rate": 250}, cache=cache)   # make() once, then read back
    for result in in_parallel(read, [file.path for file in files], workers=2): ...

A file is known by its whole path, its size and the time of its last change.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
import threading
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.checkpoint import atomic_path
from common.errors import UserError
from common.files import reading
from common.run import progress


class File(NamedTuple):
    """path: absolute. name: relative to the folder that was searched, with slashes. size in bytes, changed in
    nanoseconds."""

    path: str
    name: str
    size: int
    changed: int


def scan(sources, suffixes, option: str = "--data") -> list[File]:
    """The files of `sources` (files, and folders searched downwards) whose lower-case names end in one of
    `suffixes`, sorted by path; hidden files and folders are passed over.

    Each folder is listed once and each file is looked at once. Links are followed, after everything that is
    no link, so that a file has the same name whatever the order of the disk. A source such as
    shards/{000..099}.tar stands for 100 files. UserError naming `option` for a source that is not there.
    """
    suffixes, found, seen, links = tuple(suffixes), [], set(), []

    def search(folder: str, start: int):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if entry.is_symlink():
                refuse_circle(entry.path)
                if entry.is_dir():
                    links.append((entry.path, start))
                    continue
            if entry.is_dir():
                search(entry.path, start)
            elif name.lower().endswith(suffixes) and entry.is_file():
                status, path = entry.stat(), entry.path
                found.append(File(path, path[start:], status.st_size, status.st_mtime_ns))

    for source in map(os.path.abspath, expand(sources)):
        if os.path.isdir(source):
            search(source, len(source.rstrip("/")) + 1)
        elif os.path.isfile(source):
            status = os.stat(source)
            found.append(File(source, os.path.basename(source), status.st_size, status.st_mtime_ns))
        else:
            raise UserError(f"{source}: no such file or folder; check {option}")
    while links:
        links.sort(reverse=True)
        search(*links.pop())
    return sorted(dict.fromkeys(found))  # almost sorted already: soon done


def refuse_circle(link: str):
    """UserError for a link that leads to itself. A link to nothing is no file, and passed over."""
    try:
        os.stat(link)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{link}: {error.strerror}; remove the link or mend it") from error


def expand(sources) -> list[str]:
    """`sources` with each {first..last} written out, as the shell does; numbers keep their leading zeros."""
    names = []
    for name in map(str, sources):
        span = re.search(r"\{(\d+)\.\.(\d+)\}", name)
        if span is None or os.path.exists(name):
            names.append(name)
            continue
        first, last = span.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        for number in range(int(first), int(last) + 1):
            names += expand([f"{name[: span.start()]}{number:0{width}}{name[span.end() :]}"])
    return names


def tar_members(path):
    """Yield (name, first byte, size) of every file in an uncompressed tar, in their order, so that each can
    be read where it lies; hidden files are passed over.

    UserError for a compressed or damaged tar, and for one that ends before its end mark: the copy was cut
    short.
    """
    path = Path(path)
    with reading(path, "uncompressed tar"), tarfile.open(path, "r:") as archive:
        end = 0
        while member := archive.next():
            archive.members.clear()  # or it keeps them all
            end = archive.offset
            if member.issparse() or member.islnk() or member.issym():
                raise UserError(f"{path}: {member.name} is a link or has holes; pack the file itself")
            if member.isfile() and not os.path.basename(member.name).startswith("."):
                yield member.name, member.offset_data, member.size
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512) != b"\0" * 512:
                raise UserError(f"{path}: the tar ends at byte {end} without its end mark; copy it again")


def fingerprint(files, about) -> str:
    """A name for `files` and `about` (anything JSON-able): another one as soon as a file or a setting
    changes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for first in range(0, len(files), 1000):
        lines = (f"{path}\0{size}\0{changed}\n" for path, _, size, changed in files[first : first + 1000])
        digest.update("".join(lines).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def remember(make, files, about, cache) -> dict[str, np.ndarray]:
    """The arrays that make() returns by name, kept in cache/<fingerprint>.npz until a file or `about`
    changes.

    Several processes that start together wait for the one that makes them. Where the cache cannot be written,
    they are made anew each time.
    """
    path = Path(cache) / f"{fingerprint(files, about)}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".lock").touch()
    except OSError:
        return make()
    with only_one(path):
        with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        arrays = {name: np.asarray(value) for name, value in make().items()}  # for the first time, or again
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        return arrays


class only_one:
    """`with only_one(path):` lets one process of this machine at a time into the block for `path`."""

    def __init__(self, path):
        self.path = Path(path).with_suffix(".lock")

    def __enter__(self):
        self.file = open(self.path, "w", encoding="utf-8")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: each process makes its own, and the last one stays
            pass

    def __exit__(self, *error):
        self.file.close()


def in_parallel(function, items, workers: int = 0, desc: str = "reading"):
    """Yield function(item) for all items in their order, computed by `workers` processes (0: here).

    function: at the top level of a module, so that another process can import it. What it raises is raised
    here.
    """
    items = list(items)
    if workers < 2 or len(items) < 2:
        yield from progress(map(function, items), total=len(items), desc=desc, leave=False)
        return
    # fresh processes: a fork of a process with threads may hang
    context = multiprocessing.get_context("forkserver")
    # small pieces, or one process works long after the others
    chunk = max(1, min(64, len(items) // (100 * workers)))
    with ProcessPoolExecutor(min(workers, len(items)), context, _follow_parent) as pool:
        try:
            results = pool.map(functools.partial(_whole, function), items, chunksize=chunk)
            yield from progress(results, total=len(items), desc=desc, leave=False)
        except BrokenProcessPool as error:
            raise UserError(f"{desc}: one of {workers} processes was killed; is the memory full?") from error
        except BaseException:  # an error or a stop signal: nobody waits for the rest
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _whole(function, item):
    """function(item) in a worker, which ends, having cleaned up, when it is asked to stop."""
    try:
        return function(item)
    except SystemExit:
        os._exit(128 + signal.SIGTERM)


def _follow_parent():
    """In a worker: SIGTERM raises SystemExit, and a parent that was killed takes the worker with it."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's business
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    threading.Thread(target=watch, daemon=True).start()
