import atexit
import gc
import os
import random
import re
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# What launchers, recipes and libraries would read of the variables that a user, a scheduler, an MPI or
# run_tests.sh has set: no test depends on it. A locale that is not installed makes every bash say so, and
# with MALLOC_ a process keeps the memory that it frees.
FOREIGN = (
    "(ACCELERATE|DS|FSDP|GROUP|HF|LC|LOCAL|MALLOC|MASTER|MPI|MV2|OMPI|ROLE|SLURM|TQDM|TRANSFORMERS)_|PMI|TORCH|"
    ".*_NUM_THREADS$|(LANG|LANGUAGE|COLUMNS|LINES|BASH_ENV|RANK|WORLD_SIZE|NODE_RANK|NNODES|ENV_EXTRA|PYTHON|"
    "PYTHON(DEVMODE|IOENCODING|OPTIMIZE|SAFEPATH|WARNINGS)|MAX_RESTARTS|STOP_TIMEOUT|"
    "CKPT|CONFIG|DATA|HEAD|LIMIT|LLM|LLM_MODEL_PATH|MAP|MODEL|OUT|OUTPUT_DIR|RUNS|SEEDS?|"
    "SIGNAL_ENCODER_PATH|SKIP_DONE|SMOKE|SPLIT|TASK|TASK_DIR|TEXTS)$"
)
for name in [name for name in os.environ if re.match(FOREIGN, name)]:
    del os.environ[name]

# What earlier runs and other processes leave in the usual places of caches is none of this process's.
caches = tempfile.mkdtemp(prefix="tests-")
atexit.register(shutil.rmtree, caches, ignore_errors=True)
os.environ |= {
    "PYTHONPATH": str(ROOT),  # subprocesses of the tests find common/ too
    "OMP_NUM_THREADS": "1",  # pytest-xdist fills the other cores
    "NPROC_PER_NODE": "1",  # however many GPUs a launcher finds
    "HF_HUB_OFFLINE": "1",  # a test that reaches for a hub fails at once
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HOME": f"{caches}/huggingface",
    "EM_MLLM_CACHE": f"{caches}/em_mllm",
}
# The suite is one of the CPU, also where a scheduler has given it a GPU; the plugin puts golden tests on it.
if "bench.gpu_golden" not in sys.modules:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch

from tests.effects import bfloat16_works
from tests.golden import SHARED

torch.set_num_threads(1)


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
