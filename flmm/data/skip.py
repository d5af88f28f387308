"""Faulty items: each ends the run with one line, or with --skip-bad is left out and counted."""

import sys
from contextlib import contextmanager

from torch.utils.data import Dataset

from common.errors import UserError


class Bad:
    """Collects what is wrong with the items of a data set; without `skip` the first fault is raised."""

    def __init__(self, skip=False):
        self.skip, self.faults = skip, []

    @contextmanager
    def collect(self, where=""):
        """`with bad.collect(name):` names a UserError of the block; with `skip` it is kept and not raised."""
        try:
            yield
        except UserError as error:
            text = str(error) if not where or str(error).startswith(where) else f"{where}: {error}"
            if not self.skip:
                raise UserError(text) from None
            self.faults.append(text)


class SkipBad(Dataset):
    """A data set whose items may fail when they are decoded: such an item is told on stderr and left out.

    replace: training needs equally many items in every batch and process, so there the next good item takes
    its place; in evaluation the item is None and `keep_good` drops it.
    """

    def __init__(self, dataset, replace: bool):
        self.dataset, self.replace, self.bad = dataset, replace, set()

    def set_epoch(self, epoch):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        for step in range(len(self.dataset) if self.replace else 1):
            at = (index + step) % len(self.dataset)
            try:
                return self.dataset[at]
            except UserError as error:
                if at not in self.bad:
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
                self.bad.add(at)
        if self.replace:
            raise UserError("--skip-bad: not one item can be read; see the lines above")
        return None


def keep_good(samples) -> list:
    """Collate function: the samples as a list, without those that were left out."""
    return [sample for sample in samples if sample is not None]
