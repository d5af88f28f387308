"""Systematic ways to break a good input. A mutant is (what was done, function that does it to a path)."""

import copy
import csv
import json
import random
import shutil

import h5py
import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def broken(path):
    """What can happen to any file: gone, empty, cut, noise, a folder in its place, a link to itself."""
    size = path.stat().st_size
    yield "missing", lambda p: p.unlink()
    yield "empty", lambda p: p.write_bytes(b"")
    for share in (0.02, 0.4, 0.8):
        yield (
            f"cut at {share:.0%}",
            lambda p, share=share: p.write_bytes(p.read_bytes()[: int(share * size) or 1]),
        )
    yield "random bytes", lambda p: p.write_bytes(random.Random(0).randbytes(size))
    yield "a folder", lambda p: (p.unlink(), p.mkdir())
    yield "a link to itself", lambda p: (p.unlink(), p.symlink_to(p.name))


def other_values(value):
    """Values that do not fit where `value` stands: other types, out of range, empty."""
    yield "null", None
    if isinstance(value, bool):
        yield "text", "x"
    elif isinstance(value, (int, float)):
        yield from (("text", "x"), ("negative", -(10**12)), ("huge", 10**12), ("list", [value]))
    elif isinstance(value, str):
        yield from (("number", 7), ("list", []), ("object", {}))
    elif isinstance(value, list):
        yield from (("object", {"x": 1}), ("text", "x"), ("number", 7))
    elif isinstance(value, dict):
        yield from (("text", "x"), ("number", 7), ("list", [7]))


def places(value, path=(), depth=5):
    """Paths to every field of a JSON value, lists by their first element."""
    if path:
        yield path
    if depth and isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key), depth - 1)
    elif depth and isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        yield from places(value[0], (*path, 0), depth - 1)


def change(value, place, kind, new):
    """Set or drop the field at `place`; a 0 in it stands for every element of that list."""
    head, *rest = place
    if head == 0:
        for element in value:
            change(element, rest, kind, new)
    elif rest:
        change(value[head], rest, kind, new)
    elif kind == "dropped":
        del value[head]
    else:
        value[head] = new


def json_fields(path, fields=None):
    """Each field (or each of `fields`) dropped, null and given another wrong value, which goes through all
    kinds from field to field; text that is not UTF-8, or of another form."""
    value = json.loads(path.read_text())
    yield "not UTF-8", lambda p: p.write_bytes(p.read_bytes()[:-2] + b"\xff\xfe" + p.read_bytes()[-2:])
    yield "a number", lambda p: p.write_text("7")
    yield "nested too deep", lambda p: p.write_text("[" * 100_000)
    for number, place in enumerate(places(value)):
        name, old = ".".join(str(key) for key in place if key != 0), value
        for key in place:
            old = old[key]
        if place[-1] == 0 or fields and name not in fields:
            continue
        null, *others = other_values(old)
        for kind, new in [("dropped", None), null, *others[number % max(1, len(others)) :][:1]]:
            changed = copy.deepcopy(value)
            change(changed, place, kind, new)
            yield f"{name}={kind}", lambda p, c=changed: p.write_text(json.dumps(c, ensure_ascii=False))


def other_arrays(array):
    """Arrays that do not fit: text, no elements, an axis more, one value nan, inf or huge."""
    yield "text", np.array(["x"] * max(1, array.shape[0] if array.ndim else 1)).astype("S1")
    yield "no elements", array.reshape(-1)[:0]
    yield "an axis more", array[None, None]
    if array.dtype.kind == "f" and array.size:
        for name, bad in (("nan", np.nan), ("inf", np.inf)):
            changed = array.copy()
            changed.flat[array.size // 2] = bad
            yield name, changed
    if array.dtype.kind == "i" and array.size:
        changed = array.copy()
        changed.flat[array.size // 2] = np.iinfo(array.dtype).min
        yield "far below", changed


def _arrays(path, read, write, fields):
    content = read(path)
    for name in content if fields is None else fields:
        for kind, new in [("dropped", None), *other_arrays(content[name])]:
            changed = {k: v for k, v in content.items() if k != name} | ({} if new is None else {name: new})
            yield f"{name}={kind}", lambda p, c=changed: write(p, c)


def npz_fields(path, fields=None):
    def read(p):
        with np.load(p) as file:
            return {k: file[k] for k in file.files}

    return _arrays(path, read, lambda p, c: np.savez(p, **c), fields)


def h5_fields(path, fields=None):
    def read(p):
        with h5py.File(p) as file:
            return {k: v[()] for k, v in file.items()}

    def write(p, content):
        with h5py.File(p) as file:
            attributes = dict(file.attrs)
        p.unlink()
        with h5py.File(p, "w") as file:
            file.attrs.update(attributes)
            for key, value in content.items():
                file[key] = value

    return _arrays(path, read, write, fields)


def csv_fields(path):
    """Each column dropped, renamed, with a word in its first row; header only, no header, a short row."""
    rows = list(csv.reader(path.read_text().splitlines()))

    def write(table):
        return lambda p: p.write_text("".join(",".join(r) + "\n" for r in table))

    yield "header only", write(rows[:1])
    yield "no header", write(rows[1:])
    yield "a short row", write([rows[0], rows[1][:1], *rows[2:]])
    for i, name in enumerate(rows[0]):
        for kind, table in (
            ("dropped", [r[:i] + r[i + 1 :] for r in rows]),
            ("renamed", [[*rows[0][:i], "other", *rows[0][i + 1 :]], *rows[1:]]),
            ("word", [rows[0], [*rows[1][:i], "word", *rows[1][i + 1 :]], *rows[2:]]),
        ):
            yield f"{name}={kind}", write(table)


def tensors(path, names):
    """safetensors: each of `names` dropped, of another shape, with a nan."""
    content = load_file(path)

    def write(p, content):
        save_file(content, p, metadata=metadata)

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for name in names:
        value = content[name]
        for kind, new in (
            ("dropped", None),
            ("shape", value.new_zeros(*value.shape, 3)),
            ("nan", value * float("nan")),
        ):
            changed = {k: v for k, v in content.items() if k != name} | ({} if new is None else {name: new})
            yield f"{name}={kind}", lambda p, c=changed: write(p, c)


def tree(folder):
    """{relative path: content} of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fresh(source, target):
    """A copy of the folder `source` at `target`, in place of what was there."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target, symlinks=True)
