"""Upstream's name for test.py: class probabilities of sliding windows are its option --unlabelled."""

import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import run
from cwt_mae.test import main, parse_args

if __name__ == "__main__":
    run(main, parse_args())
