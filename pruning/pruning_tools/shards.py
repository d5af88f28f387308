"""Checkpoints as lists of tensors that stay on disk: any format is read lazily, safetensors copied bytewise.

A model of 8 B values is 16 GB; pruning it renames keys and needs none of these values in memory.
"""

import errno
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from common.checkpoint import atomic_path
from common.errors import UserError
from common.files import read_json, reading
from common.weights import INDEXES, NESTS, SINGLES, read_checkpoint, strip_prefixes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 24  # bytes copied at once


@dataclass
class Entry:
    """One tensor of a checkpoint.

    read: function that returns it. where: (file, offset) of its bytes, where they lie in a file as they are.
    """

    dtype: torch.dtype
    shape: tuple
    read: Callable[[], torch.Tensor]
    where: tuple | None = None
    kind: str | None = None  # a safetensors type that torch has no name for here: its bytes are copied
    size: int | None = None  # and how many they are
    memory: tuple | None = None  # of a .bin file: where it lies, and its shape; tied tensors have one

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize if self.size is None else self.size


@dataclass
class Checkpoint:
    """An opened checkpoint.

    entries: {key: Entry}, without leading `module.` and `_orig_mod.`. files: where they lie.
    """

    path: Path
    entries: dict
    files: list
    format: str

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def open_checkpoint(path) -> Checkpoint:
    """Open a weight file or a folder of shards without reading the values.

    UserError if it is missing, cut or no checkpoint.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF files are not pruned; give the folder that this one was made of")
    files = [path] if path.is_file() else list_shards(path)
    entries = {}
    for file in files:
        for key, entry in (
            open_safetensors(file) if file.suffix == ".safetensors" else open_bin(file)
        ).items():
            entries[strip_prefixes(key)] = entry
    if not entries:
        raise UserError(f"{path}: holds no tensors")
    return Checkpoint(path, entries, files, "safetensors" if files[0].suffix == ".safetensors" else "bin")


def list_shards(folder: Path) -> list[Path]:
    for name in INDEXES:
        if (folder / name).is_file():
            shards = sorted(
                set(read_json(folder / name, {"weight_map": dict})["weight_map"].values()), key=str
            )
            for shard in shards:
                if Path(str(shard)).name != shard or not (folder / shard).is_file():
                    raise UserError(
                        f"{folder / name}: shard {shard!r} is not in the folder; was the download cut short?"
                    )
            return [folder / shard for shard in shards]
    for name in SINGLES:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: no checkpoint there (looked for {', '.join(INDEXES + SINGLES)})")


def open_safetensors(file: Path) -> dict[str, Entry]:
    size = file.stat().st_size
    with reading(file, "whole safetensors file"):
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 1 << 28):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for key, value in header.items():
            start, end = value["data_offsets"]
            entry = Entry(torch.uint8, tuple(value["shape"]), None, (file, 8 + length + start))
            if value["dtype"] in DTYPES:
                entry.dtype = DTYPES[value["dtype"]]
            else:  # newer than this file, or of less than a byte
                entry.kind, entry.size = str(value["dtype"]), end - start
            if end - start != entry.nbytes or 8 + length + end > size or start < 0:
                raise ValueError(f"{key} reaches beyond the end")
            entry.read = lambda entry=entry: read_bytes(entry)
            entries[key] = entry
    return entries


def read_bytes(entry: Entry) -> torch.Tensor:
    """The values of an entry that lies in a file, as a tensor of its own."""
    file, offset = entry.where
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    with open(file, "rb") as stream:
        stream.seek(offset)
        stream.readinto(memoryview(data.numpy()))
    return data if entry.kind else data.view(entry.dtype).reshape(entry.shape)


def open_bin(file: Path) -> dict[str, Entry]:
    """Memory-mapped torch file; the state dict itself or one under state_dict, model or module."""
    content = read_checkpoint(file)
    for nest in NESTS:
        if isinstance(content.get(nest), dict):
            content = content[nest]
    return {
        key: Entry(
            t.dtype, tuple(t.shape), lambda t=t: t, memory=(t.data_ptr(), t.shape) if t.numel() else None
        )
        for key, t in content.items()
        if isinstance(t, torch.Tensor)
    }


def derived(entry: Entry, change) -> Entry:
    """An entry whose values are change(tensor) of the same shape and dtype, computed when it is written."""
    return Entry(entry.dtype, entry.shape, lambda: change(entry.read()).to(entry.dtype))


def cast(entry: Entry, dtype: torch.dtype) -> Entry:
    """An entry in another number format; UserError, when it is written, for values beyond its range."""
    if entry.dtype == dtype or not entry.dtype.is_floating_point:
        return entry

    def read():
        before = entry.read()
        after = before.to(dtype)
        if after.isinf().sum() > before.isinf().sum():
            raise UserError(
                f"a tensor of shape {entry.shape} holds {before.abs().max():.3g}, beyond the range of "
                f"{dtype}; use bfloat16 or keep the format"
            )
        return after

    return Entry(dtype, entry.shape, read, memory=entry.memory)


# ---------------------------------------- writing


def write_safetensors(path, entries: dict[str, Entry]):
    """Write a .safetensors file, whole or not at all, one tensor at a time, copying bytes where they lie."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, entry in entries.items():
        header[key] = {
            "dtype": entry.kind or NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for entry in entries.values():
            if entry.where:
                copy_range(entry.where, entry.nbytes, stream)
            else:
                values = entry.read().contiguous()
                stream.write(
                    memoryview(values.reshape(-1).view(torch.uint8).numpy()) if values.numel() else b""
                )
        stream.truncate(8 + len(text) + offset)  # a hole at the end counts too


def copy_range(where, nbytes: int, target):
    """Append `nbytes` bytes from where = (file, offset) to the open file `target`.

    The holes of a sparse file stay holes.
    """
    file, position = where
    end = position + nbytes
    with open(file, "rb", buffering=0) as source:
        while position < end:
            data, hole = next_data(source.fileno(), position, end)
            target.seek(data - position, os.SEEK_CUR)
            source.seek(data)
            position = data
            while position < hole:
                block = source.read(min(BLOCK, hole - position))
                if not block:
                    raise UserError(f"{file}: ends before its last tensor; was the copy cut short?")
                target.write(block)
                position += len(block)


def next_data(fd: int, position: int, end: int) -> tuple[int, int]:
    """(start, stop) of the next stretch of a file that holds data, within position..end."""
    try:
        data = os.lseek(fd, position, os.SEEK_DATA)
        return min(data, end), min(os.lseek(fd, data, os.SEEK_HOLE), end)
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) == errno.ENXIO:  # nothing but a hole up to the end
            return end, end
        return position, end  # a system without holes


def write_shards(folder: Path, entries: dict[str, Entry], max_bytes: int):
    """Write entries as transformers does.

    That is one `model.safetensors`, or numbered shards of at most `max_bytes` and their index.
    """
    shards, size = [{}], 0
    for key, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = entry
        size += entry.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", entries)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(e.nbytes for e in entries.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_bin(path, entries: dict[str, Entry]):
    """Write a torch state dict, whole or not at all.

    Tensors that shared memory in the source, such as tied embeddings, still do.
    """
    with atomic_path(path) as temporary:
        torch.save({key: entry.read() for key, entry in entries.items()}, temporary)
