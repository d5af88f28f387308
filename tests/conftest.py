import gc
import os
import random
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # subprocesses of the tests find common/ too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start
# The suite is one of the CPU, also where there is a GPU; bench/gpu.sh shows the GPU to the golden tests.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# The launchers let a process keep the memory that it frees; a test of what a run takes has to see it go.
for name in [name for name in os.environ if name.startswith("MALLOC_")]:
    del os.environ[name]
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # a test that reaches for a hub fails at once
    os.environ[name] = "1"

import numpy as np
import pytest
import torch

from tests.effects import bfloat16_works
from tests.golden import SHARED

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # pytest-xdist fills the other cores


class Engine:
    """Autograd's engine, which notes that it ran in this process."""

    def __init__(self, engine):
        self.engine, self.ran = engine, False

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def run_backward(self, *arguments, **options):
        self.ran = True
        return self.engine.run_backward(*arguments, **options)


engine = torch.autograd.Variable._execution_engine = Engine(torch.autograd.Variable._execution_engine)


def refuse_fork_after_autograd(event, _):
    if event == "os.fork" and engine.ran:
        raise RuntimeError(
            "a fork after autograd ran can hang or fail: start the script with tests/forked.py"
        )


sys.addaudithook(refuse_fork_after_autograd)


def pytest_collection_finish():
    gc.freeze()  # what the imports have made is not walked again by every collection


def seed(name):
    """Seed all generators by a name, so that what is drawn does not depend on the tests that ran before."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed(item.nodeid)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data: DATA_ROOT, else ../shared/data beside the repository; skips without either."""
    folder = Path(os.environ.get("DATA_ROOT") or SHARED / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set DATA_ROOT")
    return folder


@pytest.fixture
def bfloat16():
    """Skip where torch's attention in bfloat16 does not heed ATEN_CPU_CAPABILITY."""
    if not bfloat16_works():
        pytest.skip("torch's bfloat16 attention does not heed ATEN_CPU_CAPABILITY")
