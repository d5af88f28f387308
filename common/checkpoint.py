"""Checkpoints that are whole or absent: written beside their place, synced to disk, then renamed.

    out/checkpoints/step-00000400/   accelerate's weights, optimizer and random states, and state.json
    out/last, out/best               links to one of these folders

state.json holds the loop's counters and the size and CRC-32 of every other file, so that a damaged checkpoint
is recognised before anything is loaded from it.
"""

import contextlib
import csv
import io
import json
import math
import os
import shutil
import sys
import zlib
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from common.errors import UserError
from common.sharding import load_state

# What a full disk looks like, depending on who was writing: Python, torch.save, safetensors.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it


def _sync(path: Path):
    """fsync one file or folder: without it a rename can reach the disk before the data it names. safetensors
    makes files that nobody else may read; they get the rights that the user's umask gives."""
    if path.is_file():
        path.chmod(0o666 & ~UMASK)
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
        if path.is_dir() and not path.is_symlink():  # a folder cannot be replaced in one call
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
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
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


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
    """Point the link `out/name` (such as `last` or `best`) at `target`, a path inside `out`, in one step."""
    temporary = Path(out) / f".{name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, out))
    os.replace(temporary, Path(out) / name)


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _files(folder: Path):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "state.json")


def save_step(accelerator, out, state: dict, keep: int = 3) -> Path:
    """Save everything that a run needs to continue to out/checkpoints/step-<state["step"]>/ and move `last`
    there.

    state: JSON-able counters of the loop with at least "step" (optimizer steps done). keep: how many of the
    newest checkpoints to keep; the one that `best` points to always stays. All processes must call this.
    Raises UserError naming the last good checkpoint when it cannot be written.
    """
    folder = Path(out) / "checkpoints"
    final, temporary = folder / f"step-{state['step']:08d}", folder / f".saving-{state['step']:08d}"
    whole = accelerator.is_main_process and final.exists() and not damage(final)
    if broadcast_object_list([whole])[0]:  # a stop signal that arrives right after a regular save
        return final
    try:
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".saving-*"):  # of a process that was killed in mid-save
                shutil.rmtree(leftover)
            temporary.mkdir()
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = {str(p.relative_to(temporary)): [p.stat().st_size, _crc32(p)] for p in _files(temporary)}
            (temporary / "state.json").write_text(json.dumps({**state, "files": files}, indent=1))
            for part in [*temporary.rglob("*"), temporary]:
                _sync(part)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that the run was not resumed from
            temporary.rename(final)
            _sync(folder)
            link(out, "last", final)
            best = (Path(out) / "best").resolve()
            for old in sorted(folder.glob("step-*"))[:-keep]:
                if old.resolve() != best:
                    shutil.rmtree(old)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final}: could not be saved ({error}); last good checkpoint: {find_resume(out) or 'none'}"
        ) from error
    accelerator.wait_for_everyone()
    return final


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint folder, or an empty string when every file is there as it was
    written."""
    try:
        files = json.loads((folder / "state.json").read_text())["files"]
    except FileNotFoundError:
        return "state.json is missing"
    except (ValueError, KeyError, OSError) as error:
        return f"state.json cannot be read ({error})"
    for name, (size, crc) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _crc32(path) != crc:
            return f"{name} has changed since it was saved"
    return ""


def find_resume(out, accelerator=None) -> Path | None:
    """The newest whole checkpoint of run directory `out`, or None. A damaged one is named on stderr and
    passed over.

    With `accelerator`, the main process looks and tells the others.
    """
    found = None
    if accelerator is None or accelerator.is_main_process:
        for folder in sorted((Path(out) / "checkpoints").glob("step-*"), reverse=True):
            if not (why := damage(folder)):
                found = folder
                break
            print(f"{folder}: {why}; trying the checkpoint before it", file=sys.stderr)
    return found if accelerator is None else broadcast_object_list([found])[0]


def load_step(accelerator, path) -> dict:
    """Load weights, optimizer and the random states of every process from `path`; return the loop's
    counters."""
    path = Path(path)
    if why := damage(path):
        raise UserError(f"{path}: {why}; resume from another checkpoint in {path.parent}")
    load_state(accelerator, path)
    state = json.loads((path / "state.json").read_text())
    del state["files"]
    return state
