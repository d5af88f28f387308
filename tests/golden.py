"""Where the reference tensors are, and what it means when they are not."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def golden_files(project: str, slow: tuple = ()) -> list:
    """Every reference file of `project`, for `pytest.mark.parametrize`; slow: beginnings of names that --fast
    leaves out.

    GOLDEN_DIR set: its folder must hold this project's files, else the collection fails. Unset:
    ../shared/golden beside the repository, and one skipped test with the reason where that is absent (a
    user's clone).
    """
    named = os.environ.get("GOLDEN_DIR")
    folder = (Path(named) if named else SHARED / "golden") / project
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "README.md")
    if not files and named:
        pytest.fail(f"GOLDEN_DIR={named}: no files in {folder}", pytrace=False)
    if not files:
        return [
            pytest.param(
                None, marks=pytest.mark.skip(reason=f"{folder} is absent; set GOLDEN_DIR"), id="absent"
            )
        ]
    marks = {True: pytest.mark.slow, False: ()}
    return [
        pytest.param(p, id=str(p.relative_to(folder)), marks=marks[p.name.startswith(slow)]) for p in files
    ]
