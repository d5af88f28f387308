"""Exit status 0 when this interpreter holds every package of the given lists (-r file ...) in the supported
range.

The range comes from pyproject.toml, for packages not named there any version counts. Standard library only,
because it runs before anything is installed.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def names(path: str) -> list[str]:
    """Package names of a requirements file, each once."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return sorted({re.split(r"[=<>;\s]", line)[0] for line in lines if line})


def numbers(text: str) -> tuple[int, ...]:
    """`2.11.0+cu130` -> (2, 11, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def main():
    project = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    least = {n.lower(): numbers(v) for n, v in re.findall(r'"([\w.-]+)\s*>=\s*([\d.]+)', project)}
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        sys.exit(f"Python {sys.version.split()[0]} is outside 3.10 to 3.13")
    for path in sys.argv[2::2]:
        for name in names(path):
            try:
                found = version(name)
            except PackageNotFoundError:
                sys.exit(f"{name} is not installed")
            if numbers(found) < least.get(name.lower(), ()):
                sys.exit(f"{name} {found} is older than {'.'.join(map(str, least[name.lower()]))}")


if __name__ == "__main__":
    main()
