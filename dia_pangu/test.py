"""Door to src/test.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "src" / "test.py"), run_name=__name__)
