"""Upstream's name for the validation set: dataset_val(data, grid=...) is CTRGDataset(data, "val", ...)."""

from functools import partial

from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset

dataset_val = partial(CTRGDataset, split="val")
