"""Frozen features on disk: run the base once, then train heads without it.

One HDF5 file per process, one group per sample. Maps are fp16 relative to each map's own maximum (attention
over hundreds of columns falls into fp16's subnormal range otherwise); states and image embeddings are fp16,
or float32 where one lies beyond its range, as some of Gemma 3 do; masks are packed bits.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import Dataset

from common.checkpoint import atomic_path
from common.errors import UserError
from common.run import progress
from common.together import meet
from flmm.models.flmm import extract
from flmm.models.mask_head.mask_refiner import digest

MASKS = {"masks", "gt_masks", "ignore"}  # the last one of ReasonSeg alone


def write_cache(folder, base, sam_encoder, dataset, fingerprint, accelerator, batch_size=8):
    """Extract features of every sample of `dataset`, shared out over the processes, to
    folder/features-<rank>.h5.

    fingerprint: dictionary of what the features depend on; kept in the files and compared by CachedFeatures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    with atomic_path(folder / f"features-{accelerator.process_index:05d}.h5") as temporary:
        with h5py.File(temporary, "w") as file:
            file.attrs["fingerprint"] = json.dumps(fingerprint, sort_keys=True)
            file.attrs["dims"] = base.dims
            file.attrs["processes"], file.attrs["samples"] = accelerator.num_processes, len(dataset)
            stored = {}  # {picture: where its SAM embedding lies in the file}
            for start in progress(range(0, len(mine), batch_size), accelerator, desc="caching features"):
                rows = mine[start : start + batch_size]
                samples = [dataset[i] for i in rows]
                for i, sample, feature in zip(rows, samples, extract(base, None, samples)):
                    group = file.create_group(f"{i:08d}")
                    _write(group, sample, feature)
                    if sam_encoder is not None:
                        share_embedding(group, sample, sam_encoder, stored)
    meet()


def share_embedding(group, sample, sam_encoder, stored):
    """Write the SAM embedding of a sample's picture, or link to that of an earlier sample: pictures of PNG
    and RefCOCO are the same, and a picture has many captions."""
    pixels = sample.get("sam_pixels", sample["image"])
    pixels = pixels if torch.is_tensor(pixels) else sam_encoder.prepare(pixels)
    key = digest(pixels)
    if key not in stored:
        group["image_embedding"] = halved(sam_encoder([pixels])[0])
        stored[key] = group["image_embedding"]
    else:
        group["image_embedding"] = stored[key]


def halved(values):
    """Values as fp16, or as float32 where fp16 would make infinity of one."""
    values = values.float().cpu()
    return (values if values.abs().max() > torch.finfo(torch.half).max else values.half()).numpy()


def _write(group, sample, feature):
    maps = feature["mask_attentions"].float().cpu()
    scale = maps.amax((2, 3)).clamp(min=1e-30)
    group["maps"], group["scale"] = (maps / scale[..., None, None]).half().numpy(), scale.numpy()
    group["hidden_states"] = halved(feature["hidden_states"])
    group["mask_ids"] = feature["mask_ids"].cpu().numpy()
    for name in MASKS & sample.keys():
        group[name] = np.packbits(np.asarray(sample[name], bool), axis=-1)
        group[name].attrs["width"] = sample[name].shape[-1]
    about = {name: feature[name] for name in ("image_size", "meta_data", "unpad")}
    about |= {name: sample[name] for name in ("file_name", "mask_infos")}
    group.attrs["about"] = json.dumps(about)


class CachedFeatures(Dataset):
    """Features and masks of `write_cache`, read lazily; `dims` = (channels, layers, hidden size) of the
    base."""

    def __init__(self, folder, fingerprint=None):
        self.files, self.where, anew = {}, {}, "delete it to write it anew"
        paths = sorted(Path(folder).glob("features-*.h5"))
        if not paths:
            raise UserError(f"{folder}: holds no cached features")
        for path in paths:
            try:
                with h5py.File(path, "r") as file:
                    stored = json.loads(file.attrs["fingerprint"])
                    samples, processes = int(file.attrs["samples"]), int(file.attrs["processes"])
                    self.dims = tuple(int(d) for d in file.attrs["dims"])
                    self.where.update({int(name): path for name in file})
            except (OSError, KeyError, ValueError) as error:
                raise UserError(f"{path}: not a feature cache ({error}); {anew}") from error
            fresh = json.loads(json.dumps(fingerprint)) if fingerprint else stored
            for name in sorted(stored.keys() | fresh.keys()):
                if stored.get(name) != fresh.get(name):
                    raise UserError(
                        f"{path}: was made with {name} = {stored.get(name)}, now {fresh.get(name)}; "
                        "choose another --cache-attention folder or delete this one"
                    )
            if processes != len(paths):
                raise UserError(f"{folder}: {len(paths)} files, but written by {processes} processes; {anew}")
        if len(self.where) != samples:
            raise UserError(f"{folder}: {len(self.where)} of {samples} samples are there; {anew}")

    def __len__(self):
        return len(self.where)

    def __getitem__(self, index):
        path = self.where[index]
        if path not in self.files:  # opened in the process that reads: h5py handles do not survive a fork
            self.files[path] = h5py.File(path, "r")
        group = self.files[path][f"{index:08d}"]
        sample = {**json.loads(group.attrs["about"]), "image_embedding": None}
        for name in ("maps", "scale", "hidden_states", "mask_ids", "image_embedding"):
            if name in group:
                values = torch.from_numpy(group[name][()])
                sample[name] = values.float() if values.is_floating_point() else values
        sample["mask_attentions"] = sample.pop("maps") * sample.pop("scale")[..., None, None]
        for name in MASKS & group.keys():
            width = int(group[name].attrs["width"])
            sample[name] = torch.from_numpy(np.unpackbits(group[name][()], axis=-1, count=width))
        return sample
