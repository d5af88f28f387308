"""`cd tests && python diagnose_image_grid_thw.py`: door to flmm/diagnose_image_grid_thw.py."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

from common.errors import run
from flmm.diagnose_image_grid_thw import main, parse_args

if __name__ == "__main__":
    run(main, parse_args())
