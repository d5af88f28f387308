"""Preparing IQ for the encoder and reading its weights (upstream utils.py and the loader of
train_mllm.py)."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common.errors import UserError
from common.files import read_json
from common.weights import load_weights, read_weights
from em_mllm.em_foundation.models.configuration_em import SPECTRUM_BANDS, SPECTRUM_POWERS, SiTMAEConfig


def normalize_data(x: np.ndarray, method: str = "abs", axis=None) -> np.ndarray | None:
    """ "abs": x / (max|x| + 1e-6); "std": (x - mean) / max(std, 1e-6), population std; float64; None when a
    nan or inf is present.

    axis: the axes that share statistics; default all but the first (the batch), I and Q together.
    """
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        return None
    axis = tuple(range(1, x.ndim)) if axis is None else axis
    if method == "abs":
        return x / (np.abs(x).max(axis, keepdims=True) + 1e-6)
    if method == "std":
        return (x - x.mean(axis, keepdims=True)) / np.maximum(x.std(axis, keepdims=True), 1e-6)
    raise ValueError(f"method={method!r}: choose abs or std")


def scale_to_peak(iq: np.ndarray) -> np.ndarray:
    """x / max(max|x|, 1e-6) in float32: how the multimodal program scales a signal (seed train_mllm.py)."""
    iq = np.asarray(iq, np.float32)
    return iq / np.maximum(np.abs(iq).max(initial=0.0), np.float32(1e-6))


def transform_downstream(
    batch: dict,
    patch_size: int,
    use_fs: bool,
    iq_column: str = "iq",
    label_column: str | None = None,
    reg_columns=(),
    norm_method_iq: str = "abs",
    norm_method_reg: str | None = None,
) -> dict | None:
    """Columns of N signals to encoder tensors: batch[iq_column] (N, T, 2), batch["fs"] (N,) if use_fs.

    Rows with nan or inf are dropped; IQ is normalised, clipped to [-5, 5], laid out (N, 2, T', 1) float64,
    and preceded by a zero patch (cls) and, with use_fs, a patch filled with the sampling rate. Returns {"iq":
    ..., label and regression columns}, None if no row is left.
    """
    iq = np.asarray(batch[iq_column], np.float64)
    keep = np.isfinite(iq).reshape(len(iq), -1).all(1)
    for name in reg_columns:
        keep &= np.isfinite(np.asarray(batch[name], np.float64)).reshape(len(iq), -1).all(1)
    if not keep.any():
        return None
    iq = normalize_data(iq[keep], norm_method_iq).clip(-5, 5).transpose(0, 2, 1)[..., None]
    head = [np.zeros((*iq.shape[:2], patch_size, 1))]
    if use_fs:
        rates = np.asarray(batch["fs"], np.float64)[keep]
        head.append(np.broadcast_to(rates[:, None, None, None], head[0].shape))
    out = {iq_column: np.concatenate([*head, iq], 2)}
    if label_column is not None:
        out[label_column] = np.asarray(batch[label_column])[keep]
    for name in reg_columns:
        values = np.asarray(batch[name], np.float64)[keep]
        out[name] = values if norm_method_reg is None else normalize_data(values, norm_method_reg, axis=0)
    return out


def log_spectra(iq: np.ndarray) -> np.ndarray:
    """iq (N, 2) -> (4 * 32,) float32: log of the strongest power in 32 equal bands of z, z^2, z^4 and of the
    envelope |z|^2 - 1.

    z has unit mean power. The powers undo phase modulation (z^2 of BPSK and z^4 of QPSK are lines), the
    envelope shows symbol rate and pulses: what an expert would look at first, computed from the signal alone.
    """
    z = iq[:, 0] + 1j * iq[:, 1]
    z = z / np.sqrt(np.mean(np.abs(z) ** 2) + 1e-12)
    size = -(-len(z) // SPECTRUM_BANDS) * SPECTRUM_BANDS
    waves = np.stack([np.abs(z) ** 2 - 1 if p == "envelope" else z**p for p in SPECTRUM_POWERS])
    power = np.fft.fftshift(np.abs(np.fft.fft(waves, size)) ** 2 / len(z), axes=1)
    return np.log(power.reshape(-1, size // SPECTRUM_BANDS).max(1) + 0.01).astype(np.float32)


def encoder_tokens(config: SiTMAEConfig, iq: torch.Tensor, lengths: torch.Tensor, fs=None):
    """What the encoder takes, one signal a row: iq (S, N, 2) zero padded to whole patches, lengths (S,) valid
    points, fs (S,) Hz -> samples (S, M, C*P), patch_positions and sample_ids_seq (S, M), -1 where a patch
    holds no point of the signal."""
    patches = rearrange(iq, "s (k p) c -> s k (c p)", p=config.patch_size[0])
    head = patches.new_zeros(len(iq), config.num_special, patches.shape[-1])
    if config.use_fs:
        head[:, 1] = config.in_fs_unit(fs)[:, None]
    samples = torch.cat([head, patches], 1)
    places = torch.arange(samples.shape[1], device=iq.device)
    held = -(-lengths[:, None] // config.patch_size[0])
    valid = places < config.num_special + held
    return samples, places * valid, torch.where(valid, 0, -1)


def with_special_patches(iq: np.ndarray, patch: int, fs: float | None) -> torch.Tensor:
    """iq (N, 2) -> (2, N' , 1): a zero patch (cls), a patch filled with fs unless it is None, then the IQ cut
    to whole patches."""
    whole = np.ascontiguousarray(iq[: len(iq) // patch * patch].T)
    parts = [torch.zeros(2, patch, 1)]
    if fs is not None:
        parts.append(torch.full((2, patch, 1), float(fs)))
    return torch.cat([*parts, torch.as_tensor(whole, dtype=torch.float32)[..., None]], 1)


def pack_sequence(rows: list, patch: int, max_seq_len: int):
    """Rows of signals to one padded batch.

    rows: list of lists of (C, N, 1) tensors, special patches included, N a multiple of `patch`. Returns
    patches (B, M, C * patch) with M = max_seq_len // patch, patch_positions (B, M), and sample_ids_seq, a
    list of B id vectors. A row that holds more than M patches is an error (upstream cuts the patches and
    keeps the ids).
    """
    length = max_seq_len // patch
    channels = rows[0][0].shape[0]
    patches = torch.zeros(len(rows), length, channels * patch)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    sample_ids_seq = []
    for r, row in enumerate(rows):
        cut = [rearrange(x, "c (n p) one -> n (c p one)", p=patch) for x in row]
        counts = [len(x) for x in cut]
        if sum(counts) > length:
            raise ValueError(
                f"row {r} holds {sum(counts)} patches, room is for {length}; pack fewer signals or raise "
                f"max_seq_len={max_seq_len}"
            )
        patches[r, : sum(counts)] = torch.cat(cut)
        positions[r, : sum(counts)] = torch.cat([torch.arange(n) for n in counts])
        sample_ids_seq.append(torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))
    return patches, positions, sample_ids_seq


def first_fit(lengths, room: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped into rows whose sums stay within `room`."""
    rows, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            raise ValueError(f"a signal of {lengths[i]} tokens does not fit into a row of {room}")
        for r, left in enumerate(free):
            if lengths[i] <= left:
                rows[r].append(i)
                free[r] -= lengths[i]
                break
        else:
            rows.append([i])
            free.append(room - lengths[i])
    return rows


HEADS = ("decoder.", "classifier.", "regression_head_")  # keys of what stands on the encoder


def convert_checkpoint(tensors: dict, wanted: dict, source="checkpoint") -> dict:
    """Rename and reshape a published encoder checkpoint to the keys of `wanted` (a state dict).

    Adds or removes the prefix `sit.`, splits or fuses q, k, v as the model needs, and cuts the position
    tables to the model's length.
    """
    out = {}
    prefixed = any(k.startswith("sit.") for k in wanted)
    for key, value in tensors.items():
        if key.startswith("sit.") and not prefixed:
            key = key.removeprefix("sit.")
        elif prefixed and not key.startswith(("sit.", *HEADS)):
            key = "sit." + key
        out[key] = value
    fused_wanted = any(".Wqkv." in k for k in wanted)
    for key in [k for k in out if ".attention." in k]:
        stem, rest = key.split(".attention.", 1)
        name, kind = rest.rsplit(".", 1)
        if fused_wanted and name == "query":
            parts = [out.pop(f"{stem}.attention.{n}.{kind}", None) for n in ("query", "key", "value")]
            if any(p is None for p in parts):
                raise UserError(
                    f"{source}: {stem}.attention has a query {kind} but no key or value {kind}; the file is "
                    "damaged"
                )
            out[f"{stem}.attention.Wqkv.{kind}"] = torch.cat(parts)
        elif fused_wanted and name == "dense":
            out[f"{stem}.attention.Wo.{kind}"] = out.pop(key)
        elif not fused_wanted and name == "Wqkv":
            for n, part in zip(("query", "key", "value"), out.pop(key).chunk(3)):
                out[f"{stem}.attention.{n}.{kind}"] = part
        elif not fused_wanted and name == "Wo":
            out[f"{stem}.attention.dense.{kind}"] = out.pop(key)
    for key in [k for k in out if k.endswith("position_embeddings") and k in wanted]:
        have, need = out[key].shape[0], wanted[key].shape[0]
        if have < need:
            raise UserError(
                f"{source}: {key} has {have} rows, the model needs {need}; lower max_seq_len or keep the "
                "checkpoint's patch_size and use_fs"
            )
        if have > need:
            out[key] = out[key][:need]
    return out


def find_weights(path) -> Path:
    """The weight file or folder behind --signal-encoder-path: a file, or a folder with model.safetensors (or
    a .pt beside it)."""
    path = Path(path)
    if path.is_dir() and not (path / "model.safetensors").exists() and (path / "signal_encoder.pt").exists():
        return path / "signal_encoder.pt"
    return path


def load_encoder(model, path, quiet: bool = False):
    """Load published or own encoder weights into `model` (any class of modeling_em) and print the report.

    path: weight file or folder. Decoder and head keys that the model lacks are ignored. UserError if less
    than half of the model's tensors are found, and if any tensor that both have differs in shape other than
    by position-table length.
    """
    path = find_weights(path)
    tensors = read_weights(path)
    wanted = model.state_dict()
    converted = convert_checkpoint(tensors, wanted, path)
    for key, value in converted.items():
        if key in wanted and value.shape != wanted[key].shape and not key.startswith("classifier."):
            raise UserError(
                f"{path}: {key} is {tuple(value.shape)}, the model needs {tuple(wanted[key].shape)}; "
                "use the config.json that belongs to the weights"
            )
    body = [k for k in wanted if not k.startswith(HEADS)]
    found = sum(k in converted for k in body)
    if found < 0.5 * len(body):
        raise UserError(
            f"{path}: holds only {found} of the encoder's {len(body)} tensors (it has "
            f"{', '.join([*tensors][:3])}, the model {', '.join(body[:3])}); is this an encoder checkpoint?"
        )
    return load_weights(
        model, tensors, path, min_share=0.0, convert=lambda t: converted, ignore=HEADS, quiet=quiet
    )


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def read_config(path, **overrides) -> SiTMAEConfig:
    """A .json file, or the config.json beside the weights, or sizes guessed from the weights when there is
    none; `overrides` win."""
    path = Path(path)
    file = path if path.suffix == ".json" else (path if path.is_dir() else path.parent) / "config.json"
    if file.exists():
        fields = read_json(file, {**dict.fromkeys(SIZES, int), "patch_size": [int], "max_seq_len": [int]})
        if wrong := [k for k in SIZES if not 0 < fields[k] < 2**17]:
            raise UserError(f"{file}: {wrong[0]} is {fields[wrong[0]]}, no size of an encoder")
    else:
        fields = guess_config(read_weights(find_weights(path)))
        sizes = ", ".join(f"{k} {v}" for k, v in fields.items())
        print(f"{path}: no config.json; sizes read from the weights: {sizes}")
    fields |= {k: v for k, v in overrides.items() if v is not None}
    for name in ("architectures", "transformers_version", "model_type", "dtype"):
        fields.pop(name, None)
    try:
        return SiTMAEConfig(**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: {error}") from error


def signal_of(path) -> dict | None:
    """What the config.json beside an encoder's weights says of the signals that it learned from; None if
    nothing."""
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    return read_json(file, {"signal?": {"view": str, "factor": int}}).get("signal") if file.exists() else None


def guess_config(tensors: dict) -> dict:
    """Sizes of an encoder from its tensors. Heads are 64 wide (as published) and use_fs is on, which no
    tensor shows."""
    plain = {k.removeprefix("sit."): v for k, v in tensors.items()}
    try:
        hidden = plain["embeddings.cls_token"].shape[-1]
        layers = 1 + max(int(k.split(".")[2]) for k in plain if k.startswith("encoder.layer."))
        patch = plain["embeddings.projection.weight"].shape[1] // 2
        points = plain["embeddings.position_embeddings"].shape[0] * patch - 16
        inner = plain["encoder.layer.0.w_1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"the weights hold no SiT-MAE encoder (missing {error}); give the folder of the encoder"
        ) from error
    sizes = dict(zip(SIZES, (hidden, layers, max(1, hidden // 64), inner)))
    return {**sizes, "max_seq_len": [points, 1], "patch_size": [patch, 1]}
