"""Checkpoints that are whole or absent: written beside their place, synced to disk, then renamed.

    out/checkpoints/step-00000400/   accelerate's weights, optimizer and random states, and state.json
    out/last, out/best               links to one of these folders

state.json holds the loop's counters and the size and CRC-32 of every other file, so that a damaged checkpoint
is recognised before anything is loaded from it.
"""

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path

from common.errors import UserError, write_problem
from common.sharding import load_state
from common.together import from_all, from_main

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def _sync(path: Path):
    """fsync one file or folder: without it a rename can reach the disk before the data it names. safetensors
    makes files that nobody else may read; they get the rights that the user's umask gives."""
    lacks = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
    if path.is_file():
        with contextlib.suppress(OSError):  # a file system without rights
            path.chmod(0o666 & ~UMASK)
    else:
        lacks += (errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF)  # no fsync of folders there
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in lacks:
            raise


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; when the block ends well, rename it to `path`, else delete it.

    The block may write a file or make a folder there. An existing file or folder at `path` is replaced only
    then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary] if temporary.is_dir() else [temporary]:
            _sync(part)
        if path.is_dir():  # a folder cannot be replaced in one call, nor can a link to one
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.rename(path)
            if old.is_symlink():
                old.unlink()
            else:
                shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        if problem := write_problem(error):
            raise UserError(
                f"{path}: could not be written ({problem}); make room or choose another --out"
            ) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_dir(path):
    """`atomic_path` for a folder: yields it empty and existing."""
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary


def atomic_write(path, data: str | bytes):
    """Write `data` (text as UTF-8) to `path`, whole or not at all."""
    if isinstance(data, str):
        data = data.encode(errors="backslashreplace")  # names of files may be no text; JSON reads them back
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_json(path, value):
    """Write `value` as indented JSON, whole or not at all; nan and inf, which JSON does not know, become
    null."""
    atomic_write(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def atomic_csv(path, rows: list[dict]):
    """Write `rows` as CSV with a header, whole or not at all; the columns are the keys of the first row, and
    all rows have them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def link(out, name: str, target):
    """Point the link `out/name` (such as `last` or `best`) at `target`, a path inside `out`, in one step.

    On a file system without links it is a text file that holds the path.
    """
    temporary, place = Path(out) / f".{name}.{os.getpid()}.tmp", os.path.relpath(target, out)
    if (Path(out) / name).is_dir() and not (Path(out) / name).is_symlink():
        shutil.rmtree(Path(out) / name)  # of a run that was copied with its links followed
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(place)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        temporary.write_text(place)
    os.replace(temporary, Path(out) / name)


def linked(out, name: str) -> Path:
    """Where `out/name` points, whether it is a link or the text file that stands for one."""
    path = Path(out) / name
    return (Path(out) / path.read_text() if path.is_file() else path).resolve()


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _steps(out) -> list[Path]:
    """The checkpoints of a run from the oldest to the newest; copies under other names are their owner's."""
    number = {path: path.name[5:] for path in (Path(out) / "checkpoints").glob("step-*")}
    return sorted((path for path in number if number[path].isdecimal()), key=lambda path: int(number[path]))


def _files(folder: Path) -> list[str]:
    """Names of all files of a checkpoint but state.json, which describes them."""
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "state.json"
    )


def _share(names, accelerator) -> list[str]:
    """The files that this process looks at: its own, and its part of what the main process of a run wrote.

    DCP and accelerate name a rank's own file by its number; the rest is shared out over the main process's
    machine, which still has it in memory.
    """
    rank, machine = accelerator.process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own, mine = re.compile(r"(?:__|random_states_)(\d+)"), []
    for i, name in enumerate(names):
        found = own.match(Path(name).name)
        if (int(found[1]) if found else i % machine) % accelerator.num_processes == rank:
            mine.append(name)
    return mine


def save_step(accelerator, out, state: dict, keep: int = 3) -> Path:
    """Save everything that a run needs to continue to out/checkpoints/step-<state["step"]>/ and move `last`
    there.

    state: JSON-able counters of the loop with at least "step" (optimizer steps done). keep: how many of the
    newest checkpoints to keep; the one that `best` points to always stays. All processes must call this, and
    each syncs and sums up the files that it wrote. Raises UserError naming the last good checkpoint when it
    cannot be written; SystemExit on the other processes.
    """
    folder = Path(out) / "checkpoints"
    final, temporary = folder / f"step-{state['step']:08d}", folder / f".saving-{state['step']:08d}"
    whole = accelerator.is_main_process and final.exists() and not damage(final)
    if from_main(whole):  # a stop signal that arrives right after a regular save
        return final
    files, main = {}, accelerator.is_main_process

    def make():
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".saving-*"):  # of a process that was killed in mid-save
            shutil.rmtree(leftover)
        temporary.mkdir()

    def check_off():
        for name in _share(_files(temporary), accelerator):
            path = temporary / name
            files[name] = [path.stat().st_size, _crc32(path)]
            _sync(path)

    def publish():
        (temporary / "state.json").write_text(json.dumps({**_finite(state), "files": files}, indent=1))
        for part in (temporary / "state.json", *filter(Path.is_dir, temporary.rglob("*")), temporary):
            _sync(part)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run was not resumed from
        temporary.rename(final)
        _sync(folder)
        link(out, "last", final)
        best = linked(out, "best")
        # later ones are damaged, or the run would have gone on from them
        for old in [path for path in _steps(out) if int(path.name[5:]) <= state["step"]][:-keep]:
            if old.resolve() != best:
                shutil.rmtree(old)

    for action in (make if main else None, lambda: accelerator.save_state(str(temporary)), check_off):
        _together(accelerator, action, final, out)
    for part in from_all(files):
        files |= part
    _together(accelerator, publish if main else None, final, out)
    return final


def _together(accelerator, action, final: Path, out):
    """Do one part of a save on every process; if it could not be written on any, all end and the main one
    says why."""
    problem = None
    try:
        if action:
            action()
    except BaseException as error:
        problem = write_problem(error) or (isinstance(error, OSError) and str(error))
        if not problem:
            raise
    problems = [text for text in from_all(problem) if text]
    if not problems:
        return
    if not accelerator.is_main_process:
        raise SystemExit(2)
    shutil.rmtree(final.parent / f".saving-{final.name.removeprefix('step-')}", ignore_errors=True)
    found = next((f for f in reversed(_steps(out)) if not damage(f)), "none")
    raise UserError(f"{final}: could not be saved ({problems[0]}); last good checkpoint: {found}")


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint folder, or an empty string when every file is there as it was written.

    part, parts: look only at this share of the files.
    """
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
        listed = sorted(files.items(), key=lambda item: -item[1][0])[part::parts]
    except FileNotFoundError:
        return "state.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"state.json cannot be read ({error})"
    for name, (size, crc) in listed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc32(path) != crc:
            return f"{name} has changed since it was saved"
    return ""


def find_resume(out, accelerator=None) -> Path | None:
    """The newest whole checkpoint of run directory `out`, or None. A damaged one is named on stderr and
    passed over.

    With `accelerator` all processes call it: those of each machine read the files once, in equal shares.
    """
    folders = _steps(out)[::-1]
    part = parts = None
    if accelerator is not None:
        folders = from_main(folders)
        part, parts = accelerator.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for folder in folders:
        whys = [damage(folder, part or 0, parts or 1)]
        if accelerator is not None:
            whys = from_all(whys[0])
        if not any(whys):
            return folder
        if accelerator is None or accelerator.is_main_process:
            print(f"{folder}: {max(whys)}; trying the checkpoint before it", file=sys.stderr)
    return None


def load_step(accelerator, path) -> dict:
    """Load weights, optimizer and the random states of every process from `path`, which `find_resume` found
    to be whole; return the loop's counters. UserError if it is of another model."""
    path, state = Path(path), json.loads((Path(path) / "state.json").read_text())
    try:
        load_state(accelerator, path)
    except BaseException as error:
        kinds = (RuntimeError, ValueError, KeyError)
        ours = isinstance(error, kinds) or type(error).__name__ == "CheckpointException"  # of torch's DCP
        if not ours or "CUDA" in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = next((line for line in lines if "size mismatch" in line or "Size mismatch" in line), lines[-1])
        raise UserError(
            f"{path} is of another model ({why[:300]}); resume with the sizes that {path.parents[1]}/"
            "config.json names, or start anew with --overwrite"
        ) from error
    del state["files"]
    return state
