"""Plausible faults, put into the code one at a time, to see whether the tests see them.

    python -m tests.mutants                    all rooms, two at a time
    python -m tests.mutants flmm --jobs 1      one room
    python -m tests.mutants flmm -k interval   those whose meaning or file holds this word
    python -m tests.mutants --check            only look whether every text is found exactly once

A room's list is tests/mutants/<room>.py:

    from tests.mutants import Mutant

    MUTANTS = [
        Mutant(
            "flmm/train.py",                                   # file, from the repository's root
            "split='train'",                                   # text that stands in it exactly once
            "split='test'",                                    # what stands there instead
            "tests/test_flmm_data.py tests/test_flmm_train.py::test_splits",  # who should see it
            "training on test records",                        # what it would mean
        ),
    ]

Write what a tired colleague could write and a reader could overlook: an option ignored, the wrong split, a
95 % interval that is a 90 % one, a sign, an off-by-one, a swapped axis. Not: a syntax error, another message,
a change that alters nothing. Name the narrowest tests that should see it, files or files::tests, because each
mutant costs their time.

The command copies the tree once for each worker to a temporary folder, first runs all named tests there
without a mutant (a red test would see everything), then puts in one mutant after another and runs its tests
until one fails. It prints a line for each mutant and a share for each room and keeps them in
bench/results/mutants.json. Exit status: 0 when at least nine tenths of each room's mutants were seen, else 1;
2 for a text that is not found exactly once, or a named test that fails by itself.
"""

from typing import NamedTuple


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str
    means: str
