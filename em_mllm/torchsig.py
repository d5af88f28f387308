"""Read the HDF5 files of TorchSig, which hold a complex signal and its metadata for each sample, in the three
layouts that its editions 2.0 to 2.2 write.

    /<n>/data, /<n>/metadata/<m>/<field>                                     2.0
    /index/<n> -> key, /data/<key>, /metadata/<key>/<field>, /component_signals/<key>        2.1
    /data (Num, T), /metadata (JSON), /component_offsets, /component_metadata (JSON)         2.2, homogeneous

The class may stand with the sample, with what it inherits from, or with its only component.
"""

import base64
import functools
import io
import json
from pathlib import Path

import h5py
import numpy as np

from common.errors import UserError
from common.files import hdf5_item, reading
from common.run import progress
from em_mllm.signal_file import plain_text, read_rate


def plain(value):
    """A value of TorchSig's JSON as Python has it; numpy numbers stand there as saved arrays."""
    kind = value.get("__torchsig_type__") if isinstance(value, dict) else None
    if kind == "dict":
        return {name: plain(item) for name, item in value["items"].items()}
    if kind == "ndarray":
        return np.load(io.BytesIO(base64.b64decode(value["data"])), allow_pickle=False)[()]
    return value


def fields(group) -> dict:
    """{field: value} of a group of scalars."""
    found = {name: hdf5_item(group, name) for name in group}
    return {name: item[()] for name, item in found.items() if isinstance(item, h5py.Dataset)}


def inherited(metadata, key: str) -> dict:
    """The fields of an object, and under them those of the objects that it belongs to."""
    out, seen = {}, set()
    while key in metadata and key not in seen:
        seen.add(key)
        out = {**fields(hdf5_item(metadata, key)), **out}
        key = plain_text(out.pop("parent_metadata_id", ""))
    return out


def samples(file):
    """Yield (data set with the signal, row in it or (), metadata, metadata of the components) of each
    sample."""
    item = functools.partial(hdf5_item, file, whole=False)  # no link leads out of the file
    data = item("data") if "data" in file else None
    if isinstance(data, h5py.Dataset) and "component_offsets" in file:
        offsets, of_parts, metadata = map(item, ("component_offsets", "component_metadata", "metadata"))
        offsets = offsets[()]
        for n, (first, last) in enumerate(zip(offsets, offsets[1:])):
            parts = [plain(json.loads(text)) for text in of_parts[first:last]]
            yield data, n, plain(json.loads(metadata[n])), parts
    elif isinstance(data, h5py.Group) and "index" in file:
        index, of_parts, metadata = map(item, ("index", "component_signals", "metadata"))
        for n in range(len(index)):
            key = plain_text(hdf5_item(index, str(n))[()])
            parts = hdf5_item(of_parts, key)[()] if key in of_parts else []
            parts = [inherited(metadata, plain_text(part)) for part in parts]
            yield hdf5_item(data, key), (), inherited(metadata, key), parts
    elif len(file) and all(name.isdigit() for name in file):
        for name in sorted(file, key=int):
            parts = item(f"{name}/metadata")
            yield item(f"{name}/data"), (), {}, [fields(hdf5_item(parts, part)) for part in parts]
    else:
        held = ", ".join(file) or "nothing"
        raise UserError(
            f"{file.filename}: is of no layout that is read here (it has {held}); write it with TorchSig's "
            "HDF5Writer or HomogeneousHDF5Writer"
        )


def read_torchsig(path: Path):
    """-> ([(class name, SNR in dB of each signal, signals (n, T, 2))], sampling rate in Hz or None).

    Samples of several components are left out and counted: no one class is theirs.
    """
    cells, rates, several = {}, set(), 0
    with reading(path, "TorchSig file"), h5py.File(path, "r") as file:
        for data, row, own, parts in progress(samples(file), desc=path.name):
            if len(parts) > 1:
                several += 1
                continue
            about = {**(parts[0] if parts else {}), **own}
            if "class_name" not in about:
                raise UserError(f"{path}: {data.name} {row}: has no class_name; write it with its metadata")
            signal = np.asarray(data[row])
            if signal.ndim != 1 or signal.dtype.kind != "c":
                raise UserError(
                    f"{path}: {data.name} {row} is {signal.shape} {signal.dtype}, expected complex (T,); "
                    "write the signals without a transform to images"
                )
            signals, levels = cells.setdefault(plain_text(about["class_name"]), ([], []))
            signals.append(np.stack([signal.real, signal.imag], 1).astype(np.float32))
            levels.append(float(about.get("snr_db", np.nan)))
            if "sample_rate" in about:
                rates.add(read_rate(about["sample_rate"], f"{path}: sample_rate"))
    lengths = sorted({len(signal) for signals, _ in cells.values() for signal in signals})
    if len(lengths) != 1 or len(rates) > 1:
        what = f"lengths {lengths}" if len(lengths) != 1 else f"sampling rates {sorted(rates)}"
        raise UserError(f"{path}: its signals have {what}, expected one; write them apart")
    if several:
        print(f"{path}: {several} samples of several signals left out")
    found = [(name, np.array(levels), np.stack(signals)) for name, (signals, levels) in sorted(cells.items())]
    return found, rates.pop() if rates else None
