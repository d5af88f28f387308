"""Reading files that people give: what is damaged or has another form becomes one line that names file and
field."""

import json
import pickle
from contextlib import contextmanager
from pathlib import Path

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
    except ImportError as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"{path}: not a readable {what} ({type(error).__name__}: {first_line(error)}); mend it or copy "
            "it again"
        ) from error


def read_json(path, shape=None):
    """Parsed JSON file, checked against `shape` if given."""
    with reading(path, "JSON file"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
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
    """root / name for a name that a data file gives; UserError if that leads out of `root` (.., an absolute
    path, a link)."""
    with reading(Path(root) / name, "path"):
        if not (Path(root) / name).resolve().is_relative_to(Path(root).resolve()):
            raise UserError(f"{Path(root) / name} lies outside {root}")
    return Path(root) / name


def first_line(error: Exception) -> str:
    """What an exception says, without the paragraphs of advice that libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers, and numpy arrays if asked; every other name is refused, so
    that no code runs."""

    ARRAYS = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
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
