"""What all projects share. An interpreter without the packages is told so here, before a recipe's first
import of torch."""

import sys
from importlib.util import find_spec

if find_spec("torch") is None:
    print(
        f"error: {sys.executable} has no package torch; make the environment once with `bash run_all.sh "
        "--help`, then `source .venv/bin/activate`, or activate one with the packages of requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)
