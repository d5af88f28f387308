import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # subprocesses of the tests find common/ too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # a test that reaches for a hub fails at once
    os.environ[name] = "1"

import pytest
import torch

from tests.golden import SHARED

torch.set_num_threads(1)  # pytest-xdist fills the other cores


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real data: DATA_ROOT, else ../shared/data beside the repository; skips where neither is there."""
    folder = Path(os.environ.get("DATA_ROOT") or SHARED / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set DATA_ROOT")
    return folder
