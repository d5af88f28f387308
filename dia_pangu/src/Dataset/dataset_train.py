"""Upstream's name for the training set: dataset_train(data, grid=...) is CTRGDataset(data, "train", ...)."""

from functools import partial

from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset

dataset_train = partial(CTRGDataset, split="train")
