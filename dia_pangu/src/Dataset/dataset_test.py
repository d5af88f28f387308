"""Upstream's name for the test set: dataset_test(data, grid=...) is CTRGDataset(data, "test", ...)."""

from functools import partial

from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset

dataset_test = partial(CTRGDataset, split="test")
