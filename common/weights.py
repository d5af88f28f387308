"""Reading any published weight file safely, and saying exactly what was loaded from it."""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from common.errors import UserError
from common.files import first_line, read_json, reading

# left by DDP and torch.compile, in any order
PREFIXES = ("module.", "_orig_mod.", "base_model.model._orig_mod.")
# where training scripts put the weights in a .pth
NESTS = ("model", "state_dict", "model_state_dict", "module")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")


def read_weights(path) -> dict[str, torch.Tensor]:
    """Read a weight file or folder into {key: CPU tensor}, without running any code that the file may hold.

    path: .safetensors, .bin, .pth, .pt, .ckpt, or a folder as transformers or peft write it (one file, or
    shards with an index). A checkpoint that nests its weights under model, state_dict, model_state_dict or
    module is unwrapped; the leading prefixes `module.` and `_orig_mod.` are removed, however often and in
    whatever order they stand. Tensors are memory-mapped where the format allows. Raises UserError for a file
    that is missing, cut or not weights.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weight file; check the path")
    if path.suffix == ".safetensors":
        with reading(path, "weight file"), safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    else:
        tensors = read_checkpoint(path)
        for nest in NESTS:
            if isinstance(tensors.get(nest), dict):
                tensors = tensors[nest]
    tensors = {strip_prefixes(str(k)): v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors; expected a state dict or one under {', '.join(NESTS)}")
    return tensors


def read_checkpoint(path) -> dict:
    """`torch.load(weights_only=True)` of a whole .pth dictionary (weights, config, counters); UserError if it
    is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; check the path")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 are no zip archives
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: holds more than plain weights and is refused, because loading it could run code "
            f"({reason}); re-save its state dict alone where it was made"
        ) from error
    except Exception as error:  # whatever a reader of pickles stumbles over in other files
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)}); copy it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of tensors")
    return content


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    for name in INDEXES:
        if (folder / name).is_file():
            tensors = {}
            for shard in sorted(
                set(read_json(folder / name, {"weight_map": dict})["weight_map"].values()), key=str
            ):
                if Path(str(shard)).name != shard:
                    raise UserError(
                        f"{folder / name}: shard {shard!r} lies outside the folder; the index is not to be "
                        "trusted"
                    )
                tensors |= read_weights(folder / shard)
            return tensors
    for name in SINGLES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise UserError(f"{folder}: holds no weights (looked for {', '.join(INDEXES + SINGLES)})")


def strip_prefixes(key: str) -> str:
    """Remove leading `module.` and `_orig_mod.`; the same words inside a key stay."""
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def refuse_nan(key: str, value: torch.Tensor, source):
    """UserError if a weight holds nan or inf: one would be enough to spoil every output. (-inf has its place
    in the masks that some models store.)"""
    if value.is_floating_point() and value.itemsize > 1 and value.numel() and not value.amax().isfinite():
        raise UserError(
            f"{source}: {key} holds {value.amax()}; these weights come from a run that diverged or from a "
            "damaged copy"
        )


@dataclass
class LoadReport:
    """Keys by what became of them. `mismatched` holds (key, shape in file, shape in model)."""

    loaded: list = field(default_factory=list)
    missing: list = field(default_factory=list)
    unexpected: list = field(default_factory=list)
    ignored: list = field(default_factory=list)
    converted: list = field(default_factory=list)
    mismatched: list = field(default_factory=list)

    def lines(self, source) -> str:
        """One line of counts, then one line for each kind that needs a look."""
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        text = [
            f"{source}: loaded {len(self.loaded)} of {total} tensors"
            + (f", {len(self.converted)} of them converted" if self.converted else "")
            + (f", {len(self.ignored)} in the file not needed" if self.ignored else "")
        ]
        for name in ("missing", "unexpected", "mismatched"):
            keys = getattr(self, name)
            if keys:
                shown = ", ".join(k if isinstance(k, str) else f"{k[0]} {k[1]} -> {k[2]}" for k in keys[:6])
                text.append(f"  {name} ({len(keys)}): {shown}" + (", ..." if len(keys) > 6 else ""))
        return "\n".join(text)


def load_weights(
    model, tensors: dict, source, min_share: float = 0.5, convert=None, ignore=(), quiet=False
) -> LoadReport:
    """Copy `tensors` into `model` by key and print what was loaded, missing, unexpected, mismatched and
    converted.

    source: file name for the report. min_share: least share of the model's tensors that must be loaded, else
    UserError and the model stays as it was. convert: function (tensors) -> tensors that renames or reshapes;
    a key it made or changed counts as converted. ignore: prefixes of keys in the file that the model does not
    want (a decoder, say).
    """
    wanted, report = model.state_dict(), LoadReport()
    given = convert(dict(tensors)) if convert else tensors
    for key, value in given.items():
        if key not in wanted:
            (report.ignored if ignore and key.startswith(tuple(ignore)) else report.unexpected).append(key)
        elif value.shape != wanted[key].shape:
            report.mismatched.append((key, tuple(value.shape), tuple(wanted[key].shape)))
        else:
            refuse_nan(key, value, source)
            report.loaded.append(key)
            if key not in tensors or value is not tensors[key]:
                report.converted.append(key)
    report.missing = [k for k in wanted if k not in given]
    if len(report.loaded) < max(1, min_share * len(wanted)):
        raise UserError(
            f"{source} fits this model in only {len(report.loaded)} of {len(wanted)} tensors (at least "
            f"{min_share:.0%} needed): the file has {', '.join(list(given)[:3])}, the model "
            f"{', '.join(list(wanted)[:3])}; {len(report.mismatched)} differ in shape"
            + (f", such as {report.mismatched[0]}" if report.mismatched else "")
        )
    model.load_state_dict({k: given[k] for k in report.loaded}, strict=False)
    if not quiet and os.environ.get("RANK", "0") == "0":  # once, however many processes
        print(report.lines(source))
    return report
