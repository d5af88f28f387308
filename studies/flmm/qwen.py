"""The built-in study with a tiny base of the Qwen2.5-VL class: python studies/flmm/qwen.py

It pre-trains the base for 400 steps instead of 1200, because a step takes twice the time of the LLaVA class.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.flmm.builtin import main
from studies.recipe import recipe

if __name__ == "__main__":
    recipe(main, "qwen", 400)
