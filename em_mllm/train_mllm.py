"""The door under upstream's name: train_mllm.py is train.py here, its MultiModalModel lives in model.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

from em_mllm.model import MultiModalModel  # noqa: F401
from em_mllm.train import main, parse_args, run

if __name__ == "__main__":
    run(main, parse_args())
