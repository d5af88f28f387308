"""Reading files that people give: what is damaged or has another form becomes one line that names file and
field."""

import ast
import functools
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from common.errors import UserError

NAMES = {
    dict: "an object",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@contextmanager
def reading(path, what: str):
    """`with reading(path, "picture"):` turns whatever a library raises over a damaged file into a UserError.

    Keep the block to the reading itself: parsers of foreign files raise anything, so everything is caught.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file; check the path of the {what}") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, not a readable {what}; give the file itself") from error
    except ImportError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"{path}: not a readable {what} ({type(error).__name__}: {first_line(error)}); mend it or copy "
            "it again"
        ) from error


def read_json(path, shape=None):
    """Parsed JSON file, checked against `shape` if given."""
    with reading(path, "JSON file"):  # editors of Windows begin a file with a mark of its encoding
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if shape is not None:
        check(value, shape, path)
    return value


def check(value, shape, where, name: str = ""):
    """UserError unless `value` has the form `shape`: a type, a tuple of types, [shape of every element] or
    {field: shape}.

    A field written "name?" may be absent or null; fields that the shape does not list are not looked at. A
    whole number counts as a float, true and false count as bool alone.
    """
    kinds = dict if isinstance(shape, dict) else list if isinstance(shape, list) else shape
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if (
        not isinstance(value, (*kinds, int) if float in kinds else kinds)
        or isinstance(value, bool)
        and bool not in kinds
    ):
        expected = " or ".join(NAMES[kind] for kind in kinds)
        raise UserError(
            f"{where}: {name or 'the file'} is {NAMES.get(type(value), type(value).__name__)}, expected "
            f"{expected}"
        )
    if isinstance(shape, dict):
        for key, inner in shape.items():
            field = key.removesuffix("?")
            if value.get(field) is not None or field in value and not key.endswith("?"):
                check(value[field], inner, where, f"{name}.{field}".lstrip("."))
            elif field not in value and not key.endswith("?"):
                raise UserError(f"{where}: {name or 'the file'} has no field {field!r}")
    elif isinstance(shape, list):
        for i, element in enumerate(value):
            check(element, shape[0], where, f"{name}[{i}]")


def inside(root, name) -> Path:
    """root / name for a name that a data file gives; UserError if the name leads out of `root` (.., an
    absolute path). Links below `root` are followed: the user has made them."""
    root = Path(os.path.abspath(root))
    with reading(root / name, "path"):
        # without "..", which would leave a linked folder backwards
        path = Path(os.path.normpath(root / name))
        os.fsencode(path)  # refuses what no file system takes
        if "\0" in str(name):
            raise ValueError("a name cannot hold a NUL")
    if not path.is_relative_to(root):
        raise UserError(f"{root / name} lies outside {root}")
    return path


DEFLATE = 1032  # the largest ratio that deflate reaches (zlib.net/zlib_tech.html)
SMALL = 1 << 26  # 64 MiB are never too much


def free_memory() -> int:
    """Bytes of memory that a new array can take without swapping."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        lines = dict(line.split(":") for line in text.splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cores() -> int:
    """Processors that this process may use: a scheduler may have given it some of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_size(path, what: str, declared: int, stored: int):
    """UserError when the part `what` of a file declares more bytes than its `stored` bytes hold even when
    compressed, or than fit in memory. To be asked before anything of that size is made."""
    if declared <= SMALL:
        return
    if declared > DEFLATE * stored:
        raise UserError(
            f"{path}: {what} declares {declared / 1e9:.3g} GB but only {stored:,} bytes are stored; the file "
            "is damaged, cut short or made to fill the memory"
        )
    if declared > (free := free_memory()):
        raise UserError(
            f"{path}: {what} takes {declared / 1e9:.3g} GB and {free / 1e9:.3g} GB of memory are free; split "
            "it or use a larger machine"
        )


def hdf5_item(file, name: str, whole: bool = True, hops: int = 0):
    """The data set or group `name` of an open h5py.File or group, whose data lie in the file itself.

    Links inside the file are followed, and so are virtual data sets to what they are made of. UserError for
    links and storage in other files, for links in a circle and for sizes that the file cannot hold. whole:
    the caller reads all of it, so it has to fit in memory; else one row (the first axis) has to. hops: links
    followed so far. Raises KeyError when there is no such name.
    """
    path, item = Path(file.file.filename), file
    parts = [part for part in name.split("/") if part not in ("", ".")]
    while parts:
        part = parts.pop(0)
        link = item.get(part, getlink=True) if isinstance(item, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise UserError(
                f"{path}: {name} lies in another file, {link.filename}; copy the data into this one"
            )
        if isinstance(link, h5py.SoftLink):
            hops += 1
            if hops > 16:
                raise UserError(f"{path}: {name} is a link that leads to itself; store the data there")
            item = item.file if link.path.startswith("/") else item
            parts = [p for p in link.path.split("/") if p not in ("", ".")] + parts
            continue
        if link is None:
            raise KeyError(name)
        item = item[part]
    if isinstance(item, h5py.Dataset):
        others = [outer[0] for outer in item.external or ()]
        for source in item.virtual_sources() if item.is_virtual else ():
            if source.file_name != ".":
                others.append(source.file_name)
                continue
            if hops > 16:  # HDF5 itself would follow them until the stack is full
                raise UserError(f"{path}: {name} is made of itself; store the data there")
            try:
                hdf5_item(item.file, source.dset_name, False, hops + 1)
            except KeyError as error:  # also a name with a pattern in it, which could stand for anything
                raise UserError(
                    f"{path}: {name} is made of {source.dset_name}, which is not there"
                ) from error
        if others:
            raise UserError(f"{path}: {name} lies in another file, {others[0]}; copy the data into this one")
        declared = math.prod(item.shape or ()) * item.dtype.itemsize
        stored = declared if item.is_virtual else item.id.get_storage_size()
        rows = 1 if whole or not item.shape else max(item.shape[0], 1)
        check_size(path, name if whole else f"a row of {name}", declared // rows, -(-stored // rows))
    return item


def npy_header(file) -> tuple[tuple, bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of the array that an open file in numpy's format begins
    with."""
    version = np.lib.format.read_magic(file)
    size = file.read(2 if version == (1, 0) else 4)
    if (length := int.from_bytes(size, "little")) > 10_000:  # numpy's own limit
        raise ValueError(f"its header declares {length:,} bytes")
    return _npy_layout(version, size + file.read(length))


@functools.lru_cache(256)
def _npy_layout(version, header: bytes):
    # The files of a data set have few different headers, and numpy takes its time over each.
    if version == (3, 0):  # names of fields in UTF-8, for which numpy has no public reader
        about = ast.literal_eval(header[4:].decode())
        return about["shape"], about["fortran_order"], np.lib.format.descr_to_dtype(about["descr"])
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(io.BytesIO(header))


class _Arrays(Mapping):
    """The arrays of an open .npz by name; each is read when it is asked for, after its size was checked."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.parts = {part.filename.removesuffix(".npy"): part for part in archive.infolist()}

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, name: str) -> np.ndarray:
        part = self.parts[name]
        with self.archive.open(part) as file:
            shape, fortran, dtype = npy_header(file)
            if dtype.hasobject:
                raise ValueError("Object arrays are not read, because they could run code")
            size = math.prod(shape) * dtype.itemsize
            check_size(self.archive.filename, part.filename, size, min(part.compress_size, part.file_size))
            content = np.empty(size, np.uint8)
            for start in range(0, size, 1 << 20):
                block = file.read(min(1 << 20, size - start))
                content[start : start + (1 << 20)] = np.frombuffer(block, np.uint8)
        array = content.view(dtype) if size else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")


@contextmanager
def open_npz(path):
    """`with open_npz(path) as arrays:` reads a .npz of plain arrays, {name: array}; sizes that it only
    declares are UserErrors."""
    with zipfile.ZipFile(path) as archive:
        yield _Arrays(archive)


def first_line(error: Exception) -> str:
    """What an exception says, without the paragraphs of advice that libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers, and numpy arrays and numbers if asked; every other name is
    refused, so that no code runs."""

    ARRAYS = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }
    arrays = False

    def find_class(self, module, name):
        if self.arrays and (module, name) in self.ARRAYS:
            return super().find_class(module, name)
        raise UserError(f"it names {module}.{name}, which could run code; only plain data are read")

    def persistent_load(self, pid):
        raise UserError("it refers to objects outside the file; only plain data are read")


def read_plain_pickle(path, what: str, arrays: bool = False):
    """The content of a pickle of plain data, and of numpy arrays where `arrays` is set; text of Python 2 is
    read as Latin-1.

    Raises UserError naming the file when it is missing or damaged, or when it holds anything else.
    """
    with reading(path, what), open(path, "rb") as file:
        unpickler = _PlainUnpickler(file, encoding="latin1")
        unpickler.arrays = arrays
        try:
            return unpickler.load()
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
