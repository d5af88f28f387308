"""Door to src/train.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "src" / "train.py"), run_name=__name__)
