"""The built-in data of this room are dia_pangu's phantoms and reports: this opens its make_data.py.

python pruning/make_data.py --out data/dia_pangu
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.errors import run
from dia_pangu.make_data import main, parse_args

if __name__ == "__main__":
    run(main, parse_args())
