"""Fixtures of good inputs that several test files share and none writes to: made once in a process."""

import functools

import pytest


def once(make):
    """A fixture of what `make(...)` returns. A session's fixture would not do: it is made anew for each test
    file that imports it."""
    made = []

    @functools.wraps(make)
    def fixture(**needed):
        if not made:
            made.append(make(**needed))
        return made[0]

    return pytest.fixture(scope="session")(fixture)
