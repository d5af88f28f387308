"""Tar shards under several processes and loader workers: every sample once an epoch, and an exact resume."""

import multiprocessing
import re
import tarfile
import zlib

import numpy as np
import pytest
import torch

from cwt_mae.dataset import PhysioSignalDataset, Preprocess, build_store
from em_mllm.dataset import SignalDataset
from em_mllm.pretrain import signal_files
from tests import toy_run
from tests.sharded import world
from tests.test_em_mllm_shards import npy, write_tar

pytestmark = pytest.mark.slow
SHARDS = "shards/{000..002}.tar"


class Samples(torch.utils.data.Dataset):
    """The samples of SHARDS for toy_run.py, each named by what it holds."""

    def __init__(self, dataset, key: str):
        self.dataset, self.key = dataset, key

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x = torch.as_tensor(self.dataset[index][self.key]).float().flatten()
        name = f"{zlib.crc32(x.numpy().tobytes()):08x}"
        return {"x": x[:8], "weight": torch.tensor(1), "name": name}


def em_signals():
    return Samples(SignalDataset(signal_files([SHARDS])), "iq")


def cwt_windows():
    store = build_store([SHARDS], Preprocess(fs=100), "cache", quiet=True)
    return Samples(PhysioSignalDataset(store, 200, "test"), "x")


def told(make):
    """In the fork: toy_run.py trains on what make() returns and tells each sample of each step."""
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as in a script
    note = toy_run.check_finite

    def check_finite(run, names, loss):
        print("seen", run.state["step"], " ".join(names), flush=True)
        note(run, names, loss)

    toy_run.Noise, toy_run.check_finite = make, check_finite


def tell_em():
    told(em_signals)


def tell_cwt():
    told(cwt_windows)


def write_em(folder):
    rng = np.random.default_rng(0)
    for shard in range(3):
        members = {f"{i}.npy": npy(rng.standard_normal((64, 2)).astype("f4")) for i in range(5 + 3 * shard)}
        write_tar(folder / f"{shard:03d}.tar", members)


def write_cwt(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for i in range(3):
                np.savez(folder / "x.npz", sig=rng.standard_normal(400 + 200 * shard), fs=100)
                archive.add(folder / "x.npz", f"p{shard}/{i}.npz")
        (folder / "x.npz").unlink()


@pytest.mark.parametrize("write, tell, count", [(write_em, tell_em, 24), (write_cwt, tell_cwt, 27)])
def test_processes_and_workers_see_each_sample_once_and_resume_where_they_were(
    tmp_path, monkeypatch, write, tell, count
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "shards")

    def run(name, steps, *more):
        line = ["--out", tmp_path / name, "--batch-size", 2, "--workers", 2, "--save-every", 0, *more]
        done = world(toy_run, [*line, "--max-steps", steps], tmp_path / "log", before=tell)
        assert done.returncode == 0, done.text
        seen = {}  # {step: [samples of one process]} in any order of the processes
        for step, names in re.findall(r"^seen (\d+) (.*)$", done.text, re.M):
            seen.setdefault(int(step), []).append(names)
        return {step: sorted(some) for step, some in seen.items()}, done.text.split("final")[1].split()[0]

    steps = count // 4
    whole, weights = run("whole", 2 * steps)
    for epoch in (range(steps), range(steps, 2 * steps)):
        names = " ".join(names for step in epoch for names in whole[step]).split()
        assert len(names) == len(set(names)) == 4 * steps
    first, _ = run("cut", steps - 2)
    rest, again = run("cut", 2 * steps, "--resume")
    assert first | rest == whole and min(rest) == steps - 2 and again == weights
