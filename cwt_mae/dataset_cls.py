"""Upstream's name for dataset_finetune.py."""

from cwt_mae.dataset_finetune import *  # noqa: F403
