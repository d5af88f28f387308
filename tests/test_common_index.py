"""common/index.py: files are found once, known by their whole names, and read again only after a change."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from common.errors import UserError
from common.index import expand, fingerprint, in_parallel, remember, scan
from tests import forked


@pytest.fixture
def tree(tmp_path):
    for name in ("b/rec_1.npz", "a/rec_1.npz", "a/deep/er/x.NPZ", "a/note.txt", ".git/y.npz", "a/.z.npz"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "data"


def test_files_of_equal_names_are_told_apart_by_their_folders(tree):
    long = "病人" * 40 + ".npz"
    (tree / "a" / long).write_bytes(b"")
    assert [f.name for f in scan([tree], (".npz",))] == [
        "a/deep/er/x.NPZ",
        "a/rec_1.npz",
        f"a/{long}",
        "b/rec_1.npz",
    ]


def test_links_are_followed_and_circles_end(tree, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/c.npz").write_bytes(b"c")
    (tree / "linked").symlink_to(tmp_path / "disk")
    (tree / "a/one.npz").symlink_to(tmp_path / "disk/c.npz")
    (tree / "a/again").symlink_to(tree)
    (tree / "a/aside").symlink_to(tree / "b")
    (tree / "a/broken.npz").symlink_to(tmp_path / "nowhere")
    names = [f.name for f in scan([tree], (".npz",))]
    assert names == ["a/deep/er/x.NPZ", "a/one.npz", "a/rec_1.npz", "b/rec_1.npz", "linked/c.npz"]


def test_spans_are_written_out(tree):
    assert expand(["s/{08..11}.tar", "x"]) == ["s/08.tar", "s/09.tar", "s/10.tar", "s/11.tar", "x"]
    assert expand(["{1..2}/{0..1}"]) == ["1/0", "1/1", "2/0", "2/1"]
    assert expand(["{2..1}", "{a..b}", "{1,2}"]) == ["{a..b}", "{1,2}"]
    assert [f.name for f in scan([tree / "a/rec_{1..1}.npz"], (".npz",))] == ["rec_1.npz"]
    (tree / "a/{1..2}.npz").write_bytes(b"")
    assert [f.name for f in scan([tree / "a/{1..2}.npz"], (".npz",))] == ["{1..2}.npz"]


def test_a_source_that_is_absent_is_one_line(tree, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder; check --val"):
        scan([tmp_path / "nowhere"], (".npz",), "--val")
    assert scan([tree], (".edf",)) == []


def test_each_folder_is_listed_once(tree, monkeypatch):
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    scan([tree, tree / "b"], (".npz",))
    assert len(listed) == len(set(listed)) == 5


def test_what_was_made_is_read_back_until_a_file_or_a_setting_changes(tree, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"length": np.array([3, 4]), "name": np.array(["a", "信号"])}

    def get(rate=250):
        return remember(make, scan([tree], (".npz",)), {"rate": rate}, tmp_path / "cache")

    first, again = get(), get()
    assert len(made) == 1 and all((first[key] == again[key]).all() for key in first)
    get(rate=500)
    (tree / "a/rec_1.npz").write_bytes(b"longer than it was")
    get()
    os.utime(tree / "b/rec_1.npz", ns=(1, 1))
    get()
    assert len(made) == 4


def test_without_a_place_to_write_it_is_made_each_time(tree, tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    for _ in range(2):
        made = remember(lambda: {"x": np.arange(3)}, scan([tree], (".npz",)), {}, tmp_path / "cache")
        assert made["x"].tolist() == [0, 1, 2]


def test_a_cut_write_is_not_read_back(tree, tmp_path):
    files = scan([tree], (".npz",))

    def breaks():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remember(breaks, files, {}, tmp_path / "cache")
    assert remember(lambda: {"x": np.ones(1)}, files, {}, tmp_path / "cache")["x"] == 1


@pytest.mark.parametrize("harm", [b"", b"no archive", None])
def test_a_damaged_cache_is_made_again(tree, tmp_path, harm):
    files, cache = scan([tree], (".npz",)), tmp_path / "cache"
    for value in (1, 2, 3):
        found = remember(lambda value=value: {"x": np.full(1000, value)}, files, {}, cache)["x"]
        assert (found == min(value, 2)).all()
        if value == 1:
            path = next(cache.glob("*.npz"))
            path.write_bytes(path.read_bytes()[:-30] if harm is None else harm)


def test_no_two_lists_of_files_share_a_fingerprint(tree):
    files = scan([tree], (".npz",))
    names = {fingerprint(part, about) for part in (files, files[:-1], files[1:]) for about in ({}, {"a": 1})}
    assert len(names) == 6


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_results_come_in_order_and_errors_come_through(workers):
    items = [f"folder/{i}.npz" for i in range(150)]
    assert list(in_parallel(os.path.basename, items, workers)) == [f"{i}.npz" for i in range(150)]
    with pytest.raises(FileNotFoundError):
        list(in_parallel(os.stat, [Path("nowhere")] * 70, workers))


# --- processes that read, and what ends them


def waits(folder):
    """Read for a long time, and clean up in the end."""
    place = Path(folder) / str(os.getpid())
    place.touch()
    try:
        time.sleep(600)
    finally:
        place.rename(place.with_suffix(".cleaned"))


def reads(folder):
    """Read four files with two processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    list(in_parallel(waits, [folder] * 4, 2))


def lives(pid: int) -> bool:
    """Whether a process has not ended; in a container there may be nobody who takes its status."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stop_ends_the_readers_too(tmp_path, number, status):
    process = forked._start(reads, tmp_path)
    while len(workers := [p.name for p in tmp_path.iterdir()]) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert forked.finish(process) == status
    deadline = time.monotonic() + forked.PATIENCE
    while any(lives(int(pid)) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(tmp_path.glob("*.cleaned"))) == (2 if number == signal.SIGTERM else 0)


@pytest.mark.slow
def test_a_reader_that_is_killed_is_one_line():
    with pytest.raises(UserError, match="one of 2 processes was killed"):
        list(in_parallel(signal.raise_signal, [signal.SIGKILL] * 3, 2))
